"""Theory against measurement: each theorem's estimate beside the exact value, position by position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from scipy import stats

from . import formulas

SMALLEST = 1e-9
"""Shifts below this are rounding of the models themselves and say nothing about a theorem."""


@dataclass(frozen=True)
class Fit:
    """How an estimate relates to its measurement over `n` positions.

    `slope` and `r2` are of log estimate against log measurement; `within` is the share of positions
    where the two are within a factor of 2 of each other; `error` the median relative error.
    """

    theorem: str
    n: int
    slope: float
    r2: float
    spearman: float
    within: float
    error: float


THEOREMS = {
    "1 in h": "angle in h: 1 - cos ~ rho^2/2",
    "1 in z": "angle in z: 1 - cos ~ rho^2/2",
    "1 in h, corrected": "angle in h: 1 - cos ~ rho^2/(2 (1+alpha)^2)",
    "2": "angle in p: 1 - cos ~ Var_r[dz]/2T^2",
    "3": "KL ~ Var_p[dz]/2T^2",
}


def pairs(data: xr.Dataset, temperature: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """theorem -> (measured, estimated), flat float64 arrays over the positions that have a shift."""
    angular = {s: data.angular.sel(space=s).values.ravel().astype(float) for s in ("h", "z", "p")}
    across = {s: data.orthogonal.sel(space=s).values.ravel().astype(float) for s in ("h", "z")}
    # rho/(1+alpha) is the tangent of the angle, so the corrected form needs the angle alone
    sine2, cosine2 = angular["h"] * (2 - angular["h"]), np.maximum((1 - angular["h"]) ** 2, 1e-300)
    found = {
        "1 in h": (angular["h"], formulas.angular_paper(across["h"])),
        "1 in z": (angular["z"], formulas.angular_paper(across["z"])),
        "1 in h, corrected": (angular["h"], 0.5 * sine2 / cosine2),
        "2": (angular["p"], formulas.angular_p_estimate(_flat(data.var_r), temperature)),
        "3": (_flat(data.kl), formulas.kl_estimate(_flat(data.var_p), temperature)),
    }
    return {name: _usable(*pair) for name, pair in found.items()}


def _flat(values: xr.DataArray) -> np.ndarray:
    return values.values.ravel().astype(float)


def _usable(measured: np.ndarray, estimated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keep = (
        (measured > SMALLEST)
        & (estimated > SMALLEST)
        & np.isfinite(measured)
        & np.isfinite(estimated)
    )
    return measured[keep], estimated[keep]


def fit(theorem: str, measured: np.ndarray, estimated: np.ndarray) -> Fit | None:
    """The fit of one theorem; None where fewer than 8 positions have a shift."""
    if len(measured) < 8 or np.ptp(measured) == 0:
        return None
    x, y = np.log(measured), np.log(estimated)
    line: Any = stats.linregress(x, y)
    rank: Any = stats.spearmanr(x, y)
    ratio = estimated / measured
    return Fit(
        theorem, len(x), float(line.slope), float(line.rvalue**2),
        float(rank.statistic),
        float(((ratio >= 0.5) & (ratio <= 2)).mean()), float(np.median(np.abs(ratio - 1))),
    )  # fmt: skip


def fits(data: xr.Dataset, temperature: float) -> list[Fit]:
    """Every theorem's fit over all positions of `data` (any dims)."""
    found = (fit(name, *pair) for name, pair in pairs(data, temperature).items())
    return [f for f in found if f is not None]
