"""What training brought back: a recovered candidate beside what it was, and beside the dense model
trained alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from . import collapse
from .finding import Finding, achieved, claimed, group
from .hierarchy import prompt_means
from .statistics import Interval, bootstrap

FORMATS = {"choice": "multiple choice", "generation": "written answers", "last word": "last words"}
HISTORIES = ("step", "forced")


@dataclass(frozen=True)
class Pair:
    """Names of two cells of one study: a candidate, and the same after training."""

    before: str | None
    after: str
    told: dict[str, Any]


def pairs(cells: Mapping[str, xr.DataTree]) -> list[Pair]:
    """Every trained candidate with the cell of what it was; None where it is not in the study."""
    weights = {str(c.attrs.get("candidate_weights")): n for n, c in cells.items()}
    found: list[Pair] = []
    for name, cell in cells.items():
        told = achieved(cell, "recovered")
        if told:
            found.append(Pair(weights.get(str(told["from"])), name, told))
    return found


def is_control(pair: Pair, cells: Mapping[str, xr.DataTree]) -> bool:
    """Whether it is the dense model that was trained."""
    return str(pair.told["from"]) == str(cells[pair.after].attrs.get("weights"))


def tell(cells: Mapping[str, xr.DataTree]) -> list[Finding]:
    """What came back and what did not, for each trained candidate; what the training did by itself."""
    found: list[Finding] = []
    for pair in pairs(cells):
        after = cells[pair.after]
        if is_control(pair, cells):
            found += _control(pair, after)
        elif pair.before is not None:
            found += _scores(pair, cells[pair.before], after)
            found += _spaces(pair, cells[pair.before], after)
            found += _steps(pair, cells[pair.before], after)
    return found


def _how(pair: Pair) -> str:
    return f"{pair.told['method']}, {pair.told['trained']} steps"


def _scores(pair: Pair, before: xr.DataTree, after: xr.DataTree) -> list[Finding]:
    sides = [group(c, "scores") for c in (before, after)]
    if sides[0] is None or sides[1] is None:
        return []
    found: list[Finding] = []
    for format, words in FORMATS.items():
        gain = regained(sides[0], sides[1], format)
        if gain is None:
            continue
        was, now, change, n = gain
        verdict = (
            "brings back"
            if change.low > 0
            else "costs"
            if change.high < 0
            else "does not measurably change"
        )
        claim = (
            f"Training ({_how(pair)}) {verdict} {words}: retention {was:.2f} before, {now:.2f} after "
            f"({change.value:+.2f}, {change.low:+.2f} to {change.high:+.2f})."
        )
        found.append(
            claimed(
                claim,
                change,
                n,
                pair.after,
                "/scores, recovery",
                format=format,
                before=was,
                after=now,
            )
        )
    return found


def regained(
    before: xr.Dataset, after: xr.Dataset, format: str
) -> tuple[float, float, Interval, int] | None:
    """Mean retention over informative tasks before and after, and its paired change over items."""
    rows = [items for (_, f), items in collapse.informative(before).items() if f == format]
    if not rows:
        return None
    strata = np.concatenate([np.full(len(items), k) for k, items in enumerate(rows)])
    items = np.concatenate(rows)
    chance = before.chance.values[items].astype(float)
    was, now, dense = (
        data.score.sel(model=model).values[items].astype(float) - chance
        for data, model in ((before, "candidate"), (after, "candidate"), (before, "dense"))
    )

    def mean(values: np.ndarray, pick: np.ndarray) -> np.ndarray:
        kept = [
            (values[pick] * (strata[pick] == k)).sum(-1)
            / np.maximum((dense[pick] * (strata[pick] == k)).sum(-1), 1e-9)
            for k in range(len(rows))
        ]
        return np.mean(kept, axis=0)

    every = np.arange(len(was))
    change = bootstrap(lambda pick: mean(now, pick) - mean(was, pick), len(was), strata=strata)
    return float(mean(was, every)), float(mean(now, every)), change, len(was)


def _ratio(before: np.ndarray, after: np.ndarray) -> Interval:
    def ratio(pick: np.ndarray) -> np.ndarray:
        return after[pick].mean(-1) / np.maximum(before[pick].mean(-1), 1e-30)

    return bootstrap(ratio, len(before))


def _spaces(pair: Pair, before: xr.DataTree, after: xr.DataTree) -> list[Finding]:
    sides = [group(c, "output") for c in (before, after)]
    if sides[0] is None or sides[1] is None:
        return []
    values = {
        f"1 − cos {s}": [
            np.asarray(prompt_means(d.angular.sel(space=s))) for d in sides if d is not None
        ]
        for s in ("h", "z", "p")
    }
    values["KL"] = [np.asarray(prompt_means(d.kl)) for d in sides if d is not None]
    ratios = {name: _ratio(*both) for name, both in values.items()}
    told = ", ".join(
        f"{n} {both[0].mean():.3g} to {both[1].mean():.3g} (×{ratios[n].value:.2f}, {ratios[n].low:.2f} to "
        f"{ratios[n].high:.2f})"
        for n, both in values.items()
    )
    claim = f"Distance from the dense model at the output, before and after training ({_how(pair)}): {told}."
    return [
        claimed(
            claim, ratios["KL"], len(values["KL"][0]), pair.after, "/output, recovery",
            ratios={n: list(r) for n, r in ratios.items()},
        )
    ]  # fmt: skip


def _steps(pair: Pair, before: xr.DataTree, after: xr.DataTree) -> list[Finding]:
    sides = [group(c, "steps") for c in (before, after)]
    if sides[0] is None or sides[1] is None:
        return []
    ratios: dict[str, Interval] = {}
    for history in HISTORIES:
        means = [
            np.nanmean(d.kl.sel(history=history).values, axis=-1) for d in sides if d is not None
        ]
        if np.isfinite(means[0]).all() and np.isfinite(means[1]).all():
            ratios[history] = _ratio(*means)
    if not ratios:
        return []
    told = " and ".join(
        f"of the {n} pass to {r.value:.2f} ({r.low:.2f} to {r.high:.2f}) times what it was"
        for n, r in ratios.items()
    )
    claim = f"Training ({_how(pair)}) takes the KL {told}, step by step on the dense text."
    last = list(ratios.values())[-1]
    return [claimed(claim, last, int(sides[0].sizes["prompt"]), pair.after, "/steps, recovery")]


def _control(pair: Pair, after: xr.DataTree) -> list[Finding]:
    """What the same training does to the dense model: gains above it are no recovery."""
    scores = group(after, "scores")
    found: list[Finding] = []
    for format, words in FORMATS.items():
        if scores is None:
            break
        dense = scores.copy(deep=True)
        dense["score"] = xr.where(dense.model == "candidate", dense.score.sel(model="dense"), dense.score).transpose("item", "model")  # fmt: skip
        gain = regained(dense, scores, format)
        if gain is not None:
            _, now, change, n = gain
            claim = (
                f"Control: the dense model itself, trained alike ({_how(pair)}), has retention {now:.2f} of "
                f"{words} ({change.value:+.2f}, {change.low:+.2f} to {change.high:+.2f}): a gain here is the "
                "training's, not recovery."
            )
            found.append(claimed(claim, change, n, pair.after, "/scores, recovery", format=format))
    return found
