"""Intervals and tests: paired on paired data, seeded, exact where exact is cheap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

DRAWS = 2000
LEVEL = 0.95
SEED = 24652


class Interval(NamedTuple):
    """An estimate with its 95 % percentile-bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}, 95 % {self.low:.2f} to {self.high:.2f}"


def resamples(strata: np.ndarray, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """Indices `(draw, unit)` of bootstrap samples drawn within each stratum, units kept whole.

    Args:
        strata: `(unit,)` labels; every resample has as many units of each label as the data.
        draws: number of resamples.
        seed: of the generator; the same seed pairs resamples across quantities.
    """
    rng = np.random.default_rng(seed)
    result = np.empty((draws, len(strata)), np.int64)
    for label in np.unique(strata):
        members = np.flatnonzero(strata == label)
        result[:, members] = members[rng.integers(0, len(members), (draws, len(members)))]
    return result


def interval(value: float, draws: np.ndarray) -> Interval:
    """Percentile interval of bootstrap draws; draws that are not finite are left out."""
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return Interval(value, float("nan"), float("nan"))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray | float],
    units: int,
    *,
    strata: np.ndarray | None = None,
    draws: int = DRAWS,
    seed: int = SEED,
) -> Interval:
    """Interval of a statistic of unit indices `(..., unit)`, resampling whole units.

    `statistic` maps indices to a value and must work along the last axis.
    """
    labels = strata if strata is not None else np.zeros(units, np.int64)
    picks = resamples(labels, draws, seed)
    return interval(float(statistic(np.arange(units))), np.asarray(statistic(picks)))


def above_chance(correct: int, n: int, chance: float) -> float:
    """One-sided exact binomial p-value that a score is above `chance`."""
    return float(stats.binomtest(correct, n, chance, alternative="greater").pvalue)


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided McNemar p-value from the discordant items: right to wrong, wrong to right."""
    n = lost + gained
    return 1.0 if n == 0 else float(stats.binomtest(lost, n, 0.5).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p-values, in the order given."""
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    factors = len(p) - np.arange(len(p))
    adjusted = np.maximum.accumulate(np.minimum(1.0, p[order] * factors))
    result = np.empty(len(p))
    result[order] = adjusted
    return [float(x) for x in result]
