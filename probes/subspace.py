"""The categorical subspace: what multiple choice by letter reads, beside everything that it ignores.

At the position where the letter is predicted, the figures of z and p over the options alone, over
the dense model's most likely tokens and over the whole vocabulary, each renormalised to its subset
([H], Figure 7), and whether the dense choice is bound to stand: where no option gains on the dense
one as much as the dense margin, `max (dz_c - dz_top) < margin`, the answer cannot change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ..analysis import schema
from .items import Item, Task, TaskError
from .model import Model, batches, pad
from .score import split

TOP = 10


def check_letters(model: Model, tasks: Sequence[Task]) -> None:
    """Whether every option of tasks by letter is one token, different from the others.

    Raises:
        TaskError: options that are not, with the item.
    """
    for task in (t for t in tasks if t.letters):
        for item in task.items:
            _options(model, task, item)


def _options(model: Model, task: Task, item: Item) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of each option after it."""
    rows = [split(model, item.prompt, choice) for choice in item.choices]
    ends = [tuple(ids[start:]) for ids, start in rows]
    if any(len(end) != 1 for end in ends) or len(set(ends)) < len(ends):
        shown = ", ".join(f"{c!r} {list(e)}" for c, e in zip(item.choices, ends, strict=True))
        raise TaskError(
            f"{task.name}, {item.id}: with this tokenizer the options are not one token each, all "
            f"different ({shown}); ask the task by its texts instead of by letter"
        )
    return rows[0][0][: rows[0][1]], [end[0] for end in ends]


def subspace(
    dense: Model,
    candidate: Model,
    *,
    tasks: Sequence[Task],
    top: int = TOP,
    progress: Callable[[float], None] = lambda _: None,
) -> xr.DataTree:
    """Both models where a letter is predicted.

    Args:
        dense: the reference model.
        candidate: the compressed model.
        tasks: of which those by letter are asked.
        top: how many of the dense model's likeliest tokens make up its head.
        progress: called with the share of the work that is done.

    Returns:
        A tree with `/subspace`.

    Raises:
        TaskError: no task by letter, or options that are not one token each.
    """
    asked = [(t, i, *_options(dense, t, i)) for t in tasks if t.letters for i in t.items]
    if not asked:
        raise TaskError("none of the tasks is asked by letter; mmlu is, and arc_easy:letters")
    rows: list[dict[str, np.ndarray]] = [{} for _ in asked]
    done = 0
    for batch in batches([len(ids) for _, _, ids, _ in asked]):
        logits = [_logits(m, [asked[i][2] for i in batch]) for m in (dense, candidate)]
        for n, i in enumerate(batch):
            rows[i] = _figures(logits[0][n].double(), logits[1][n].double(), asked[i][3], top)
        done += len(batch)
        progress(done / len(asked))
    coords: dict[str, Any] = {
        "item": np.arange(len(asked)), "model": list(schema.MODELS), "subset": list(schema.SUBSETS),
        "subspace": list(schema.SPACES[1:]),
        "item_id": ("item", [i.id for _, i, *_ in asked]),
        "task": ("item", [t.name for t, *_ in asked]),
    }  # fmt: skip
    variables = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    data = schema.dataset("subspace", variables, coords, {"top": top})
    return schema.tree({"subspace": data}, {})


@torch.no_grad()
def _logits(model: Model, rows: list[list[int]]) -> Tensor:
    """Logits after the last token of each row, `(row, vocab)`, float32."""
    hidden = model.module.base_model(**pad(model, rows), use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(rows)), torch.tensor([len(r) - 1 for r in rows])]
    readout = model.readout("raw")
    space = last.new_empty((len(rows), model.vocabulary), dtype=torch.float32)
    return readout.logits(readout.states(last), space)


def _figures(z: Tensor, y: Tensor, options: list[int], top: int) -> dict[str, np.ndarray]:
    """Of one position, from both models' logits `(vocab,)` in float64."""
    chosen = torch.tensor(options, device=z.device)
    subsets = (chosen, z.topk(min(top, len(z))).indices, torch.arange(len(z), device=z.device))
    shift = (y - z)[chosen]
    best = int(z[chosen].argmax())
    gains = shift - shift[best]
    gains[best] = -torch.inf
    ranked = z[chosen].sort(descending=True).values
    margin = ranked[0] - ranked[1]
    return {
        "cosine": np.array([[_cosine(z[s], y[s]), _cosine(*_both(z[s], y[s]))] for s in subsets]),
        "kl": np.array([_kl(z[s], y[s]) for s in subsets]),
        "mass": np.array([float(x.softmax(-1)[chosen].sum()) for x in (z, y)]),
        "margin": np.array(float(margin)),
        "gain": np.array(float(gains.max())),
        "agree": np.array(float(best == int(y[chosen].argmax()))),
        "stable": np.array(float(gains.max() < margin)),
    }


def _both(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return z.softmax(-1), y.softmax(-1)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def _kl(z: Tensor, y: Tensor) -> float:
    """KL(p || p') of the subset, renormalised."""
    p, q = z.log_softmax(-1), y.log_softmax(-1)
    return float((p.exp() * (p - q)).sum().clamp(min=0))
