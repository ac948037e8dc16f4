"""Perplexity and KL of running text, under the names that users know from llama.cpp's KL tool."""

from __future__ import annotations

import numpy as np
import xarray as xr

from .statistics import Interval, bootstrap

PERCENTILES = (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0)
NAMES = {
    "Mean PPL(Q)": "perplexity of the candidate",
    "Mean PPL(base)": "perplexity of the dense model",
    "Mean PPL(Q)/PPL(base)": "ratio of the two, on the same tokens",
    "Mean KLD": "mean KL(p || p')",
    "Mean Δp": "mean change of the probability of the token that stands there",
    "RMS Δp": "root of the mean square of that change",
    "Same top p": "share of tokens with the same most likely token",
}


def figures(data: xr.Dataset, task: str) -> dict[str, Interval]:
    """Means with 95 % bootstrap intervals over windows, dense and candidate paired by token.

    Δp and shares are fractions, KLD is in nat. Percentiles are in `percentiles`.
    """
    part = data.isel(token=data.task.values == task)
    log_p = part.log_p.values.astype(float)
    dense, candidate = log_p[:, 0], log_p[:, 1]
    change = np.exp(candidate) - np.exp(dense)
    columns = np.stack(
        [-candidate, -dense, part.kl.values, change, change**2, 1 - part.flip.values], axis=-1
    )
    windows = np.unique(part.window.values, return_inverse=True)[1]
    sums = np.zeros((windows.max() + 1, columns.shape[1]))
    np.add.at(sums, windows, columns)
    sizes = np.bincount(windows).astype(float)

    def mean(pick: np.ndarray) -> np.ndarray:
        return sums[pick].sum(-2) / sizes[pick].sum(-1)[..., None]

    made = {
        "Mean PPL(Q)": lambda m: np.exp(m[..., 0]),
        "Mean PPL(base)": lambda m: np.exp(m[..., 1]),
        "Mean PPL(Q)/PPL(base)": lambda m: np.exp(m[..., 0] - m[..., 1]),
        "Mean KLD": lambda m: m[..., 2],
        "Mean Δp": lambda m: m[..., 3],
        "RMS Δp": lambda m: np.sqrt(m[..., 4]),
        "Same top p": lambda m: m[..., 5],
    }
    return {
        name: bootstrap(lambda pick, take=take: take(mean(pick)), len(sizes))
        for name, take in made.items()
    }


def percentiles(data: xr.Dataset, task: str) -> dict[str, float]:
    """Extremes and percentiles of KLD and Δp over the tokens of a text."""
    part = data.isel(token=data.task.values == task)
    change = np.diff(np.exp(part.log_p.values.astype(float)), axis=-1)[:, 0]
    found: dict[str, float] = {}
    for name, values in (("KLD", part.kl.values.astype(float)), ("Δp", change)):
        found[f"Maximum {name}"] = float(values.max())
        for q in PERCENTILES:
            label = "Median" if q == 50.0 else f"{q:.1f}%"
            found[f"{label} {name}"] = float(np.percentile(values, q))
        found[f"Minimum {name}"] = float(values.min())
    return found


def correlation(data: xr.Dataset, task: str) -> float:
    """Cor(ln(PPL(Q)), ln(PPL(base))): of the log-probabilities over the tokens."""
    part = data.isel(token=data.task.values == task)
    return float(np.corrcoef(part.log_p.values.astype(float).T)[0, 1])
