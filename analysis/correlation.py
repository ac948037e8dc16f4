"""Which figure goes with the collapse: correlations over the cells of a study.

Ranks are taken once over all cells; bootstrap draws reweight cells, so that everything is a product of
matrices. Where a study has several models, models are drawn and cells within them, and permutations
stay within a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from scipy import stats

from .statistics import SEED, Interval, holm, interval
from .summary import figures

OUTCOMES = ("retention_generation", "retention_choice")
DRAWS = 1000
PERMUTATIONS = 4999
FEWEST = 8  # cells that a correlation is worth anything over
BLOCK = 250  # draws at once: 10,000 cells need 20 MB a block


@dataclass(frozen=True)
class Link:
    """One figure and one outcome over cells.

    `given_amount` and `given_method` are Spearman's, of what is left of both when the amount of
    compression, or the method, has explained what it can. `p_value` is Spearman's by permutation,
    Holm-corrected over the figures.
    """

    figure: str
    space: str
    outcome: str
    n: int
    spearman: Interval
    pearson: Interval
    given_amount: Interval
    given_method: Interval
    p_value: float


def links(study: xr.Dataset, outcome: str) -> list[Link]:
    """Every figure of the study against an outcome, the strongest first.

    Args:
        study: from `open_study`.
        outcome: a variable of it, as `retention_generation`.

    Returns:
        Nothing where fewer than `FEWEST` cells have the outcome, or it is the same in all.
    """
    known = [n for n in figures() if n in study]
    data = _complete(study, [*known, "compression", outcome])
    names = [n for n in known if n in data and np.ptp(data[n].values) > 0]
    if data.sizes["cell"] < FEWEST or outcome not in data or not np.ptp(data[outcome].values) > 0:
        return []
    table = _Table(data, names, outcome)
    spans = table.intervals()
    p_values = holm(table.p_values())
    described = figures()
    made = [
        Link(
            name, described[name].space, outcome, data.sizes["cell"],
            spans["spearman"][i], spans["pearson"][i], spans["amount"][i], spans["method"][i],
            p_values[i],
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    return sorted(made, key=lambda link: -abs(link.spearman.value))


def _complete(study: xr.Dataset, names: list[str]) -> xr.Dataset:
    """The cells that have every figure which most cells have."""
    there = [n for n in names if n in study]
    return complete(study, [n for n in there if np.isfinite(study[n].values).mean() > 0.5])


def complete(study: xr.Dataset, names: Sequence[str]) -> xr.Dataset:
    """These variables of the cells that have them all."""
    keep = np.all([np.isfinite(study[n].values) for n in names], axis=0)
    return study[list(names)].isel(cell=np.flatnonzero(keep))


@dataclass(frozen=True)
class Contrast:
    """How much more closely one figure follows an outcome than another, in |Spearman|."""

    first: str
    second: str
    difference: Interval


def contrast(study: xr.Dataset, outcome: str, first: str, second: str) -> Contrast | None:
    """Two figures on the same cells and the same draws; None where they cannot be had."""
    names = [first, second]
    if any(n not in study for n in (*names, outcome)):
        return None
    data = complete(study, list(dict.fromkeys([*names, outcome])))
    if data.sizes["cell"] < FEWEST or any(
        not np.ptp(v.values) > 0 for v in data.data_vars.values()
    ):
        return None
    x, y = (
        _ranks(np.stack([data[n].values for n in names], -1)),
        _ranks(data[outcome].values[:, None]),
    )
    ones = np.ones((1, len(x)))
    value = np.abs(_pearson(ones, x, y))
    drawn = np.concatenate([np.abs(_pearson(w, x, y)) for w in weights(data.model.values)])
    return Contrast(
        first, second, interval(float(value[0, 0] - value[0, 1]), drawn[:, 0] - drawn[:, 1])
    )


# --- the sums behind it --------------------------------------------------------------------------


class _Table:
    """Values and ranks of all figures of the cells, and of the outcome."""

    def __init__(self, data: xr.Dataset, names: list[str], outcome: str) -> None:
        self.x = np.stack([_logged(data[n].values) for n in names], -1)
        self.y = data[outcome].values[:, None]
        self.ranks = _ranks(self.x), _ranks(self.y)
        amount = data["compression"].values if "compression" in data else np.zeros(len(self.x))
        self.amount = _ranks(amount[:, None])
        self.model = data.model.values
        self.method = np.unique(data.method.values, return_inverse=True)[1]

    def statistics(self, weight: np.ndarray) -> dict[str, np.ndarray]:
        """`(draw, figure)` of every kind, for weights `(draw, cell)`."""
        ranks, outcome = self.ranks
        spearman = _pearson(weight, ranks, outcome)
        with_amount = _pearson(weight, ranks, self.amount)
        of_amount = _pearson(weight, outcome, self.amount)
        return {
            "spearman": spearman,
            "pearson": _pearson(weight, self.x, self.y),
            "amount": _partial(spearman, with_amount, of_amount),
            "method": _within(weight, ranks, outcome, self.method),
        }

    def intervals(self) -> dict[str, list[Interval]]:
        """Every kind's value with its 95 % bootstrap interval, figure by figure."""
        whole = self.statistics(np.ones((1, len(self.x))))
        parts = [self.statistics(w) for w in weights(self.model)]
        return {
            kind: [
                interval(float(values[0, i]), np.concatenate([p[kind][:, i] for p in parts]))
                for i in range(values.shape[1])
            ]
            for kind, values in whole.items()
        }

    def p_values(self) -> list[float]:
        """Two-sided, of Spearman's, by permuting the outcome among the cells of each model."""
        rng = np.random.default_rng(SEED)
        x, y = (_standard(_by_model(r, self.model)) for r in self.ranks)
        seen = np.abs(x.T @ y[:, 0])
        beyond = np.zeros(x.shape[1])
        for start in range(0, PERMUTATIONS, BLOCK):
            count = min(BLOCK, PERMUTATIONS - start)
            beyond += (np.abs(_permuted(y[:, 0], self.model, count, rng) @ x) >= seen - 1e-12).sum(
                0
            )
        return [float(p) for p in (1 + beyond) / (1 + PERMUTATIONS)]


def weights(model: np.ndarray, draws: int = DRAWS) -> list[np.ndarray]:
    """How often each cell is in each bootstrap sample, in blocks `(draw, cell)`.

    Of several models, models are drawn with replacement, and cells within each as often as the model is.
    """
    rng = np.random.default_rng(SEED)
    members = [np.flatnonzero(model == m) for m in np.unique(model)]
    found: list[np.ndarray] = []
    for start in range(0, draws, BLOCK):
        count = min(BLOCK, draws - start)
        block = np.zeros((count, len(model)))
        turns = np.ones((count, len(members)), int)
        if len(members) > 1:
            turns = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), count)
        for k, cells in enumerate(members):
            times = turns[:, k] * len(cells)
            block[:, cells] = rng.multinomial(times, np.full(len(cells), 1 / len(cells)))
        found.append(block)
    return found


def _logged(values: np.ndarray) -> np.ndarray:
    """Shifts span decades: Pearson's is of their logarithms, zeros at half the smallest."""
    least = values[values > 0].min(initial=np.inf)
    if not np.isfinite(least) or (values < 0).any():
        return values
    return np.log(np.maximum(values, least / 2))


def _ranks(values: np.ndarray) -> np.ndarray:
    return stats.rankdata(values, axis=0)


def _standard(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean(0)
    return centred / np.maximum(np.sqrt((centred**2).sum(0)), 1e-12)


def _by_model(values: np.ndarray, model: np.ndarray) -> np.ndarray:
    """Less each model's mean where there are several: what permutations within a model leave alone."""
    result = values.astype(float).copy()
    for m in np.unique(model):
        result[model == m] -= result[model == m].mean(0)
    return result


def _permuted(y: np.ndarray, model: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    result = np.tile(y, (count, 1))
    for m in np.unique(model):
        cells = np.flatnonzero(model == m)
        result[:, cells] = rng.permuted(result[:, cells], axis=1)
    return result


def _pearson(weight: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Weighted correlations `(draw, figure)` of `x (cell, figure)` with `y (cell, 1)`."""
    x, y = x - x.mean(0), y - y.mean(0)
    total = weight.sum(1, keepdims=True)
    mx, my = weight @ x / total, weight @ y / total
    covariance = weight @ (x * y) / total - mx * my
    return _ratio(covariance, weight @ x**2 / total - mx**2, weight @ y**2 / total - my**2)


def _within(weight: np.ndarray, x: np.ndarray, y: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The same of what is left when each label's weighted mean is taken away."""
    x, y = x - x.mean(0), y - y.mean(0)
    sums = [weight @ (x * y), weight @ x**2, weight @ y**2]
    for k in np.unique(label):
        cells = label == k
        w = weight[:, cells]
        total = np.maximum(w.sum(1, keepdims=True), 1e-12)
        sx, sy = w @ x[cells], w @ y[cells]
        for part, (a, b) in zip(sums, ((sx, sy), (sx, sx), (sy, sy)), strict=True):
            part -= a * b / total
    return _ratio(*sums)


def _ratio(covariance: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    scale = np.sqrt(np.maximum(first, 0) * np.maximum(second, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(scale > 1e-9, np.clip(covariance / scale, -1, 1), np.nan)


def _partial(xy: np.ndarray, xa: np.ndarray, ya: np.ndarray) -> np.ndarray:
    """Partial correlation from the three plain ones."""
    ya = np.nan_to_num(ya)
    xa = np.nan_to_num(xa)
    scale = np.sqrt(np.maximum(1 - xa**2, 0) * np.maximum(1 - ya**2, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(scale > 1e-9, np.clip((xy - xa * ya) / scale, -1, 1), np.nan)
