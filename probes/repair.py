"""Repair: give a few sublayers back, and see how much of what the model writes comes back.

As advice: the sublayers that patching blames, against as many chosen by lot and as many chosen by
cosine, of the same kinds and so of the same bytes.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from ..analysis import schema
from .anatomy import SUBLAYERS, paths
from .items import SEED, Task
from .model import Model
from .recipe import Layers, Place, Recipe, Step
from .score import answers


def restored(dense: Model, candidate: Model, places: Sequence[Place]) -> Model:
    """The candidate with the dense model's sublayers, their norms included, at these places."""
    made = candidate.clone(
        recipe=spared(candidate, places), achieved=copy.deepcopy(candidate.achieved)
    )
    anatomy, blocks = dense.anatomy, dense.anatomy.blocks(made.module)
    shared = {id(p): p for p in dense.module.parameters()}
    for site, layer in places:
        theirs = dense.anatomy.blocks(dense.module)[layer]
        for path in paths(anatomy, "attn" if site == "attn" else "mlp"):
            own = copy.deepcopy(theirs.get_submodule(path), dict(shared))
            blocks[layer].set_submodule(path, own)
        dropped = made.achieved.get("dropped", {}).get(site, [])
        if layer in dropped:
            dropped.remove(layer)
    return made


def spared(candidate: Model, places: Sequence[Place]) -> Recipe | None:
    """The candidate's recipe without what it does at these places; None where nothing is left.

    Drops become a list of layers. A method that calibrates layer by layer will calibrate anew.
    """
    if candidate.recipe is None:
        return None
    dropped = {
        site: sorted(set(layers) - {n for s, n in places if s == site})
        for site, layers in candidate.achieved.get("dropped", {}).items()
    }
    steps: list[Step] = []
    for step in candidate.recipe.steps:
        if not step.method.endswith("-drop"):
            steps.append(replace(step, keep=tuple(sorted({*step.keep, *places}))))
            continue
        for site, layers in dropped.items():
            if layers:
                steps.append(Step(f"{site}-drop", Layers(tuple(layers))))
        dropped = {}  # all drops stand where the first of them stood
    return Recipe(tuple(steps)) if steps else None


def arms(
    blamed: Sequence[Place], by_cosine: Sequence[Place], count: int, seed: int = SEED
) -> dict[str, list[Place]]:
    """`count` places to give back, chosen three ways, as many of each kind in each of them.

    Args:
        blamed: the changed sublayers, those that cause most first.
        by_cosine: the same, those first whose own change is largest in hidden states.
        count: how many to give back, at most all.
        seed: of the lot.
    """
    chosen = list(blamed[:count])
    kinds = Counter(site for site, _ in chosen)
    lot = list(blamed)
    random.Random(seed).shuffle(lot)

    def alike(order: Sequence[Place]) -> list[Place]:
        return [p for s in SUBLAYERS for p in [q for q in order if q[0] == s][: kinds[s]]]

    return {"blamed": chosen, "random": alike(lot), "cosine": alike(by_cosine)}


def repair(
    dense: Model,
    candidate: Model,
    *,
    places: dict[str, list[Place]],
    tasks: Sequence[Task],
    progress: Callable[[float], None] = lambda _: None,
) -> xr.DataTree:
    """Score what the candidate writes with some sublayers given back.

    Args:
        dense: the reference model.
        candidate: the compressed model.
        places: what to give back, by name of the choice (see `arms`).
        tasks: that are asked, those with free generation.
        progress: called with the share of the work that is done.

    Returns:
        A tree with `/repairs`: the score of every item under every choice, `none` first and the
        dense model, `all`, last; the recipes as attributes.
    """
    asked = [task for task in tasks if task.format == "generation"]
    made = {"none": candidate, **{n: restored(dense, candidate, p) for n, p in places.items()}}
    made["all"] = dense
    scores, texts = list[list[float]](), [f"{t.name}/{item.id}" for t in asked for item in t.items]
    for i, model in enumerate(made.values()):
        replies = answers(model, asked, progress=lambda x, i=i: progress((i + x) / len(made)))
        scores.append([a.score for task in replies for a in task])
    coords: dict[str, Any] = {
        "item": np.arange(len(texts)), "arm": list(made), "item_id": ("item", texts),
        "task": ("item", [t.name for t in asked for _ in t.items]),
    }  # fmt: skip
    attrs = {
        "recipes": {n: str(m.recipe or "") for n, m in made.items()},
        "places": {n: [f"{site}.{layer}" for site, layer in p] for n, p in places.items()},
    }
    data = schema.dataset("repairs", {"score": np.array(scores).T}, coords, attrs)
    return schema.tree({"repairs": data}, {})
