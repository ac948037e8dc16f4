"""One claim with its number, and what every claim is made with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import xarray as xr

from .statistics import Interval

Level = Literal["verdict", "finding", "note"]


@dataclass(frozen=True)
class Finding:
    """One claim with its number.

    `where` names the cell, layer or task; `evidence` the data that it rests on; `n` the independent
    units behind the interval.
    """

    claim: str
    value: float
    interval: tuple[float, float] | None
    n: int
    where: str
    evidence: str
    level: Level = "finding"
    detail: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def group(cell: xr.DataTree, name: str) -> xr.Dataset | None:
    """A group of a cell, None where the cell does not have it."""
    return cell[name].to_dataset() if name in cell.children else None


def accomplished(cell: xr.DataTree) -> dict[str, Any]:
    """What compression achieved, as the cell's attributes tell it; empty without."""
    try:
        return dict(json.loads(str(cell.attrs.get("achieved", "{}"))))
    except (ValueError, TypeError):
        return {}


def achieved(cell: xr.DataTree, part: str) -> dict[str, Any]:
    """One part of it; empty without."""
    found = accomplished(cell).get(part)
    return dict(found) if isinstance(found, dict) else {}


def claimed(
    claim: str, estimate: Interval, n: int, where: str, evidence: str, level: Level = "finding",
    **detail: Any,
) -> Finding:  # fmt: skip
    """A finding with an estimate's value, and its interval where that is finite."""
    span = (
        (estimate.low, estimate.high) if np.isfinite([estimate.low, estimate.high]).all() else None
    )
    return Finding(claim, estimate.value, span, n, where, evidence, level, detail)
