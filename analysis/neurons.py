"""Cuts of neurons across cells: is a task special, or are its neurons just important?

Cells whose recipe cut neurons, held against each other on the same items: the target task beside
unrelated ones, one order of cutting beside its rival, along the ratios, over seeds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from . import collapse
from .finding import achieved
from .statistics import DRAWS, SEED, Interval, holm, interval, resamples

RIVALS = {"reverse": ("salience-reverse",), "selective": ("random", "salience")}
"""Order -> the orders that explain the same without specificity."""

LEAST_SEEDS = 3
FEWEST_RATIOS = 4  # for a change point
FLIPS = 4000  # of signs, in a permutation test


@dataclass(frozen=True)
class Cut:
    """One cell whose recipe cut neurons: how, and what it scored."""

    name: str
    order: str
    asked: float
    share: float
    target: str
    seed: int
    scores: xr.Dataset


def cuts(cells: Mapping[str, xr.DataTree]) -> list[Cut]:
    """The cells of a study that cut neurons and scored tasks."""
    found: list[Cut] = []
    for name, cell in cells.items():
        told = achieved(cell, "neurons")
        if told and "scores" in cell.children:
            found.append(
                Cut(
                    name, str(told["order"]), float(told["asked"]), float(told["cut"]),
                    str(told["target"]), int(told["seed"]), cell["scores"].to_dataset(),
                )
            )  # fmt: skip
    return found


Grouped = dict[tuple[str, str], dict[float, list[Cut]]]


def grouped(found: Sequence[Cut]) -> Grouped:
    """(target, order) -> asked ratio -> its cuts, one for each seed; ratios ascending."""
    table: dict[tuple[str, str], dict[float, list[Cut]]] = defaultdict(dict)
    for cut in sorted(found, key=lambda c: c.asked):
        table[cut.target, cut.order].setdefault(cut.asked, []).append(cut)
    return dict(table)


# --- retention of the target and of the rest, over seeds -----------------------------------------


@dataclass(frozen=True)
class _Task:
    """Items of one task in one format: candidate's score above chance (mean over seeds), and dense."""

    target: bool
    candidate: np.ndarray
    dense: np.ndarray


def tasks_of(group: Sequence[Cut], target: str) -> list[_Task]:
    """The tasks on which the dense model is above chance; a candidate's scores averaged over seeds."""
    first = group[0].scores
    chance = first.chance.values.astype(float)
    dense = first.score.sel(model="dense").values.astype(float) - chance
    sides = [c.scores.score.sel(model="candidate").values for c in group]
    mean = np.mean(np.asarray(sides, float), axis=0) - chance
    return [
        _Task(task == target, mean[items], dense[items])
        for (task, _), items in collapse.informative(first).items()
    ]


def _draws(tasks: Sequence[_Task], seed: int = SEED) -> tuple[float, np.ndarray]:
    """Mean retention over tasks, as measured and `(draw,)`."""
    pairs = [(task.candidate, task.dense) for task in tasks]
    return collapse.mean_retention(pairs, [seed + 100 * k for k in range(len(pairs))])


@dataclass(frozen=True)
class Point:
    """Mean retention over tasks at one ratio: of the target, of the rest, and the rest less the target."""

    asked: float
    share: float
    seeds: int
    target: Interval | None
    rest: Interval | None
    specific: Interval | None


def point(group: Sequence[Cut]) -> Point:
    """One ratio of one order. Task-specific harm is positive in `specific`."""
    tasks = tasks_of(group, group[0].target)
    sides = [[t for t in tasks if t.target == flag] for flag in (True, False)]
    drawn = [_draws(side, SEED + k) if side else None for k, side in enumerate(sides)]
    spans = [interval(float(d[0]), d[1]) if d else None for d in drawn]
    gap = None
    if drawn[0] and drawn[1]:
        gap = interval(float(drawn[1][0] - drawn[0][0]), drawn[1][1] - drawn[0][1])
    seeds = len({c.seed for c in group})
    share = float(np.mean([c.share for c in group]))
    return Point(group[0].asked, share, seeds, spans[0], spans[1], gap)


def curve(ratios: Mapping[float, Sequence[Cut]]) -> list[Point]:
    """Every ratio of one order, ascending."""
    return [point(group) for group in ratios.values()]


# --- one order against its rival -----------------------------------------------------------------


@dataclass(frozen=True)
class Contrast:
    """How much more specific to the target one order's harm is than its rival's, at one ratio."""

    target: str
    order: str
    rival: str
    asked: float
    seeds: int
    n: int
    difference: Interval
    p_value: float


def contrasts(found: Sequence[Cut]) -> list[Contrast]:
    """Each order against its rival, paired over items, p by flipping signs, Holm-corrected."""
    table = grouped(found)
    rows: list[Contrast] = []
    for (target, order), ratios in table.items():
        for rival in (table.get((target, name), {}) for name in RIVALS.get(order, ())):
            pairs = [(ratios[asked], rival[asked]) for asked in ratios if asked in rival]
            rows += [row for pair in pairs if (row := _contrast(*pair)) is not None]
    adjusted = holm([r.p_value for r in rows])
    return [replace(row, p_value=p) for row, p in zip(rows, adjusted, strict=True)]


def _contrast(mine: Sequence[Cut], theirs: Sequence[Cut]) -> Contrast | None:
    seeds = {c.seed for c in mine} & {c.seed for c in theirs}
    sides = [
        tasks_of([c for c in g if c.seed in seeds], g[0].target) for g in (mine, theirs) if seeds
    ]
    if not sides or {t.target for t in sides[0]} != {True, False}:
        return None
    weighted: list[np.ndarray] = []
    drawn = np.zeros(DRAWS)
    for k, (a, b) in enumerate(zip(*sides, strict=True)):
        alike = sum(t.target == a.target for t in sides[0])
        sign = (-1.0 if a.target else 1.0) / alike
        picks = resamples(np.zeros(len(a.dense)), DRAWS, SEED + k)
        below = np.maximum(a.dense[picks].sum(-1), 1e-9)
        drawn += sign * (a.candidate - b.candidate)[picks].sum(-1) / below
        weighted.append(sign * (a.candidate - b.candidate) / a.dense.sum())
    items = np.concatenate(weighted)
    return Contrast(
        mine[0].target, mine[0].order, theirs[0].order, mine[0].asked, len(seeds), len(items),
        interval(float(items.sum()), drawn), flipped(items),
    )  # fmt: skip


def flipped(items: np.ndarray) -> float:
    """Two-sided p-value that a sum is as far from 0 when the sign of each term is drawn."""
    signs = np.random.default_rng(SEED).choice([-1.0, 1.0], (FLIPS, len(items)))
    far = np.abs(signs @ items) >= abs(items.sum()) - 1e-12
    return float((1 + far.sum()) / (1 + FLIPS))


# --- how much can be cut -------------------------------------------------------------------------


@dataclass(frozen=True)
class Threshold:
    """Along the ratios of one order: the largest that is harmless, and where retention falls.

    `harmless` is the largest ratio up to which every interval of retention stays above `INTACT`;
    `change` the ratio in whose neighbourhood two levels describe the curve best.
    """

    target: str
    order: str
    harmless: float
    tried: tuple[float, ...]
    change: Interval | None
    drop: float


def threshold(target: str, order: str, ratios: Mapping[float, Sequence[Cut]]) -> Threshold | None:
    """Of the target task; None where the dense model is not above chance on it."""
    groups = {0.0: None, **ratios}
    sides = [
        [t for t in tasks_of(group, target) if t.target] if group else None
        for group in groups.values()
    ]
    first = next((s for s in sides if s is not None), [])
    if not first:
        return None
    dense = [_Task(True, t.dense, t.dense) for t in first]
    drawn = [_draws(side if side is not None else dense) for side in sides]
    asked = np.array(list(groups))
    harmless = 0.0
    for ratio, (value, draws) in zip(asked, drawn, strict=True):
        if interval(float(value), draws).low < collapse.INTACT:
            break
        harmless = float(ratio)
    values = np.array([v for v, _ in drawn], float)
    change = None
    if len(ratios) >= FEWEST_RATIOS:
        where = _change(asked, np.stack([d for _, d in drawn], -1))
        change = interval(float(_change(asked, values[None])[0]), where)
    return Threshold(
        target, order, harmless, tuple(map(float, asked[1:])), change, float(values[-1] - values[0])
    )


def _change(asked: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """Midpoint of the two ratios between which `(draw, ratio)` curves step down, least squares."""
    errors: list[np.ndarray] = []
    for k in range(1, len(asked)):
        parts = (curves[:, :k], curves[:, k:])
        errors.append(sum(((p - p.mean(-1, keepdims=True)) ** 2).sum(-1) for p in parts))  # type: ignore[arg-type]
    best = np.argmin(np.stack(errors, -1), -1)
    return (asked[best] + asked[best + 1]) / 2


# --- what it saves -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saving:
    """What cutting one share of the neurons saves: shares of the dense model's, and speeds over its.

    Speeds are medians over rounds and cells, with their range: rounds are few, and no sample.
    """

    share: float
    cells: int
    parameters: float
    memory: float
    reads: Interval
    writes: Interval


def savings(cells: Mapping[str, xr.DataTree]) -> list[Saving]:
    """Along the ratios, over all orders and seeds: which neurons go makes no difference to the cost."""
    table: dict[float, list[tuple[float, xr.Dataset]]] = defaultdict(list)
    for cell in cells.values():
        told, cost = achieved(cell, "neurons"), cell.get("cost")
        if told and cost is not None and {"prefill_rate", "peak_bytes"} <= set(cost.data_vars):
            table[float(told["asked"])].append((float(told["cut"]), cost.to_dataset()))
    return [_saving(table[asked]) for asked in sorted(table)]


def _saving(group: Sequence[tuple[float, xr.Dataset]]) -> Saving:
    def over(name: str) -> np.ndarray:
        sides = [(c[name].sel(model="candidate"), c[name].sel(model="dense")) for _, c in group]
        return np.concatenate([np.atleast_1d((a / b).values) for a, b in sides])

    def span(name: str) -> Interval:
        values = over(name)
        return Interval(float(np.median(values)), float(values.min()), float(values.max()))

    return Saving(
        float(np.mean([cut for cut, _ in group])), len(group), float(over("parameters").mean()),
        float(over("peak_bytes").mean()), span("prefill_rate"), span("decode_rate"),
    )  # fmt: skip


# --- where they are ------------------------------------------------------------------------------


def share_by_layer(data: xr.Dataset, metric: str, top: float = 0.1) -> np.ndarray:
    """Share of each layer's neurons that are among the model's `top` most selective, `(layer,)`."""
    values = data.selectivity.sel(metric=metric).values
    known = np.isfinite(values)
    limit = np.quantile(values[known], 1 - top)
    with np.errstate(invalid="ignore"):
        return ((values >= limit) & known).sum(-1) / np.maximum(known.sum(-1), 1)
