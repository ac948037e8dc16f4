"""What survives and what collapses: retention of task scores, with its verdict.

retention = (s' - c) / (s - c) for score s of the dense model, s' of the candidate and chance c, with
a 95 % paired bootstrap over items, the same items in both models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from .statistics import DRAWS, Interval, above_chance, bootstrap, holm, mcnemar, resamples

INTACT = 0.95
COLLAPSED = 0.10
ALPHA = 0.05
FLOOR = 0.05
"""Guessing rate assumed for free text when the dense model is tested against chance: its chance is
0, against which a single lucky item would count as skill."""

VERDICTS = {
    "intact": "the interval of retention lies above 0.95",
    "degraded": "neither intact nor collapsed",
    "collapsed": "the interval of retention lies below 0.10",
    "uninformative": "the dense model itself is not above chance, so nothing can be said",
}


@dataclass(frozen=True)
class Retention:
    """How much of one task's score is kept. `p_value` is McNemar's, Holm-corrected over tasks."""

    task: str
    format: str
    n: int
    dense: float
    candidate: float
    chance: float
    retention: Interval
    verdict: str
    lost: int
    gained: int
    p_value: float = 1.0


def verdict(retention: Interval, informative: bool) -> str:
    """The verdict on an interval of retention; see `VERDICTS`."""
    if not informative:
        return "uninformative"
    if retention.low >= INTACT:
        return "intact"
    return "collapsed" if retention.high <= COLLAPSED else "degraded"


def retentions(scores: xr.Dataset) -> list[Retention]:
    """One row per task and format, in the order of the data, McNemar p-values Holm-corrected."""
    keys = list(
        dict.fromkeys(zip(scores.task.values.tolist(), scores.format.values.tolist(), strict=True))
    )
    rows = [_retention(scores, task, format) for task, format in keys]
    adjusted = holm([row.p_value for row in rows])
    return [replace(row, p_value=p) for row, p in zip(rows, adjusted, strict=True)]


def _retention(scores: xr.Dataset, task: str, format: str) -> Retention:
    part = scores.isel(item=(scores.task.values == task) & (scores.format.values == format))
    s, s2 = (part.score.sel(model=m).values.astype(float) for m in ("dense", "candidate"))
    c = part.chance.values.astype(float)
    estimate = ratio_of_sums(s2 - c, s - c)
    informative = is_informative(s, c)
    lost, gained = int(((s == 1) & (s2 == 0)).sum()), int(((s == 0) & (s2 == 1)).sum())
    return Retention(
        task, format, len(s), float(s.mean()), float(s2.mean()), float(c.mean()), estimate,
        verdict(estimate, informative), lost, gained, mcnemar(lost, gained),
    )  # fmt: skip


def is_informative(score: np.ndarray, chance: np.ndarray) -> bool:
    """Whether a dense score is above chance (one-sided exact binomial at 5 %)."""
    null = max(FLOOR, float(chance.mean()))
    return above_chance(int(score.sum()), len(score), null) < ALPHA


def informative(scores: xr.Dataset) -> dict[tuple[str, str], np.ndarray]:
    """(task, format) -> its items, of those on which the dense model is above chance."""
    tasks, formats = scores.task.values, scores.format.values
    dense, chance = scores.score.sel(model="dense").values.astype(float), scores.chance.values
    found: dict[tuple[str, str], np.ndarray] = {}
    for task, format in dict.fromkeys(zip(tasks.tolist(), formats.tolist(), strict=True)):
        items = np.flatnonzero((tasks == task) & (formats == format))
        if is_informative(dense[items], chance[items].astype(float)):
            found[task, format] = items
    return found


def ratio_of_sums(
    numerator: np.ndarray, denominator: np.ndarray, strata: np.ndarray | None = None
) -> Interval:
    """Sum of one over sum of the other, over paired units, with its bootstrap interval."""

    def ratio(pick: np.ndarray) -> np.ndarray:
        below = denominator[pick].sum(-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(below > 0, numerator[pick].sum(-1) / below, np.nan)

    return bootstrap(ratio, len(numerator), strata=strata)


def mean_retention(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], seeds: Sequence[int], draws: int = DRAWS
) -> tuple[float, np.ndarray]:
    """Mean over tasks of the retention of each, as measured and `(draw,)`.

    Args:
        pairs: for each task, the candidate's and the dense model's scores above chance, `(item,)` each.
        seeds: one for each task; items are drawn within their task.
        draws: number of bootstrap draws; one in which a dense score is not above chance is NaN.
    """
    values: list[float] = []
    drawn: list[np.ndarray] = []
    for (candidate, dense), seed in zip(pairs, seeds, strict=True):
        picks = resamples(np.zeros(len(dense)), draws, seed)
        values.append(candidate.sum() / dense.sum())
        below = dense[picks].sum(-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn.append(np.where(below > 0, candidate[picks].sum(-1) / below, np.nan))
    return float(np.mean(values)), np.mean(drawn, axis=0)


@dataclass(frozen=True)
class Discrepancy:
    """Retention of choice minus retention of generation, on the same items asked twice."""

    choice: Interval
    generation: Interval
    difference: Interval
    tasks: tuple[str, ...]
    n: int


def discrepancy(scores: xr.Dataset) -> Discrepancy | None:
    """The discrepancy over all twins that are informative in both formats; None where none is.

    Items are resampled within their task, and an item keeps its two halves.
    """
    halves = [
        scores.isel(item=(scores.format.values == f) & (scores.twin.values != ""))
        for f in ("choice", "generation")
    ]
    tasks = [
        t for t in dict.fromkeys(halves[0].task.values.tolist()) if _both_informative(halves, t)
    ]
    if not tasks:
        return None
    parts = [_gains(half, tasks) for half in halves]
    strata = halves[0].task.values[np.isin(halves[0].task.values, tasks)]

    def each(part: tuple[np.ndarray, np.ndarray], pick: np.ndarray) -> np.ndarray:
        return part[0][pick].sum(-1) / np.maximum(part[1][pick].sum(-1), 1e-9)

    def difference(pick: np.ndarray) -> np.ndarray:
        return each(parts[0], pick) - each(parts[1], pick)

    n = len(strata)
    choice, generation = (
        bootstrap(lambda pick, p=part: each(p, pick), n, strata=strata) for part in parts
    )
    return Discrepancy(choice, generation, bootstrap(difference, n, strata=strata), tuple(tasks), n)


def kinds_apart(scores: xr.Dataset) -> Discrepancy | None:
    """Retention of multiple choice minus that of written answers over tasks that are no twins.

    Different items, so each format is resampled within its own tasks; None where one of the two has
    no task on which the dense model is above chance.
    """
    plain = scores.isel(item=scores.twin.values == "")
    halves = [plain.isel(item=plain.format.values == f) for f in ("choice", "generation")]
    names = [
        [t for t in dict.fromkeys(h.task.values.tolist()) if _both_informative([h], t)]
        for h in halves
    ]
    if not all(names):
        return None
    parts = [_gains(h, tasks) for h, tasks in zip(halves, names, strict=True)]
    sizes = [len(part[0]) for part in parts]
    strata = np.concatenate(
        [
            h.task.values[np.isin(h.task.values, t)] + f" {k}"
            for k, (h, t) in enumerate(zip(halves, names, strict=True))
        ]
    )
    number = [np.concatenate(both) for both in zip(*parts, strict=True)]
    written = np.arange(sum(sizes)) >= sizes[0]

    def each(pick: np.ndarray, half: bool) -> np.ndarray:
        mine = written[pick] == half
        return (number[0][pick] * mine).sum(-1) / np.maximum((number[1][pick] * mine).sum(-1), 1e-9)

    choice, generation = (
        bootstrap(lambda pick, h=h: each(pick, h), sum(sizes), strata=strata) for h in (False, True)
    )
    gap = bootstrap(lambda pick: each(pick, False) - each(pick, True), sum(sizes), strata=strata)
    return Discrepancy(
        choice, generation, gap, tuple(dict.fromkeys(names[0] + names[1])), sum(sizes)
    )


def _both_informative(halves: Sequence[xr.Dataset], task: str) -> bool:
    for half in halves:
        part = half.isel(item=half.task.values == task)
        score = part.score.sel(model="dense").values.astype(float)
        if not len(score) or not is_informative(score, part.chance.values.astype(float)):
            return False
    return True


def _gains(half: xr.Dataset, tasks: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Candidate and dense score above chance, per item of these tasks."""
    part = half.isel(item=np.isin(half.task.values, tasks))
    c = part.chance.values.astype(float)
    score = part.score.values.astype(float)
    dense = list(part.model.values).index("dense")
    return score[:, 1 - dense] - c, score[:, dense] - c


def failures(scores: xr.Dataset) -> dict[str, dict[str, float]]:
    """Mean failure modes of generation, per model: no_answer, no_stop, repetition."""
    part = scores.isel(item=scores.format.values == "generation")
    return {
        model: {
            n: float(part[n].sel(model=model).mean())
            for n in ("no_answer", "no_stop", "repetition")
        }
        for model in ("dense", "candidate")
        if part.sizes["item"]
    }
