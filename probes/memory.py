"""Whose memory does the damage: the dense model's keys and values in the candidate's lower layers.

With none of its layers remembering the dense way a candidate is `forced`, with all of them it is
`step` (see `decode`); between them lies where the damage enters through remembered context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from transformers import DynamicCache

from ..analysis import schema
from .decode import check, one_step, readable
from .kernels import compare_at
from .measure import MeasureError
from .model import Model, batches
from .writing import Rows, Written, read_batch, write

STEPS = 32
FIGURES = ("kl", "flip")


def remember(
    dense: Model,
    candidate: Model,
    *,
    prompts: Sequence[str],
    steps: int = STEPS,
    written: Rows | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> xr.DataTree:
    """Measure every step of the dense text for every number of layers that remember the dense way.

    Args:
        dense: the reference model; its greedy text fixes the trajectory.
        candidate: the compressed model, whose layers have counterparts in the dense one.
        prompts: texts to go on from.
        steps: most tokens that the dense model writes.
        written: what `write` gave for the dense model with the same settings, to spare it here.
        progress: called with the share of the work that is done.

    Returns:
        A tree with `/memory`, dims `prompt, cut`: means over steps, cut from 0 to all layers.

    Raises:
        MeasureError: models whose attentions cannot read each other's keys and values.
        DecodeError: as `decode`.
    """
    check(dense, candidate, prompts, steps, ())
    if not readable(dense, candidate):
        raise MeasureError(
            f"the attentions of {candidate.label} cannot read the keys and values of {dense.label}: "
            "their layers have no counterparts, or some of the dense model's are dropped"
        )
    if candidate.module is dense.module:
        candidate = dense.clone()
    rows = [dense.tokenizer(p)["input_ids"] for p in prompts]
    texts = written or write(dense, prompts, steps)
    shape, done = (len(rows), dense.layer_count + 1), 0
    arrays = {name: np.full(shape, np.nan) for name in FIGURES}
    for part in batches([len(row) + steps for row in rows]):
        mine = read_batch(dense, [rows[i] for i in part], [texts[i] for i in part])
        h, sizes = torch.cat(mine.states), [len(text) for text in mine.texts]
        for cut, states in enumerate(_cuts(candidate, mine)):
            readouts = dense.readout(), candidate.readout()
            figures = compare_at(h, [torch.cat(states)], *readouts, temperatures=(1.0,))[0][0]
            for name, array in arrays.items():
                means = [float(x.mean()) for x in figures[name].cpu().split(sizes)]
                array[part, cut] = means
            progress((done + len(part) * (cut + 1) / shape[1]) / len(rows))
        done += len(part)
    coords: dict[str, Any] = {"prompt": np.arange(shape[0]), "cut": np.arange(shape[1])}
    attrs = {"dense": dense.label, "candidate": candidate.label, "steps": steps}
    return schema.tree({"memory": schema.dataset("memory", arrays, coords, attrs)}, {})


def _cuts(candidate: Model, mine: Written) -> list[list[Tensor]]:
    """States of the candidate for every cut; a layer that remembers alike in both adds no pass."""
    own = read_batch(candidate, mine.rows, mine.texts).cache
    found: list[list[Tensor]] = []
    for cut in range(candidate.layer_count + 1):
        if found and _alike(mine.cache, own, cut - 1):
            found.append(found[-1])
            continue
        memory = SimpleNamespace(layers=[*mine.cache.layers[:cut], *own.layers[cut:]])
        found.append(one_step(candidate, mine, memory))
    return found


def _alike(dense: DynamicCache, own: DynamicCache, layer: int) -> bool:
    """Whether a layer's memory is the same in both, or the candidate's attention reads none."""
    mine, theirs = cast(Any, dense.layers[layer]), cast(Any, own.layers[layer])
    if mine.keys.shape[1::2] != theirs.keys.shape[1::2]:
        return True
    return torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
