"""Choosing what to drop: the same number of the same sublayers, ranked by different figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from . import collapse, schema
from .neurons import flipped
from .places import place
from .statistics import DRAWS, SEED, Interval, holm, interval, resamples

BASELINE = "cosine"


@dataclass(frozen=True)
class Ranked:
    """Retention of generation when sublayers are ranked by `ranking`, less that when by cosine.

    Over `settings` (a model, a method, a number of sublayers each), the same items in all; `p_value` by
    flipping the signs of items, Holm-corrected over the rankings. `wins` counts the settings that it is
    ahead in, `same` those in which it drops what cosine drops or ends alike.
    """

    ranking: str
    settings: int
    wins: int
    same: int
    items: int
    difference: Interval
    p_value: float


def rankings(study: xr.Dataset, format: str = "generation") -> list[Ranked]:
    """Every ranking of the study against cosine, best first.

    Args:
        study: from `open_study`; the items' scores are read from its cells' files.
        format: whose retention counts.
    """
    rivals = _rivals(study)
    rows = [_against(ranking, pairs, format) for ranking, pairs in rivals.items()]
    found = [row for row in rows if row is not None]
    adjusted = holm([row.p_value for row in found])
    made = [replace(row, p_value=p) for row, p in zip(found, adjusted, strict=True)]
    return sorted(made, key=lambda row: -row.difference.value)


_Pair = tuple[str, str, str]  # the model, the file ranked by cosine, the other one


def _rivals(study: xr.Dataset) -> dict[str, list[_Pair]]:
    """Ranking -> the settings in which cosine was tried as well."""
    places: dict[tuple[str, str, int], dict[str, str]] = defaultdict(dict)
    rows = zip(
        study.model.values, study.method.values, study["count"].values, study.ranking.values,
        study.file.values, strict=True,
    )  # fmt: skip
    for model, method, count, ranking, file in rows:
        if ranking:
            places[str(model), str(method), int(count)][str(ranking)] = str(file)
    found: dict[str, list[_Pair]] = defaultdict(list)
    for (model, _, _), files in places.items():
        for ranking, file in files.items():
            if ranking != BASELINE and BASELINE in files:
                found[ranking].append((model, files[BASELINE], file))
    return dict(found)


def _against(ranking: str, pairs: Sequence[_Pair], format: str) -> Ranked | None:
    """Items are drawn within their task, the same draw for all settings of a model."""
    gains: dict[str, list[np.ndarray]] = defaultdict(list)
    tasks: dict[str, list[np.ndarray]] = {}
    wins = same = 0
    for model, cosine, other in pairs:
        sides = [schema.read_group(place(file), "scores") for file in (cosine, other)]
        items = [i for (_, f), i in collapse.informative(sides[0]).items() if f == format]
        if not items:
            continue
        scores = [s.score.sel(model="candidate").values.astype(float) for s in sides]
        gain = _weighted(sides[0], scores[1] - scores[0], items)
        gains[model].append(gain)
        tasks[model] = items
        wins, same = wins + int(gain.sum() > 0), same + int(gain.sum() == 0)
    count = sum(map(len, gains.values()))
    if not count:
        return None
    means = {model: np.sum(parts, axis=0) / count for model, parts in gains.items()}
    drawn = sum(_drawn(means[model], tasks[model]) for model in means)
    each = np.concatenate([m[np.concatenate(tasks[model])] for model, m in means.items()])
    return Ranked(
        ranking,
        count,
        wins,
        same,
        len(each),
        interval(float(each.sum()), np.asarray(drawn)),
        flipped(each),
    )


def _weighted(scores: xr.Dataset, gain: np.ndarray, items: Sequence[np.ndarray]) -> np.ndarray:
    """Each item's share in the difference of mean retention over tasks, `(item,)`."""
    result = np.zeros(len(gain))
    dense = scores.score.sel(model="dense").values.astype(float) - scores.chance.values.astype(
        float
    )
    for group in items:
        result[group] = gain[group] / dense[group].sum() / len(items)
    return result


def _drawn(gain: np.ndarray, items: Sequence[np.ndarray]) -> np.ndarray:
    """Bootstrap draws `(draw,)` of the sum, items drawn within their task."""
    total = np.zeros(DRAWS)
    for k, group in enumerate(items):
        total += gain[group][resamples(np.zeros(len(group)), DRAWS, SEED + k)].sum(-1)
    return total
