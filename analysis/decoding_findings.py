"""Findings about decoding, in words: see `decoding` for the numbers."""

from __future__ import annotations

import numpy as np
import xarray as xr

from . import decoding
from .finding import Finding, claimed
from .statistics import Interval, bootstrap

CLEAR = 0.05  # a law of growth is named where it beats the constant by this share of its error


def tell(name: str, steps: xr.Dataset, temperatures: xr.Dataset | None) -> list[Finding]:
    """What the decoding of one cell says: at most one finding of each kind, none without numbers."""
    if not np.isfinite(steps.kl.values).any() or not np.nanmax(steps.kl.values) > 0:
        return []
    told = [
        _compounding(name, steps), _sequence(name, steps), _parting(name, steps), _jump(name, steps),
        _growth(name, steps), _margins(name, steps), _tokens(name, steps), _loops(name, steps),
        None if temperatures is None else _temperature(name, temperatures),
    ]  # fmt: skip
    return [finding for finding in told if finding is not None]


def _times(x: Interval) -> str:
    return f"×{x.value:.2g} ({x.low:.2g} to {x.high:.2g})"


def _nats(x: Interval) -> str:
    return f"{x.value:.3g} nat ({x.low:.3g} to {x.high:.3g})"


def _compounding(name: str, steps: xr.Dataset) -> Finding | None:
    factor, prompts = decoding.factors(steps), steps.sizes["prompt"]
    if not np.isfinite(factor["tokens"].value):
        return None
    where, evidence = name, "/steps/kl"
    detail = {key: list(value) for key, value in factor.items()}
    if not np.isfinite(factor["compounding"].value):
        claim = (
            f"While {name} writes, its own text multiplies the KL of reading the dense text by "
            f"{_times(factor['tokens'])}; one step alone was not measured, since layers have no counterparts."
        )
        return claimed(claim, factor["tokens"], prompts, where, evidence, factors=detail)
    larger = "its own text" if factor["tokens"].value > factor["cache"].value else "its own cache"
    claim = (
        f"While {name} writes, the KL of one step is multiplied by {_times(factor['compounding'])}: "
        f"{_times(factor['cache'])} by reading its own cache instead of the dense one, "
        f"{_times(factor['tokens'])} by reading its own text. The larger part comes from {larger}."
    )
    return claimed(claim, factor["compounding"], prompts, where, evidence, factors=detail)


def _sequence(name: str, steps: xr.Dataset) -> Finding:
    total = decoding.sequence_kl(steps).isel(step=-1)
    size = Interval(*(float(total[n]) for n in ("value", "low", "high")))
    along = "drawn" if steps.attrs.get("sampled") else "greedy"
    ends = (
        "an estimate of KL(P(y) || P'(y)) of whole texts"
        if along == "drawn"
        else "on its likeliest text"
    )
    claim = (
        f"Along the {along} dense text the forced KL of {name} adds up to {_nats(size)} over "
        f"{steps.sizes['step']} steps, {ends}."
    )
    return claimed(claim, size, steps.sizes["prompt"], name, "/steps/kl, forced, summed")


def _parting(name: str, steps: xr.Dataset) -> Finding:
    life = decoding.survival(steps)
    seen = (
        f"half of them by token {life.median:.0f}"
        if np.isfinite(life.median)
        else "fewer than half of them"
    )
    share = decoding.divergence(steps)[1].astype(float)
    parted = bootstrap(lambda pick: share[pick].mean(-1), len(share))
    half = life.half_life
    if np.isfinite(half.value):
        end = f"{half.high:.0f}" if np.isfinite(half.high) else f"more than {steps.sizes['step']}"
        forecast = f"after {half.value:.0f} tokens ({half.low:.0f} to {end})"
    else:
        forecast = f"not within {steps.sizes['step']} tokens"
    how = (
        "Drawn with common random numbers, texts"
        if steps.attrs.get("sampled")
        else f"The first flip of the forced pass is the first divergence in {100 * life.agreement:.0f} % of the "
        f"prompts; drawn at T = {float(steps.attrs.get('temperature', 1)):g} instead, texts"
    )
    claim = (
        f"{life.parted} of {life.prompts} texts of {name} part from the dense text within "
        f"{steps.sizes['step']} steps, {seen}. {how} are predicted to have parted in half of the cases "
        f"{forecast} at the latest."
    )
    return claimed(
        claim, parted, life.prompts, name, "/steps/token, /steps/tv of forced",
        median=life.median, half_life=list(half), agreement=life.agreement,
    )  # fmt: skip


def _jump(name: str, steps: xr.Dataset) -> Finding | None:
    leap = decoding.jump(steps)
    if leap is None:
        return None
    jumped = leap.free_after.low > leap.free_before.high
    stayed = leap.forced_after.low <= leap.forced_before.high
    claim = (
        f"Where texts of {name} part, free KL {'jumps' if jumped else 'goes'} from {_nats(leap.free_before)} to "
        f"{_nats(leap.free_after)}, while forced KL {'stays at' if stayed else 'goes to'} {_nats(leap.forced_after)} "
        f"(before: {leap.forced_before.value:.3g}); the dense model reading the other text is as far off as "
        f"{_nats(leap.swapped_after)}. {_reading(leap)}"
    )
    return claimed(
        claim, leap.free_after, leap.prompts, name, "/steps/kl around the first divergence"
    )


def _reading(leap: decoding.Jump) -> str:
    share = leap.swapped_after.value / leap.free_after.value
    if share > 0.7:
        return "The other text explains most of the jump, not the weights."
    if share > 0.3:
        return "The other text explains part of the jump, the weights the rest."
    return "The other text explains little of it: the weights do."


def _growth(name: str, steps: xr.Dataset) -> Finding | None:
    law = decoding.growth(steps, "forced")
    if law is None:
        return None
    grows = law.best != "constant" and law.gain.low > 0 and law.gain.value >= CLEAR
    claim = (
        f"Forced KL of {name} follows a {law.best} law of the step (held-out error "
        f"{100 * law.gain.value:.0f} % below a constant's, {100 * law.gain.low:.0f} to {100 * law.gain.high:.0f} %)."
        if grows
        else f"Forced KL of {name} does not surely grow with the step: on held-out prompts no law is clearly "
        f"better than a constant (best: {law.best})."
    )
    return claimed(
        claim, law.gain, law.prompts, name, "/steps/kl, forced", best=law.best, errors=law.errors,
        parameters=list(law.parameters), grows=grows,
    )  # fmt: skip


def _margins(name: str, steps: xr.Dataset) -> Finding | None:
    small = decoding.explained(steps)
    if small is None:
        return None
    a, b = small.flips, small.others
    claim = (
        f"{100 * a.value:.0f} % ({100 * a.low:.0f} to {100 * a.high:.0f} %) of the flips of {name} are at steps whose "
        f"dense margin is smaller than the step's logit shift √(2 Var_p[dz]); of the other steps "
        f"{100 * b.value:.0f} % ({100 * b.low:.0f} to {100 * b.high:.0f} %) are."
    )
    return claimed(claim, a, small.n, name, "/steps/flip, margin, var_p of forced", others=list(b))


def _tokens(name: str, steps: xr.Dataset) -> Finding | None:
    kinds = [f for f in decoding.flips(steps) if f.by == "token" and f.n >= 20]
    if len(kinds) < 2:
        return None
    most, least = max(kinds, key=lambda f: f.rate.value), min(kinds, key=lambda f: f.rate.value)
    surely = "" if most.rate.low > least.rate.high else "; the intervals overlap"
    claim = (
        f"{name} changes the most likely token most often at {most.group} "
        f"({100 * most.rate.value:.0f} %, {100 * most.rate.low:.0f} to {100 * most.rate.high:.0f} % of {most.n}) and least "
        f"at {least.group} ({100 * least.rate.value:.0f} %, {100 * least.rate.low:.0f} to "
        f"{100 * least.rate.high:.0f} % of {least.n}){surely}."
    )
    return claimed(
        claim, most.rate, most.n, name, "/steps/flip of forced, by token", kind=most.group
    )


def _loops(name: str, steps: xr.Dataset) -> Finding | None:
    dense, other = (decoding.degeneration(steps, model) for model in ("dense", "candidate"))
    gap = other.repetition - dense.repetition
    more = bootstrap(lambda pick: gap[pick].mean(-1), len(gap))
    ends = [int(np.isfinite(side.loop).sum()) for side in (dense, other)]
    if not max(ends) and not more.value > 0:
        return None
    time, parts = decoding.divergence(steps)
    later = (other.onset - time)[np.isfinite(other.onset) & parts]
    after = _after(later) if len(later) else ""
    claim = (
        f"{ends[1]} of {len(gap)} texts of {name} end in a loop{after} (dense: {ends[0]}); the share of repeated "
        f"4-grams differs by {more.value:.2f} ({more.low:.2f} to {more.high:.2f}), {int(other.no_stop.sum())} texts "
        f"reach the limit (dense: {int(dense.no_stop.sum())}), entropy collapses in {int(np.isfinite(other.collapse).sum())} "
        f"(dense: {int(np.isfinite(dense.collapse).sum())})."
    )
    return claimed(claim, more, len(gap), name, "/steps/token", loops=ends)


def _after(later: np.ndarray) -> str:
    if len(later) == 1:
        return f", beginning {later[0]:.0f} steps after the texts part"
    middle = bootstrap(lambda pick: np.median(later[pick], axis=-1), len(later))
    return (
        f", beginning {middle.value:.0f} steps after the texts part "
        f"(median, {middle.low:.0f} to {middle.high:.0f})"
    )


def _temperature(name: str, temperatures: xr.Dataset) -> Finding | None:
    if temperatures.sizes["temperature"] < 2:
        return None
    kl = decoding.by_temperature(temperatures).sel(history="forced").sortby("temperature")
    cold, hot = (kl.isel(temperature=i) for i in (0, -1))
    values = [Interval(*(float(x[n]) for n in ("value", "low", "high"))) for x in (cold, hot)]
    claim = (
        f"At T = {float(cold.temperature):g} the forced KL of {name} is {_nats(values[0])}, at "
        f"T = {float(hot.temperature):g} it is {_nats(values[1])}, on the same logits."
    )
    return claimed(
        claim, values[0], temperatures.sizes["prompt"], name, "/temperatures/kl", level="note",
        hot=list(values[1]),
    )  # fmt: skip
