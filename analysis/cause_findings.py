"""Findings about causes, in words: see `causes` for the numbers."""

from __future__ import annotations

import numpy as np
import xarray as xr

from . import causes
from .finding import Finding, claimed
from .statistics import Interval

NAMES = {"attn": "attention", "mlp": "MLP"}
NAMED = 3  # sublayers named in a sentence


def tell(
    name: str, patches: xr.Dataset | None, memory: xr.Dataset | None, repairs: xr.Dataset | None
) -> list[Finding]:
    """What the patched models of one cell say; nothing of what was not measured."""
    told: list[Finding | None] = []
    if patches is not None and patches.changed.values.any():
        figures = causes.measurable(patches)
        if not figures:
            return [_nothing(name, patches)]
        figure = figures[0]
        told += [_depth(name, patches, figure), _ranking(name, patches, figure)]
        told += [_interaction(name, patches, figure), *_parts(name, patches)]
    told += [] if memory is None else [_memory(name, memory)]
    told += [] if repairs is None else [_repair(name, repairs)]
    return [finding for finding in told if finding is not None]


def place(layer: int, site: str) -> str:
    """A sublayer, for people."""
    return f"{NAMES[site]} {layer}"


def _percent(x: Interval) -> str:
    return f"{100 * x.value:.0f} % ({100 * x.low:.0f} to {100 * x.high:.0f} %)"


def _nothing(name: str, patches: xr.Dataset) -> Finding:
    own = float(np.mean(causes.damage(patches, "kl")))
    claim = (
        f"On {patches.sizes['prompt']} prompts the damage of {name} is not surely above zero (mean KL {own:.2g} nat), "
        "so that no layer can be blamed for it."
    )
    return Finding(claim, own, None, patches.sizes["prompt"], name, "/patches", "note")


def _depth(name: str, patches: xr.Dataset, figure: str) -> Finding:
    run = causes.culprits(patches, figure)
    where = f"layer {run.first}" if run.first == run.last else f"layers {run.first} to {run.last}"
    them = "it" if run.first == run.last else "them"
    claim = (
        f"{_percent(run.share)} of the {causes.FIGURES[figure]} under {name} is caused in {where} of "
        f"{patches.sizes['layer']}: by so much more is recovered by the dense stream written in behind than in front of "
        f"{them}. No shorter run of layers causes half; chosen on the same prompts, it may look worse than it is."
    )
    detail = {"first": run.first, "last": run.last, "figure": figure}
    return claimed(
        claim, run.share, patches.sizes["prompt"], name, "/patches/depth", "finding", **detail
    )


def _ranking(name: str, patches: xr.Dataset, figure: str) -> Finding | None:
    ranked = causes.ranking(patches, figure)
    if len(ranked) < 2:
        return None
    worst = ranked[0]
    lead = causes.ahead(patches, figure, worst, ranked[1])
    sure = "surely" if lead.low > 0 else "not surely"
    others = ", ".join(
        f"{place(c.layer, c.site)} ({100 * c.share.value:.0f} %)" for c in ranked[1:NAMED]
    )
    claim = (
        f"Of the {len(ranked)} changed sublayers of {name}, {place(worst.layer, worst.site)} is to blame most: alone in the "
        f"dense model it causes {_percent(worst.noise)} of the {causes.FIGURES[figure]}, made dense it gives "
        f"{_percent(worst.denoise)} back. It is {sure} ahead of the next: {others}."
    )
    return claimed(
        claim, worst.share, patches.sizes["prompt"], name, "/patches/swap", figure=figure,
        ranking=[f"{c.site}.{c.layer}" for c in ranked], lead=list(lead),
    )  # fmt: skip


def _interaction(name: str, patches: xr.Dataset, figure: str) -> Finding | None:
    if int(patches.changed.sum()) < 2:
        return None
    total = causes.interaction(patches, figure)
    if total.high < 1:
        reading = "the rest comes only of their combination"
    elif total.low > 1:
        reading = "together they do less: some do the same damage twice, or undo each other's"
    else:
        reading = "the damage of each adds up, as far as these prompts can tell"
    claim = (
        f"Each alone in the dense model, the changed sublayers of {name} add up to {_percent(total)} of the "
        f"{causes.FIGURES[figure]}: {reading}."
    )
    return claimed(claim, total, patches.sizes["prompt"], name, "/patches/swap", figure=figure)


def _parts(name: str, patches: xr.Dataset) -> list[Finding]:
    if "kl" not in causes.measurable(patches):
        return []
    part = causes.by_part(patches)
    n = patches.sizes["prompt"]
    along, common, top = (part[p] for p in ("parallel", "common", "top"))
    states = (
        f"At the output of {name} the change of hidden states along themselves ({_percent(along[1])} of the squared "
        f"change) does {_percent(along[0])} of the KL, kept alone; that across them does {_percent(part['orthogonal'][0])}."
    )
    logits = (
        f"Of the change of its logits {_percent(common[1])} is one shift common to all tokens, which does no KL; kept "
        f"alone, the change at the ten likeliest tokens ({100 * top[1].value:.2g} % of its square) does {_percent(top[0])} of the KL, that of all others "
        f"{_percent(part['tail'][0])}."
    )
    return [
        claimed(states, part["orthogonal"][0], n, name, "/patches/part, h"),
        claimed(logits, part["tail"][0], n, name, "/patches/part, z"),
    ]


def _memory(name: str, memory: xr.Dataset) -> Finding | None:
    kl = memory.kl.values
    if not np.nanmax(kl) > 0:
        return None
    last = memory.sizes["cut"] - 1
    rest = causes.remembered(memory, last, 0)
    curve = kl.mean(0)
    half = int(np.argmin(np.abs(curve - (curve[0] + curve[last]) / 2)))
    if rest.high < 1:
        reading = (
            f"remembered context does the rest; half of what it adds is gone once the first {half} of {last} layers "
            "remember the dense way"
        )
    elif rest.low > 1:
        reading = "its own memory suits the candidate better than the dense one"
    else:
        reading = "remembered context adds nothing that these prompts can tell"
    claim = (
        f"With the dense model's keys and values in all layers {name} keeps {_percent(rest)} of the KL that it has with "
        f"its own, at the same tokens: {reading}."
    )
    return claimed(claim, rest, memory.sizes["prompt"], name, "/memory/kl", half=half)


def _repair(name: str, repairs: xr.Dataset) -> Finding | None:
    found = {r.arm: r for r in causes.repaired(repairs)}
    blamed, cosine = found["blamed"], found["cosine"]
    if not np.isfinite(blamed.returned.low):
        return None
    if blamed.beyond_lot.low > 0:
        reading = "more than as many chosen by lot"
    elif blamed.beyond_lot.high < 0:
        reading = "less than as many chosen by lot"
    else:
        reading = "not surely more than as many chosen by lot"
    advice = f" To do so: `{blamed.recipe}`." if blamed.recipe else ""
    claim = (
        f"Given back the {len(blamed.places)} sublayers that are blamed most ({', '.join(blamed.places)}), {name} writes "
        f"{_percent(blamed.returned)} of the lost answers again, {reading} ({_percent(found['random'].returned)}); "
        f"chosen by cosine it is {_percent(cosine.returned)}.{advice}"
    )
    return claimed(
        claim, blamed.returned, repairs.sizes["item"], name, "/repairs/score",
        advice=advice.strip(), recipe=blamed.recipe, beyond_lot=list(blamed.beyond_lot),
    )  # fmt: skip
