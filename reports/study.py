"""Running a study: cells one after the other, each complete or absent, in a folder that resumes.

DIR/study.json          what was asked; another request for the same folder is refused
DIR/dense.json          the dense model's answers and texts, made once
DIR/cells/*.nc          one netCDF file per cell
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from ..analysis import causes, provenance, schema
from ..analysis.places import write_text
from ..analysis.summary import summarise
from ..probes.chat import chatted
from ..probes.compress import check as check_recipe
from ..probes.compress import compress, cost
from ..probes.decode import check_texts, decode, readable
from ..probes.further import further
from ..probes.items import Task
from ..probes.load import load
from ..probes.measure import MeasureError, check_pair, check_prompts, measure
from ..probes.memory import remember
from ..probes.model import Model, encode
from ..probes.neurons import check_apart
from ..probes.patch import patch
from ..probes.rank import calibration_texts
from ..probes.repair import arms, repair
from ..probes.score import Answer, answers, pair
from ..probes.shape import shape
from ..probes.speed import speed
from ..probes.subspace import check_letters
from ..probes.writing import write
from .progress import Progress
from .request import Plan, Request, StudyError

DECODED = 16  # prompts that both models go on from
REMEMBERED = 4  # of them, those on which memories are exchanged
PEAK_UNIT = 1024  # ru_maxrss counts KiB on Linux


class CellError(RuntimeError):
    """A cell whose numbers mean nothing; the message says why."""


@dataclass(frozen=True)
class Dense:
    """The dense side of every cell, made once."""

    model: Model
    answers: list[list[Answer]]
    texts: list[list[int]]
    cost: dict[str, float]


def run(what: Plan, progress: Progress) -> None:
    """Run what is missing of a study; cells are in their files."""
    missing = what.missing()
    if not missing:
        progress.say(f"all {len(what.request.names())} cells are there already")
        return
    what, dense = prepare(what, progress)
    for name in missing:
        make(what, name, dense, progress)


def prepare(what: Plan, progress: Progress, *, lenient: bool = False) -> tuple[Plan, Dense]:
    """Load the dense model, check the plan against it and make what all cells share.

    Args:
        what: the plan.
        progress: told what runs.
        lenient: leave recipes that this model does not allow to be found cell by cell.

    Raises:
        RecipeError, TaskError, MeasureError, DecodeError: what this model does not allow.
    """
    with progress.task(f"loading {what.request.model}"):
        model = _load(what.request, what.request.model, progress)
    if what.request.chat:
        what = replace(what, tasks=tuple(chatted(model, what.tasks)))
    _check_against(what, model, lenient)
    what.folder.mkdir(parents=True, exist_ok=True)
    write_text(what.folder / "study.json", json.dumps(_merged(what.request, what.folder), indent=1))
    return what, _dense(what, model, progress)


def _dense(what: Plan, model: Model, progress: Progress) -> Dense:
    """Made once for a study: what is in its file is for the same items, texts and weights."""
    file, key = what.folder / "dense.json", _dense_key(what, model)
    with suppress(FileNotFoundError):
        there = json.loads(file.read_text("utf-8"))
        if there["key"] == key:
            replies = [[Answer(**a) for a in side] for side in there["answers"]]
            return Dense(model, replies, there["texts"], cost(model))
    replies = _answers(model, what.scored, "dense", progress)
    with progress.task("dense: writing") as tick:
        texts = _texts(what, model, tick)
    plain = [[asdict(a) for a in side] for side in replies]
    write_text(file, json.dumps({"key": key, "answers": plain, "texts": texts}))
    return Dense(model, replies, texts, cost(model))


def _dense_key(what: Plan, model: Model) -> str:
    scored = json.dumps([asdict(t) for t in what.scored], sort_keys=True)
    written = json.dumps([what.prompts[:DECODED], _decoding(what.request)])
    return provenance.text_hash([scored, written, model.weights])


def _texts(what: Plan, model: Model, tick: Callable[[float], None]) -> list[list[int]]:
    request = what.request
    return write(
        model, what.prompts[:DECODED], request.steps, seed=request.seed, progress=tick,
        temperature=request.temperature if request.sampled else None,
    )  # fmt: skip


def _load(request: Request, source: str, progress: Progress) -> Model:
    return load(
        source, dtype=request.dtype, device=request.device, say=progress.say,
        trust_remote_code=request.trust_remote_code,
    )  # fmt: skip


def _check_against(what: Plan, dense: Model, lenient: bool) -> None:
    for recipe in [] if lenient else what.recipes.values():
        check_recipe(dense, recipe)
    check_letters(dense, what.tasks)
    check_prompts(dense, what.prompts)
    check_texts(dense, what.prompts[:DECODED], what.request.steps)


def _merged(request: Request, folder: Path) -> dict[str, Any]:
    """The request with the cells that the folder has already."""
    new, file = asdict(request), folder / "study.json"
    old = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    for kind in ("recipes", "candidates"):
        new[kind] = list(dict.fromkeys([*old.get(kind, []), *new[kind]]))
    return new


def _answers(
    model: Model, tasks: Sequence[Task], name: str, progress: Progress
) -> list[list[Answer]]:
    with progress.task(f"{name}: tasks") as tick:
        return answers(model, tasks, progress=tick)


def make(what: Plan, name: str, dense: Dense, progress: Progress) -> None:
    """Make one cell and write its file; the candidate is gone from memory afterwards.

    Raises:
        CellError: the candidate's logits are not finite.
    """
    clock, seconds = time.perf_counter(), dict[str, float]()

    def lap(part: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[part], clock = now - clock, now

    candidate = _candidate(what, name, dense.model, progress)
    _check_finite(candidate, name, what.prompts[0])
    lap("compress")
    tree = _measure(what, name, dense.model, candidate, progress)
    lap("measure")
    tasked = _tasked(what, name, dense, candidate, progress)
    lap("score")
    decoded = _decode(what, name, dense, candidate, progress)
    lap("decode")
    caused = _causes(what, dense, candidate, tree, name, progress)
    lap("causes")
    rates = _speed(what, name, dense, candidate, progress)
    lap("speed")
    groups = {n: node.to_dataset() for n, node in tree.children.items()}
    groups |= {
        **tasked,
        **decoded,
        **caused,
        **candidate.measured,
        "cost": _cost(dense.cost, candidate, rates, seconds),
    }
    cell = schema.tree(groups, _provenance(what, name, dense.model, candidate))
    cell["summary"] = summarise(cell)
    schema.write(cell, what.cell(name))


def _check_finite(candidate: Model, name: str, prompt: str) -> None:
    """Raises CellError where a candidate's logits are none."""
    with torch.no_grad():
        logits = candidate.module(**encode(candidate, [prompt])).logits
    if not bool(torch.isfinite(logits).all()):
        raise CellError(
            f"logits of {name} are not finite, so nothing about it can be measured: the weights or the type "
            f"that they are computed in ({candidate.dtype}) are at fault"
        )


def _tasked(
    what: Plan, name: str, dense: Dense, candidate: Model, progress: Progress
) -> dict[str, xr.Dataset]:
    """What the tasks say: `/scores`, and the groups of those that are not right or wrong."""
    groups: dict[str, xr.Dataset] = {}
    if what.scored:
        mine = _answers(candidate, what.scored, name, progress)
        groups["scores"] = pair(what.scored, dense.answers, mine)
    if len(what.scored) < len(what.tasks) or any(t.letters for t in what.tasks):
        with progress.task(f"{name}: letters, texts, vectors") as tick:
            groups |= further(dense.model, candidate, tasks=what.tasks, progress=tick)
    return groups


def _candidate(what: Plan, name: str, dense: Model, progress: Progress) -> Model:
    if name in what.recipes:
        with progress.task(f"{name}: compressing") as tick:
            recipe, seed = what.recipes[name], what.request.seed
            return compress(
                dense, recipe, calibration=what.calibration, ranking=what.ranking, seed=seed,
                progress=tick,
            )  # fmt: skip
    with progress.task(f"loading {name}"):
        candidate = _load(what.request, name, progress)
    check_pair(dense, candidate, layerwise=False)
    check_apart(candidate.label, candidate.achieved, what.tasks)
    return candidate


def _measure(
    what: Plan, name: str, dense: Model, candidate: Model, progress: Progress
) -> xr.DataTree:
    layerwise = "layers" not in what.request.skip
    try:
        check_pair(dense, candidate, layerwise)
    except MeasureError:  # checked without layers before: only the layers do not match
        layerwise = False
    with progress.task(f"{name}: states{', every layer' * layerwise}") as tick:
        cell = measure(
            dense, candidate, prompts=what.prompts, temperature=what.request.temperature,
            lens="raw" if what.request.lens == "raw" else "norm", layerwise=layerwise, progress=tick,
        )  # fmt: skip
        cell["shape"] = shape(dense, candidate, prompts=what.prompts)
    return cell


def _decode(
    what: Plan, name: str, dense: Dense, candidate: Model, progress: Progress
) -> dict[str, xr.Dataset]:
    if "decoding" in what.request.skip:
        return {}
    with progress.task(f"{name}: decoding") as tick:
        cell = decode(
            dense.model, candidate, prompts=what.prompts[:DECODED], written=dense.texts,
            progress=tick, **_decoding(what.request),
        )  # fmt: skip
    return {name: node.to_dataset() for name, node in cell.children.items()}


def _speed(
    what: Plan, name: str, dense: Dense, candidate: Model, progress: Progress
) -> dict[str, np.ndarray]:
    if "speed" in what.request.skip:
        return {}
    with progress.task(f"{name}: speed") as tick:
        return speed(dense.model, candidate, progress=tick)


def _causes(
    what: Plan, dense: Dense, candidate: Model, tree: xr.DataTree, name: str, progress: Progress
) -> dict[str, xr.Dataset]:
    """Patched models, memories and, asked for, repairs: where layers have counterparts."""
    if not what.request.causes or "shifts" not in tree.children:
        return {}
    prompts, answers = _asked(what, dense.answers)
    with progress.task(f"{name}: causes") as tick:
        cell = patch(dense.model, candidate, prompts=prompts, answers=answers, progress=tick)
    groups = {"patches": cell["patches"].to_dataset()}
    if readable(dense.model, candidate):
        with progress.task(f"{name}: memory") as tick:
            texts = dense.texts[:REMEMBERED]
            cell = remember(
                dense.model, candidate, prompts=what.prompts[: len(texts)], written=texts,
                steps=what.request.steps, progress=tick,
            )  # fmt: skip
        groups["memory"] = cell["memory"].to_dataset()
    places = _places(what, groups["patches"], tree["shifts"].to_dataset())
    if places:
        with progress.task(f"{name}: repair") as tick:
            cell = repair(dense.model, candidate, places=places, tasks=what.tasks, progress=tick)
        groups["repairs"] = cell["repairs"].to_dataset()
    return groups


def _asked(what: Plan, replies: list[list[Answer]]) -> tuple[list[str], list[str] | None]:
    """Items that the dense model writes (else: chooses) right, tasks in turn, with their answers."""
    formats = ("generation", "last word", "choice")
    sides: dict[str, list[list[tuple[str, str]]]] = {f: [] for f in formats}
    for task, answered in zip(what.scored, replies, strict=True):
        right = [item for item, a in zip(task.items, answered, strict=True) if a.score == 1]
        usable = [i for i in right if i.prompt and not i.contexts and not i.tests]
        sides[task.format].append([(i.prompt, i.right) for i in usable])
    for queues in sides.values():
        turns = [pair for row in zip_longest(*queues) for pair in row if pair is not None]
        if turns:
            prompts, answers = zip(*turns[: what.request.causes], strict=True)
            return list(prompts), list(answers)
    return list(what.prompts[: what.request.causes]), None


def _places(
    what: Plan, patches: xr.Dataset, shifts: xr.Dataset
) -> dict[str, list[tuple[str, int]]] | None:
    """Which sublayers to give back; None where nothing was asked for or can be told apart."""
    figures = causes.measurable(patches)
    written = any(task.format == "generation" for task in what.tasks)
    if not (what.request.repair and figures and written and int(patches.changed.sum()) > 1):
        return None
    blamed = [(c.site, c.layer) for c in causes.ranking(patches, figures[0])]
    own = shifts.angular.sel(effect="local", space="h").mean(("prompt", "token"))
    moved = sorted(blamed, key=lambda p: -float(own.sel(site=p[0], layer=p[1])))
    return arms(blamed, moved, min(what.request.repair, len(blamed) - 1), what.request.seed)


def _decoding(request: Request) -> dict[str, Any]:
    return {
        "steps": request.steps, "temperature": request.temperature, "sampled": request.sampled,
        "seed": request.seed,
    }  # fmt: skip


def _cost(
    dense: dict[str, float],
    candidate: Model,
    rates: dict[str, np.ndarray],
    seconds: dict[str, float],
) -> xr.Dataset:
    sides = [dense, cost(candidate)]
    variables = {n: np.array([side[n] for side in sides]) for n in sides[0]} | rates
    variables["seconds"] = np.array(list(seconds.values()))
    coords = {"model": list(schema.MODELS), "work": list(seconds)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_UNIT
    attrs = {"peak_memory_bytes": peak, "achieved": candidate.achieved}
    return schema.dataset("cost", variables, coords, attrs)


def _provenance(what: Plan, name: str, dense: Model, candidate: Model) -> dict[str, Any]:
    return provenance.stamp(
        recipe=name, model=dense.name, weights=dense.weights, candidate_weights=candidate.weights,
        achieved=candidate.achieved, prompts=provenance.text_hash(what.prompts),
        calibration=provenance.text_hash(what.calibration or calibration_texts()),
        seed=what.request.seed, dtype=what.request.dtype, device=what.request.device,
        request=asdict(what.request),
    )  # fmt: skip


def cells(folder: Path) -> dict[str, xr.DataTree]:
    """The finished cells of a study's folder, in the order in which they were asked for.

    Raises:
        StudyError: no study there, or none of its cells is finished.
    """
    file = folder / "study.json"
    if not file.is_file():
        raise StudyError(
            f"{folder}: no study.json, so this is no folder that `diagnose` or `compare` wrote"
        )
    asked: dict[str, Any] = {}
    with suppress(ValueError):
        asked = json.loads(file.read_text("utf-8"))
    order = [*asked.get("recipes", []), *asked.get("candidates", [])]
    found = {
        str(tree.attrs["recipe"]): tree
        for tree in map(schema.read, sorted(folder.glob("cells/[!.]*.nc")))
    }
    if not found:
        raise StudyError(
            f"{folder}: no cell is finished yet; run the command that started it again"
        )
    return {
        name: found[name]
        for name in sorted(found, key=lambda n: order.index(n) if n in order else len(order))
    }
