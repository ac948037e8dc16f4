"""What a study may take: from its finished cells where there are some, else from sizes."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..analysis import schema
from ..probes.items import Task
from ..probes.size import parameters
from .request import Plan
from .study import DECODED

CHARACTERS = 4  # of a token, about
PASSES = 3  # over the prompts: dense, candidate, candidate on dense states
SPEED_TOKENS = 20_000  # that the timing reads and writes, in passes' worth
SHARE = 0.4  # of the machine's best rate of products that a forward pass reaches
FIXED = 1.5e9  # bytes of the process without models
CALIBRATED = ("wanda", "sparsegpt", "gptq", "awq")
CALIBRATION_TOKENS = 60_000  # read layer by layer, sums and solving included, in passes' worth


@dataclass(frozen=True)
class Row:
    """One cell: whether it is there, what it took or may take, and where that is known from."""

    model: str
    cell: str
    state: str
    seconds: float
    gigabytes: float
    basis: str


def estimate(name: str, what: Plan) -> list[Row]:
    """Every cell of one model."""
    there = _known(what)
    size = parameters(what.request.model)
    bytes_each = 4 if what.request.dtype == "float32" else 2
    gigabytes = (2.5 * size * bytes_each + FIXED) / 1e9
    basis = f"from {len(there)} finished cells" if there else "rough: from sizes"
    guess = _guess(what, size) if not there else {}
    missing = set(what.missing())
    rows: list[Row] = []
    for cell in what.request.names():
        method = cell.partition("@")[0]
        seconds = there.get(cell) or _like(there, method) or guess[method in CALIBRATED]
        state = "to be made" if cell in missing else "done"
        rows.append(Row(name, cell, state, seconds, gigabytes, basis))
    return rows


def _known(what: Plan) -> dict[str, float]:
    """Seconds that finished cells took."""
    files = {cell: what.cell(cell) for cell in what.request.names() if what.cell(cell).exists()}
    return {
        cell: float(schema.read_group(file, "cost").seconds.sum()) for cell, file in files.items()
    }


def _like(there: dict[str, float], method: str) -> float | None:
    """The median of cells of a method; of all where it has none."""
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for cell, seconds in there.items():
        groups[cell.partition("@")[0]].append(seconds)
    known = groups.get(method) or list(there.values())
    return statistics.median(known) if known else None


def _guess(what: Plan, size: float) -> dict[bool, float]:
    """Seconds of a cell that is calibrated or not, from tokens read and the machine's rate."""
    prompts = sum(len(p) for p in what.prompts) / CHARACTERS
    written = 4 * DECODED * what.request.steps if "decoding" not in what.request.skip else 0
    tokens = PASSES * prompts + written + sum(map(_tokens, what.tasks))
    tokens += SPEED_TOKENS if "speed" not in what.request.skip else 0
    unembedding = 120 * prompts * 0.2 if "layers" not in what.request.skip else 0
    rate = SHARE * _rate()
    plain = 2 * size * (tokens + unembedding) / rate
    return {False: plain, True: plain + 2 * size * CALIBRATION_TOKENS / rate}


def _tokens(task: Task) -> float:
    """Tokens that one model reads, and writes, for a task."""
    items: Sequence[object] = task.items
    asked = sum(len(i.prompt) + sum(map(len, i.choices or ())) for i in task.items)
    return asked / CHARACTERS + (32 * len(items) if task.format == "generation" else 0)


def _rate(size: int = 1024) -> float:
    """Floating-point operations a second of products of this machine."""
    x = torch.ones(size, size)
    torch.mm(x, x)
    start = time.perf_counter()
    for _ in range(4):
        torch.mm(x, x)
    return 4 * 2 * size**3 / (time.perf_counter() - start)
