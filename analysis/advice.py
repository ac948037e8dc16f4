"""Advice: how far a model can be compressed by each method, for which use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from .collapse import INTACT
from .correlation import OUTCOMES

KEPT = 0.8  # of retention: less than intact, still of use
USES = {"retention_generation": "writing", "retention_choice": "choosing"}


@dataclass(frozen=True)
class Reach:
    """How far one method goes on one model.

    `intact` and `kept` are the recipes that save most bytes while the interval of retention stays above
    `INTACT`, or the retention above `KEPT`, there and at every smaller saving; empty where none does.
    `saved` are their shares of the stored bytes.
    """

    model: str
    method: str
    outcome: str
    intact: str
    intact_saved: float
    kept: str
    kept_saved: float
    tried: int


def reaches(study: xr.Dataset) -> list[Reach]:
    """Every method on every model, for writing and for choosing."""
    found: list[Reach] = []
    if "compression" not in study:
        return found
    pairs = dict.fromkeys(
        zip(study.model.values.tolist(), study.method.values.tolist(), strict=True)
    )
    for outcome in OUTCOMES:
        if outcome in study:
            found += [_reach(study, model, method, outcome) for model, method in pairs]
    return [r for r in found if r.tried]


def _reach(study: xr.Dataset, model: str, method: str, outcome: str) -> Reach:
    mine = (study.model.values == model) & (study.method.values == method)
    mine &= np.isin(study.ranking.values, ("", "cosine"))
    part = study.isel(cell=np.flatnonzero(mine & np.isfinite(study[outcome].values)))
    part = part.isel(cell=np.argsort(part["compression"].values, kind="stable"))
    saved = part["compression"].values
    intact = _up_to(part[f"{outcome}_low"].values >= INTACT, saved)
    kept = _up_to(part[outcome].values >= KEPT, saved)
    name = [str(r) for r in part.recipe.values]
    return Reach(
        model, method, outcome,
        name[intact] if intact >= 0 else "", float(saved[intact]) if intact >= 0 else 0.0,
        name[kept] if kept >= 0 else "", float(saved[kept]) if kept >= 0 else 0.0, len(name),
    )  # fmt: skip


def _up_to(good: np.ndarray, saved: np.ndarray) -> int:
    """The last cell before the first that is not good; cells that save the same stand or fall together."""
    bad = saved[~good]
    limit = bad.min() if len(bad) else np.inf
    there = np.flatnonzero(saved < limit)
    return int(there[-1]) if len(there) else -1


def best(found: Sequence[Reach], model: str, outcome: str, kind: str = "kept") -> Reach | None:
    """The method that saves most bytes; None where none does without loss."""
    mine = [r for r in found if r.model == model and r.outcome == outcome and getattr(r, kind)]
    return max(mine, key=lambda r: getattr(r, f"{kind}_saved"), default=None)
