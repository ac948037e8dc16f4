"""Forecast: what a candidate keeps, from one forward pass, by what a study's cells kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from .collapse import COLLAPSED
from .correlation import complete, weights
from .statistics import Interval, interval

FEATURES = (
    "output_kl", "output_angular_h", "output_angular_z", "output_angular_p", "output_var_p",
    "output_flip",
)  # fmt: skip
"""Figures that one pass of both models over the prompts gives."""

MODELS = ("amount", "kl", "logistic")
"""`amount`: monotone in the amount of compression, the baseline. `kl`: monotone in log KL at the
output. `logistic`: in the logarithms of all `FEATURES`."""

COVER = 0.9  # of the interval around a forecast
FEWEST = 12  # cells, of at least three methods, that a forecast is learned from
SMALLEST = 1e-9


class ForecastError(ValueError):
    """A forecast that cannot be made; the message says why."""


@dataclass(frozen=True)
class Trial:
    """How well one model forecasts cells of a method, or a model, that it has not seen.

    `error` is the mean absolute error of retention; `gain` how much smaller it is than the
    baseline's on the same cells; `accuracy` the balanced accuracy of "collapsed or not" (NaN where
    fewer than two cells are either).
    """

    model: str
    left_out: str
    n: int
    error: Interval
    gain: Interval
    accuracy: float
    predicted: np.ndarray
    observed: np.ndarray


def usable(study: xr.Dataset, outcome: str) -> xr.Dataset:
    """The cells that have the features and the outcome, retention kept between 0 and 1.

    Raises:
        ForecastError: too few cells or methods.
    """
    names = [*FEATURES, "compression", outcome]
    if missing := [n for n in names if n not in study]:
        raise ForecastError(f"the study has no {', '.join(missing)}")
    data = complete(study, names)
    methods = len(np.unique(data.method.values))
    if data.sizes["cell"] < FEWEST or methods < 3:
        raise ForecastError(
            f"a forecast is learned from at least {FEWEST} cells of three methods, and the study has "
            f"{data.sizes['cell']} of {methods}"
        )
    data[outcome] = data[outcome].clip(0, 1)
    return data


def trials(study: xr.Dataset, outcome: str) -> list[Trial]:
    """Every model on methods left out, and on models left out where there are several."""
    data = usable(study, outcome)
    groups = {"method": data.method.values}
    if len(np.unique(data.model.values)) > 1:
        groups["model"] = data.model.values
    return [
        trial for name, labels in groups.items() for trial in _trials(data, outcome, name, labels)
    ]


def _trials(data: xr.Dataset, outcome: str, left_out: str, labels: np.ndarray) -> list[Trial]:
    observed = data[outcome].values
    predicted = {model: _held_out(data, outcome, model, labels) for model in MODELS}
    errors = {model: np.abs(p - observed) for model, p in predicted.items()}
    drawn = np.concatenate(weights(labels))
    return [
        Trial(
            model, left_out, len(observed), _mean(errors[model], drawn),
            _mean(errors["amount"] - errors[model], drawn), _accuracy(predicted[model], observed),
            predicted[model], observed,
        )
        for model in MODELS
    ]  # fmt: skip


def _mean(values: np.ndarray, weight: np.ndarray) -> Interval:
    total = weight.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return interval(float(values.mean()), weight @ values / total)


def _accuracy(predicted: np.ndarray, observed: np.ndarray) -> float:
    collapsed = observed <= COLLAPSED
    if min(collapsed.sum(), (~collapsed).sum()) < 2:
        return float("nan")
    return float(balanced_accuracy_score(collapsed, predicted <= COLLAPSED))


def _held_out(data: xr.Dataset, outcome: str, model: str, labels: np.ndarray) -> np.ndarray:
    result = np.full(data.sizes["cell"], np.nan)
    for label in np.unique(labels):
        mine = labels == label
        fitted = fit(data.isel(cell=np.flatnonzero(~mine)), outcome, model)
        result[mine] = fitted(inputs(data.isel(cell=np.flatnonzero(mine)), model))
    return result


# --- the models ----------------------------------------------------------------------------------


def inputs(data: xr.Dataset | Mapping[str, Any], model: str) -> np.ndarray:
    """What a model sees of cells: `(cell, feature)`."""
    if model == "amount":
        return np.atleast_1d(np.asarray(data["compression"], float))[:, None]
    names = FEATURES if model == "logistic" else ("output_kl",)
    columns = [np.atleast_1d(np.asarray(data[n], float)) for n in names]
    return np.log(np.maximum(np.stack(columns, -1), SMALLEST))


def fit(data: xr.Dataset, outcome: str, model: str) -> Any:
    """A function from inputs `(cell, feature)` to retention `(cell,)`, learned from cells."""
    x, y = inputs(data, model), data[outcome].values
    if model == "logistic":
        return _logistic(x, y)
    monotone = IsotonicRegression(y_min=0, y_max=1, increasing=False, out_of_bounds="clip")
    monotone.fit(x[:, 0], y)
    return lambda new: monotone.predict(new[:, 0])


def _logistic(x: np.ndarray, y: np.ndarray) -> Any:
    """Retention as a share: every cell is in both classes, weighed by what it kept and lost."""
    mean, spread = x.mean(0), np.maximum(x.std(0), 1e-9)
    scaled = (x - mean) / spread
    model = LogisticRegression(C=1.0, max_iter=1000)
    both = np.concatenate([np.ones(len(y)), np.zeros(len(y))])
    model.fit(np.concatenate([scaled, scaled]), both, np.maximum(np.concatenate([y, 1 - y]), 1e-6))
    return lambda new: model.predict_proba((new - mean) / spread)[:, 1]


# --- one candidate -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """Retention that a candidate is expected to have, with an interval that held `COVER` of the cells of
    methods left out; `distance` to the nearest cell of the study, in units of what is `allowed`.
    """

    outcome: str
    model: str
    retention: Interval
    distance: float
    n: int
    covered: bool


def forecast(study: xr.Dataset, candidate: Mapping[str, float], outcome: str) -> Forecast:
    """What a candidate that was never scored keeps.

    Args:
        study: from `open_study`.
        candidate: `FEATURES` of it, by name (as `summarise` tells them).
        outcome: as `retention_generation`.

    Returns:
        The forecast of whichever of `kl` and `logistic` errs less on methods left out. `covered` is
        False where the candidate is further from every cell than cells of one method are from
        all others: the study says nothing about it, and `retention` is NaN.

    Raises:
        ForecastError: the study is too small, or the candidate has no features.
    """
    if missing := [n for n in FEATURES if not np.isfinite(candidate.get(n, np.nan))]:
        raise ForecastError(f"the candidate has no {', '.join(missing)}")
    data = usable(study, outcome)
    best = min(
        (t for t in trials(study, outcome) if t.model != "amount" and t.left_out == "method"),
        key=lambda t: t.error.value,
    )
    distance = _distance(data, candidate)
    nothing = Interval(float("nan"), float("nan"), float("nan"))
    if distance > 1:
        return Forecast(outcome, best.model, nothing, distance, best.n, False)
    value = float(fit(data, outcome, best.model)(inputs(candidate, best.model))[0])
    wide = _width(np.abs(best.predicted - best.observed))
    span = Interval(value, max(0.0, value - wide), min(1.0, value + wide))
    return Forecast(outcome, best.model, span, distance, best.n, True)


def _width(residuals: np.ndarray) -> float:
    """Half the width that holds `COVER` of new cells, by the residuals of held-out ones."""
    rank = min(len(residuals), int(np.ceil((len(residuals) + 1) * COVER)))
    return float(np.sort(residuals)[rank - 1])


def _distance(data: xr.Dataset, candidate: Mapping[str, float]) -> float:
    """To the nearest cell, over the distance that cells of a method have to those of all others."""
    x, new = inputs(data, "logistic"), inputs(candidate, "logistic")
    spread = np.maximum(x.std(0), 1e-9)
    x, new = x / spread, new / spread
    apart = np.linalg.norm(x[:, None] - x[None], axis=-1)
    labels = data.method.values
    apart[labels[:, None] == labels[None]] = np.inf
    allowed = float(np.quantile(apart.min(1), 0.95))
    return float(np.linalg.norm(x - new, axis=-1).min() / max(allowed, 1e-9))
