"""Pruning against quantization, where something else is equal: bytes, damage, speed.

Cells of one kind are placed on a monotone curve of retention through the cells of the other, and the
difference is taken where both kinds have cells on either side. Equal KL is matched damage: if one step does
the same harm, is the same lost?
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from sklearn.isotonic import IsotonicRegression

from .correlation import weights
from .statistics import Interval, interval

AXES: dict[str, str] = {
    "compression": "equal bytes", "output_kl": "equal mean KL", "decode_speed": "equal decoding speed",
}  # fmt: skip
KINDS = ("pruning", "quantization")
CONTROLS = ("random", "neurons-random", "neurons-reverse", "neurons-salience-reverse")
"""Methods that nobody would compress a model with: left out of the comparison."""
FEWEST = 3  # cells of each kind
SPEEDUP = 1.05  # decoding that is really faster; below, speed says nothing
SHAPES: dict[str, str] = {
    "shape_kurtosis": "excess kurtosis of Δz over the vocabulary",
    "shape_common": "share of |Δz|² that is one shift of all tokens",
    "shape_along": "cosine of Δz with z, both without their mean",
    "shape_first": "share of Δz in its first direction",
    "shape_rank": "effective number of directions of Δz",
    "output_angular_h": "1 − cos of hidden states at the output",
    "output_angular_z": "1 − cos of logits at the output",
    "output_angular_p": "1 − cos of probabilities at the output",
    "step_kl": "KL of one decoding step",
    "forced_kl": "KL on the dense text",
}


@dataclass(frozen=True)
class Match:
    """Quantized less pruned retention at equal `axis`, over so many cells of each in the shared range."""

    axis: str
    outcome: str
    pruned: int
    quantized: int
    span: tuple[float, float]
    difference: Interval


def matches(study: xr.Dataset, outcome: str) -> list[Match]:
    """Every axis on which both kinds have enough cells in the range that they share."""
    return [m for axis in AXES if (m := match(study, axis, outcome)) is not None]


def match(study: xr.Dataset, axis: str, outcome: str) -> Match | None:
    """Mean difference at equal `axis`; None where the kinds do not share a range of it."""
    sides = _sides(study, axis, outcome)
    if sides is None:
        return None
    low = max(x.min() for x, _, _ in sides)
    high = min(x.max() for x, _, _ in sides)
    inside = [int(((x >= low) & (x <= high)).sum()) for x, _, _ in sides]
    if low >= high or min(inside) < FEWEST:
        return None
    value = _difference(sides, [np.ones(len(x)) for x, _, _ in sides], low, high)
    drawn = [np.concatenate(weights(labels, 300)) for _, _, labels in sides]
    draws = np.array(
        [_difference(sides, list(pair), low, high) for pair in zip(*drawn, strict=True)]
    )
    return Match(
        axis, outcome, inside[0], inside[1], (float(low), float(high)), interval(value, draws)
    )


def apart(study: xr.Dataset, outcome: str) -> dict[str, list[tuple[float, float, int]]]:
    """Every axis: lowest, highest and number of cells of each kind, where both kinds are in the study."""
    found: dict[str, list[tuple[float, float, int]]] = {}
    for axis in AXES:
        if axis in study and outcome in study and set(KINDS) <= set(study.kind.values.tolist()):
            sides = [_side(study, kind, axis, outcome)[0] for kind in KINDS]
            values = [np.exp(x) if axis == "output_kl" else x for x in sides]
            found[axis] = [
                (float(x.min(initial=np.inf)), float(x.max(initial=-np.inf)), len(x))
                for x in values
            ]
    return found


_Side = tuple[np.ndarray, np.ndarray, np.ndarray]


def _sides(study: xr.Dataset, axis: str, outcome: str) -> list[_Side] | None:
    """x, retention and model of the cells of each kind; None where one has too few."""
    if axis not in study or outcome not in study:
        return None
    found = [_side(study, kind, axis, outcome) for kind in KINDS]
    return found if min(len(x) for x, _, _ in found) >= FEWEST else None


def _side(study: xr.Dataset, kind: str, axis: str, outcome: str) -> _Side:
    """Of one kind, controls left out; x in log where it spans decades."""
    x, y = study[axis].values, study[outcome].values
    keep = (study.kind.values == kind) & ~np.isin(study.method.values, CONTROLS)
    keep &= np.isfinite(x) & np.isfinite(y)
    if axis == "output_kl":
        keep &= x > 0
    if axis == "decode_speed":
        keep &= x > SPEEDUP
    x = np.log(x[keep]) if axis == "output_kl" else x[keep]
    return x, y[keep], study.model.values[keep]


def _difference(sides: list[_Side], weight: list[np.ndarray], low: float, high: float) -> float:
    """Mean over the shared range of one kind's curve less the other's, cells weighed."""
    grid = np.linspace(low, high, 64)
    curves = []
    for (x, y, _), w in zip(sides, weight, strict=True):
        if not (w > 0).any():
            return float("nan")
        fitted = IsotonicRegression(increasing=False, out_of_bounds="clip")
        fitted.fit(x[w > 0], y[w > 0], sample_weight=w[w > 0])
        curves.append(fitted.predict(grid))
    return float((curves[1] - curves[0]).mean())


@dataclass(frozen=True)
class Shape:
    """One figure of each kind at the KL that both reach: medians, and the ratio of quantized to pruned
    (the difference for signed ones) at equal KL.
    """

    figure: str
    pruned: float
    quantized: float
    difference: Interval


def shapes(study: xr.Dataset) -> list[Shape]:
    """Every figure of `SHAPES`, by least squares on log KL within the shared range of KL."""
    found = [_shape(study, name) for name in SHAPES if name in study and "output_kl" in study]
    return [s for s in found if s is not None]


def _shape(study: xr.Dataset, name: str) -> Shape | None:
    sides = _sides(study, "output_kl", name)
    if sides is None:
        return None
    low, high = max(x.min() for x, _, _ in sides), min(x.max() for x, _, _ in sides)
    inside = [((x >= low) & (x <= high)) for x, _, _ in sides]
    if low >= high or min(i.sum() for i in inside) < FEWEST:
        return None
    parts = [(x[i], y[i], m[i]) for (x, y, m), i in zip(sides, inside, strict=True)]
    x = np.concatenate([p[0] for p in parts])
    y = np.concatenate([p[1] for p in parts])
    quantized = np.repeat([0.0, 1.0], [len(p[0]) for p in parts])
    design = np.stack([np.ones(len(x)), x, quantized], -1)
    drawn = np.concatenate(
        [np.concatenate(weights(p[2], 500)) for p in parts], axis=1
    )  # each kind drawn within itself
    value = _slope(design, y, np.ones(len(x)))
    draws = np.array([_slope(design, y, w) for w in drawn])
    return Shape(
        name, float(np.median(parts[0][1])), float(np.median(parts[1][1])), interval(value, draws)
    )


def _slope(design: np.ndarray, y: np.ndarray, weight: np.ndarray) -> float:
    """Coefficient of the last column, by weighted least squares."""
    root = np.sqrt(weight)
    solution, *_ = np.linalg.lstsq(design * root[:, None], y * root, rcond=None)
    return float(solution[-1])
