"""How a perturbation travels: hidden states h, logits z, probabilities p, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from .statistics import Interval, bootstrap, resamples

STEPS = (("h", "z"), ("z", "p"))


@dataclass(frozen=True)
class Amplification:
    """Mean 1 - cos of one space over that of the one before it; below 1 absorbed, above magnified."""

    source: str
    target: str
    factor: Interval
    prompts: int


def prompt_means(values: xr.DataArray) -> xr.DataArray:
    """Mean over the tokens of each prompt, in float64; prompts are the independent units."""
    return values.astype("float64").mean("token", skipna=True)


def amplification(angular: xr.DataArray) -> list[Amplification]:
    """h->z and z->p from `angular` with dims `prompt, token, space`, intervals over prompts.

    A ratio of means: positions where a shift is tiny in both spaces do not dominate it.
    """
    means = prompt_means(angular)
    result: list[Amplification] = []
    for source, target in STEPS:
        below, above = (means.sel(space=s).values for s in (source, target))

        def ratio(
            pick: np.ndarray, below: np.ndarray = below, above: np.ndarray = above
        ) -> np.ndarray:
            with np.errstate(divide="ignore", invalid="ignore"):
                return above[pick].sum(-1) / below[pick].sum(-1)

        result.append(Amplification(source, target, bootstrap(ratio, len(below)), len(below)))
    return result


def by_layer(values: xr.DataArray) -> xr.Dataset:
    """Mean over positions per layer (and every other dim), with 95 % intervals over prompts.

    Takes dims `prompt, token, …`; returns `mean`, `low`, `high` with the rest.
    """
    means = prompt_means(values).transpose("prompt", ...)
    rest = means.values.reshape(means.sizes["prompt"], -1)
    picks = resamples(np.zeros(len(rest), np.int64), draws=500)
    draws = rest[picks].mean(1)
    low, high = np.nanquantile(draws, [0.025, 0.975], axis=0)
    like = means.isel(prompt=0, drop=True)
    parts = {"mean": rest.mean(0), "low": low, "high": high}
    return xr.Dataset({n: like.copy(data=v.reshape(like.shape)) for n, v in parts.items()})


def amplification_by_layer(angular: xr.DataArray) -> xr.Dataset:
    """`amplification` at every layer and site: `mean`, `low`, `high` over dims `step, layer, site, …`.

    Takes dims `prompt, token, space, layer, site, …`; a ratio of means over prompts, with 95 %
    intervals; NaN where nothing shifts.
    """
    means = prompt_means(angular).transpose("prompt", "space", ...)
    picks = resamples(np.zeros(means.sizes["prompt"], np.int64), draws=500)
    values = means.values
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = values[picks].mean(1)
        ratios = [_step_ratio(x, means) for x in (values.mean(0)[None], draws)]
        low, high = _quantiles(ratios[1])
    like = means.isel(prompt=0, drop=True).isel(space=slice(0, len(STEPS))).rename(space="step")
    like = like.assign_coords(step=[f"{source}->{target}" for source, target in STEPS])
    parts = {"mean": ratios[0][0], "low": low, "high": high}
    return xr.Dataset({name: like.copy(data=value) for name, value in parts.items()})


def _step_ratio(x: np.ndarray, like: xr.DataArray) -> np.ndarray:
    """`(draw, space, …)` -> `(draw, step, …)`."""
    places = {str(s): i for i, s in enumerate(like.space.values)}
    ratio = np.stack([x[:, places[above]] / x[:, places[below]] for below, above in STEPS], axis=1)
    return np.where(np.isfinite(ratio), ratio, np.nan)


def _quantiles(draws: np.ndarray) -> np.ndarray:
    """2.5 % and 97.5 % of each place, NaN where a place has no draw."""
    empty = np.isnan(draws).all(0)
    found = np.nanquantile(np.where(empty, 0.0, draws), [0.025, 0.975], axis=0)
    return np.where(empty, np.nan, found)


@dataclass(frozen=True)
class Rise:
    """The sublayer at which a mean grows most, and the share of resamples that name the same one."""

    layer: int
    site: str
    size: Interval
    share: float
    prompts: int


def steepest(kl: xr.DataArray) -> Rise:
    """Where mean KL rises most from one site to the next, over `prompt, token, layer, site`.

    The place is chosen by the data, so its interval is that of the chosen place; `share` says how
    far the choice itself can be trusted.
    """
    means = prompt_means(kl).transpose("prompt", "layer", "site")
    curves = means.values.reshape(means.sizes["prompt"], -1)
    rises = np.diff(curves, axis=1, prepend=0.0)
    place = int(rises.mean(0).argmax())
    size = bootstrap(lambda pick: rises[pick, place].mean(-1), len(rises))
    picks = resamples(np.zeros(len(rises), np.int64))
    named = np.array([rises[pick].mean(0).argmax() for pick in picks])
    sites = means.site.values.tolist()
    return Rise(
        place // len(sites),
        str(sites[place % len(sites)]),
        size,
        float((named == place).mean()),
        len(rises),
    )
