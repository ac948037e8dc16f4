"""Where the damage is caused: what comes back when one model's part is put into the other.

Damage D of a model is its mean KL, its flips, or the log-probability that its answers have lost,
summed over prompts. Of the candidate's damage,

* a dense stream written in after a layer recovers 1 - D(patched)/D(candidate);
* a sublayer alone in the dense model (noise) causes D(noise)/D(candidate);
* a sublayer made dense in the candidate (denoise) recovers 1 - D(denoise)/D(candidate).

The last two differ where sublayers interact; their mean ranks. Prompts are the independent units.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import xarray as xr

from .statistics import Interval, bootstrap

FIGURES = {
    "log_p": "lost log-probability of the answers",
    "kl": "KL at the output",
    "flip": "changed predictions",
}
HALF = 0.5


@dataclass(frozen=True)
class Cause:
    """What one sublayer does, as shares of the damage: alone, missing, and the mean of both."""

    layer: int
    site: str
    noise: Interval
    denoise: Interval
    share: Interval


@dataclass(frozen=True)
class Run:
    """Layers `first` to `last`, after which the dense stream recovers `share` more than before them."""

    first: int
    last: int
    share: Interval


def damage(patches: xr.Dataset, figure: str, prefix: str = "") -> np.ndarray:
    """D of each prompt, `(prompt, …)` with the dimensions of the patched model's figure."""
    values = patches[prefix + figure].transpose("prompt", ...).values.astype(float)
    if figure != "log_p":
        return values
    dense = patches.log_p_dense.values.astype(float)
    return dense.reshape(-1, *[1] * (values.ndim - 1)) - values


def measurable(patches: xr.Dataset) -> list[str]:
    """The figures of which the candidate has surely lost something, the most telling first."""
    found: list[str] = []
    for figure in FIGURES:
        own = damage(patches, figure)
        if len(own) > 1 and bootstrap(lambda pick, own=own: own[pick].mean(-1), len(own)).low > 0:
            found.append(figure)
    return found


def _share(patches: xr.Dataset, figure: str, part: np.ndarray, recovered: bool) -> Interval:
    """Sum of one damage over that of the candidate, or 1 minus it, over resampled prompts."""
    own = damage(patches, figure)

    def ratio(pick: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            share = part[pick].sum(-1) / own[pick].sum(-1)
        return 1 - share if recovered else share

    return bootstrap(ratio, len(own))


def _swapped(patches: xr.Dataset, figure: str) -> dict[str, np.ndarray]:
    """Damage alone (`noise`), damage left (`denoise`), and the mean of what both blame (`both`).

    `(prompt, layer, site)` each.
    """
    values, own = damage(patches, figure, "swap_"), damage(patches, figure)
    found = {str(name): values[..., i] for i, name in enumerate(patches.swap.values)}
    return found | {"both": (found["noise"] + own[:, None, None] - found["denoise"]) / 2}


def ranking(patches: xr.Dataset, figure: str) -> list[Cause]:
    """The changed sublayers, those that cause most first."""
    swapped = _swapped(patches, figure)
    found = [
        Cause(
            int(patches.layer.values[layer]), str(patches.site.values[site]),
            _share(patches, figure, swapped["noise"][:, layer, site], recovered=False),
            _share(patches, figure, swapped["denoise"][:, layer, site], recovered=True),
            _share(patches, figure, swapped["both"][:, layer, site], recovered=False),
        )
        for layer, site in np.argwhere(patches.changed.values != 0)
    ]  # fmt: skip
    return sorted(found, key=lambda cause: -cause.share.value)


def ahead(patches: xr.Dataset, figure: str, one: Cause, two: Cause) -> Interval:
    """By how much one sublayer's share exceeds another's, paired over prompts."""
    both = _swapped(patches, figure)["both"]
    sites, layers = patches.site.values.tolist(), patches.layer.values.tolist()
    parts = [both[:, layers.index(c.layer), sites.index(c.site)] for c in (one, two)]
    return _share(patches, figure, parts[0] - parts[1], recovered=False)


def by_depth(patches: xr.Dataset, figure: str) -> dict[str, list[Interval]]:
    """What the dense stream recovers, written in after each layer; one list for each span."""
    values = damage(patches, figure, "depth_")
    return {
        str(span): [
            _share(patches, figure, values[:, layer, s], recovered=True)
            for layer in range(values.shape[1])
        ]
        for s, span in enumerate(patches.span.values)
        if np.isfinite(values[..., s]).all()
    }


def culprits(patches: xr.Dataset, figure: str, least: float = HALF) -> Run:
    """The shortest run of layers over which the recovered share rises by at least `least`.

    The run is chosen on the prompts of which its share is then given: the share of a chosen run is
    no better than that.
    """
    values = damage(patches, figure, "depth_")[:, :, list(patches.span.values).index("all")]
    curve = np.concatenate(
        [damage(patches, figure)[:, None], values], axis=1
    )  # (prompt, layer + 1)
    total = curve.sum(0)
    recovered = 1 - total / total[0]
    lengths = range(1, len(total))
    rises = {n: recovered[n:] - recovered[:-n] for n in lengths}
    length = next((n for n in lengths if rises[n].max() >= least), lengths[-1])
    first = int(rises[length].argmax())
    drop = curve[:, first] - curve[:, first + length]
    return Run(first, first + length - 1, _share(patches, figure, drop, recovered=False))


def interaction(patches: xr.Dataset, figure: str) -> Interval:
    """Sum of what the sublayers cause alone: 1 where damage adds up.

    Below it, only the combination does the rest; above it, sublayers do the same damage twice.
    """
    noise = _swapped(patches, figure)["noise"]
    return _share(patches, figure, noise.reshape(len(noise), -1).sum(-1), recovered=False)


def by_part(patches: xr.Dataset, figure: str = "kl") -> dict[str, tuple[Interval, Interval]]:
    """For each part of the change: the damage that it does alone, and its share of the change."""
    values, size = damage(patches, figure, "part_"), patches.part_share.values.astype(float)
    found: dict[str, tuple[Interval, Interval]] = {}
    for i, part in enumerate(patches.part.values):
        mean: Callable[[np.ndarray], np.ndarray] = lambda pick, i=i: np.nanmean(size[pick, i], -1)  # noqa: E731
        found[str(part)] = (
            _share(patches, figure, values[:, i], recovered=False), bootstrap(mean, len(size))
        )  # fmt: skip
    return found


def mean(values: np.ndarray) -> Interval:
    """Mean over prompts, with its interval."""
    return bootstrap(lambda pick: values[pick].mean(-1), len(values))


def remembered(memory: xr.Dataset, cut: int, other: int) -> Interval:
    """KL of the steps with `cut` layers that remember the dense way over that with `other`."""
    kl = memory.kl.transpose("prompt", "cut").values.astype(float)

    def ratio(pick: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return kl[pick, cut].sum(-1) / kl[pick, other].sum(-1)

    return bootstrap(ratio, len(kl))


@dataclass(frozen=True)
class Repair:
    """How much of the lost score comes back with some sublayers given back, chosen one way."""

    arm: str
    places: tuple[str, ...]
    recipe: str
    score: float
    returned: Interval
    beyond_lot: Interval


def repaired(repairs: xr.Dataset) -> list[Repair]:
    """Every choice: share of the lost score that returns, and by how much the lot is exceeded.

    Items are resampled within their task, the same items under every choice.
    """
    score = {str(a): repairs.score.sel(arm=a).values.astype(float) for a in repairs.arm.values}
    lost, strata = score["all"] - score["none"], repairs.task.values
    recipes, places = (json.loads(repairs.attrs[n]) for n in ("recipes", "places"))

    def share(part: np.ndarray) -> Interval:
        def ratio(pick: np.ndarray) -> np.ndarray:
            below = lost[pick].sum(-1)
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.where(below > 0, part[pick].sum(-1) / below, np.nan)

        return bootstrap(ratio, len(lost), strata=strata)

    return [
        Repair(
            arm, tuple(places[arm]), recipes[arm], float(score[arm].mean()),
            share(score[arm] - score["none"]), share(score[arm] - score["random"]),
        )
        for arm in score if arm not in ("none", "all")
    ]  # fmt: skip
