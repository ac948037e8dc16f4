"""Theory against measurement: each theorem's estimate beside the exact value, position by position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from scipy import stats

from . import formulas
from .statistics import Interval, bootstrap, interval, resamples

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


def by_site(shifts: xr.Dataset, temperature: float) -> xr.Dataset:
    """Theorems 2 and 3 at every layer and site: `slope`, `r2`, `spearman`, `within`, `error`, `n`.

    Takes one effect's `/shifts`; returns dims `theorem, layer, site`, NaN where too few positions
    have a shift to say anything.
    """
    names, sizes = ("2", "3"), (shifts.sizes["layer"], shifts.sizes["site"])
    fields = ("slope", "r2", "spearman", "within", "error", "n")
    found = {f: np.full((len(names), *sizes), np.nan) for f in fields}
    for layer, site in np.ndindex(sizes):
        here = pairs(shifts.isel(layer=layer, site=site), temperature)
        for row, name in enumerate(names):
            result = fit(name, *here[name])
            for field in fields if result else ():
                found[field][row, layer, site] = getattr(result, field)
    coords = {"theorem": list(names), "layer": shifts.layer.values, "site": shifts.site.values}
    dims = ("theorem", "layer", "site")
    return xr.Dataset({f: (dims, v) for f, v in found.items()}, coords)


@dataclass(frozen=True)
class Limit:
    """Where the second order stops: the validity at which half of the positions are off by 2 or more.

    `validity` and its interval are NaN where that is reached at no amount of third order seen;
    `error` is the median relative error of KL ~ Var_p/2T² over all positions, `beyond` the share of
    positions past the limit.
    """

    validity: Interval
    error: Interval
    beyond: float
    prompts: int


@dataclass(frozen=True)
class Departure:
    """How far a candidate is from second order: median validity and median relative error of
    KL ~ Var_p/2T² over positions, intervals over prompts."""

    validity: Interval
    error: Interval
    prompts: int


def departure(output: xr.Dataset, temperature: float) -> Departure | None:
    """The departure at the output (dims `prompt, token`); None where nothing shifts."""
    data = output.transpose("prompt", "token", ...)
    kl, var_p, validity = (data[n].values.astype(float) for n in ("kl", "var_p", "validity"))
    usable = kl > SMALLEST
    if not usable.any(axis=1).all():
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.abs(formulas.kl_estimate(var_p, temperature) / kl - 1)
    found: list[Interval] = []
    for values in (validity, error):
        kept = np.where(usable, values, np.nan)

        def middle(pick: np.ndarray, kept: np.ndarray = kept) -> np.ndarray:
            chosen = kept[pick]
            return np.nanmedian(chosen.reshape(*chosen.shape[:-2], -1), axis=-1)

        found.append(bootstrap(middle, len(kl), draws=500))
    return Departure(found[0], found[1], len(kl))


BIN = 64  # positions that are judged together along the validity


def limit(data: xr.Dataset, temperature: float, draws: int = 200) -> Limit | None:
    """Where Theorem 3 stops describing `data` (dims `prompt, token, …`); None without shifts."""
    flat = data[["kl", "var_p", "validity"]].stack(place=[d for d in data.kl.dims if d != "prompt"])
    flat = flat.transpose("prompt", "place")
    kl, var_p, validity = (flat[n].values.astype(float) for n in ("kl", "var_p", "validity"))
    estimate = formulas.kl_estimate(var_p, temperature)
    usable = (kl > SMALLEST) & (estimate > SMALLEST) & np.isfinite(validity)
    if usable.sum() < 2 * BIN:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(usable, estimate / kl, np.nan)

    def numbers(pick: np.ndarray) -> tuple[float, float]:
        keep = usable[pick]
        r, v = ratio[pick][keep], validity[pick][keep]
        return _crossing(v, (r >= 0.5) & (r <= 2)), float(np.median(np.abs(r - 1)))

    place, error = numbers(np.arange(len(kl)))
    samples = np.array(
        [
            numbers(pick)
            for pick in resamples(np.zeros(len(kl), np.int64), draws)
            if usable[pick].any()
        ]
    )
    beyond = float((validity[usable] >= place).mean()) if np.isfinite(place) else 0.0
    return Limit(interval(place, samples[:, 0]), interval(error, samples[:, 1]), beyond, len(kl))


def _crossing(validity: np.ndarray, within: np.ndarray) -> float:
    """The least validity from which, in bins along it, most positions are off by a factor of 2."""
    order = np.argsort(validity)
    count = len(order) // BIN
    if count < 2:
        return float("nan")
    share = np.array([part.mean() for part in np.array_split(within[order].astype(float), count)])
    starts = [part[0] for part in np.array_split(validity[order], count)]
    bad = share < 0.5
    last_good = int(np.flatnonzero(~bad).max(initial=-1))
    return float(starts[last_good + 1]) if last_good + 1 < count else float("nan")
