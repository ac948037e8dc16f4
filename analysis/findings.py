"""Findings: what the numbers say, in sentences that claim no more than the numbers carry."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

from . import (
    cause_findings,
    collapse,
    decoding_findings,
    hierarchy,
    neuron_findings,
    recovery,
    task_findings,
    theory,
)
from .finding import Finding, claimed, group
from .statistics import Interval, bootstrap


def diagnose(cells: Mapping[str, xr.DataTree] | xr.DataTree) -> list[Finding]:
    """Findings about one cell or several.

    Args:
        cells: the tree of one cell, or a mapping from its name (its recipe) to its tree.

    Returns:
        For each cell a `verdict` on its task scores, then what happens at the output, between the
        spaces, along the layers and to the theory; then, for several cells, how they compare.
    """
    named = {_name(cells): cells} if isinstance(cells, xr.DataTree) else dict(cells)
    found: list[Finding] = []
    for name, cell in named.items():
        found += _scores(name, cell) + task_findings.tell(name, cell)
        found += _output(name, cell) + _spaces(name, cell)
        found += (
            _layers(name, cell) + _theory(name, cell) + _failures(name, cell) + _cost(name, cell)
        )
        found += cause_findings.tell(
            name, group(cell, "patches"), group(cell, "memory"), group(cell, "repairs")
        )
        steps, further = group(cell, "steps"), group(cell, "temperatures")
        if steps is not None:
            found += decoding_findings.tell(name, steps, further)
    return found + _compare(named) + neuron_findings.across(named) + recovery.tell(named)


def _name(cell: xr.DataTree) -> str:
    return str(cell.attrs.get("recipe", "candidate"))


# --- scores --------------------------------------------------------------------------------------

_WORDS = {"intact": "keeps", "degraded": "degrades", "collapsed": "destroys"}


def _scores(name: str, cell: xr.DataTree) -> list[Finding]:
    scores = group(cell, "scores")
    if scores is None:
        return []
    gap = collapse.discrepancy(scores)
    found = [_discrepancy(name, gap)] if gap else [_nothing_informative(name, scores)]
    return found + [_retention(name, row) for row in collapse.retentions(scores)]


def _discrepancy(name: str, gap: collapse.Discrepancy) -> Finding:
    words = [_WORDS[collapse.verdict(i, True)] for i in (gap.choice, gap.generation)]
    separated = gap.difference.low > 0 or gap.difference.high < 0
    relation = (
        f"the same items differ by format by {gap.difference.value:.2f} "
        f"({gap.difference.low:.2f} to {gap.difference.high:.2f})"
        if separated
        else f"asked both ways, the same items do not differ measurably "
        f"({gap.difference.value:.2f}, {gap.difference.low:.2f} to {gap.difference.high:.2f})"
    )
    claim = (
        f"{name} {words[0]} multiple choice (retention {gap.choice}) and {words[1]} free generation "
        f"({gap.generation}); {relation}."
    )
    return claimed(
        claim, gap.difference, gap.n, name, "/scores, twins: " + ", ".join(gap.tasks), "verdict",
        choice=list(gap.choice), generation=list(gap.generation), advice=_advice(gap),
    )  # fmt: skip


def _advice(gap: collapse.Discrepancy) -> str:
    choice, generation = (collapse.verdict(i, True) for i in (gap.choice, gap.generation))
    if choice == generation == "intact":
        return "On these tasks it can replace the dense model in both formats."
    if generation == "intact":
        return "Generation holds; check multiple choice on the tasks you need."
    if generation == "collapsed" and choice != "collapsed":
        return "Do not generate text with it; where it only ranks given options it keeps part of its use."
    if choice == generation == "collapsed":
        return "It is of no use in either format: compress less, or otherwise."
    if gap.difference.low > 0:
        return "Multiple-choice scores overstate what is left: judge it by generation, or compress less."
    return "Both formats lose alike: multiple-choice scores are a fair guide here."


def _nothing_informative(name: str, scores: xr.Dataset) -> Finding:
    claim = (
        f"Nothing can be said of what {name} does to task scores: the dense model is above chance in "
        "both formats on no twin, or none was asked; what follows are single tasks."
    )
    return Finding(claim, float("nan"), None, scores.sizes["item"], name, "/scores", "verdict")


def _retention(name: str, row: collapse.Retention) -> Finding:
    if row.verdict == "uninformative":
        claim = (
            f"{row.task} ({row.format}) says nothing: the dense model scores {row.dense:.2f}, not above "
            f"chance ({max(row.chance, collapse.FLOOR if row.format != 'choice' else 0):.2f})."
        )
    else:
        claim = (
            f"{row.task} ({row.format}): {row.verdict}, {row.dense:.2f} to {row.candidate:.2f}, retention "
            f"{row.retention}; {row.lost} items lost, {row.gained} gained (McNemar, Holm: p = {row.p_value:.2g})."
        )
    return claimed(
        claim, row.retention, row.n, f"{name}, {row.task}", "/scores", task=row.task, format=row.format,
        verdict=row.verdict, dense=row.dense, candidate=row.candidate, chance=row.chance,
        lost=row.lost, gained=row.gained, p_value=row.p_value,
    )  # fmt: skip


def _failures(name: str, cell: xr.DataTree) -> list[Finding]:
    scores = group(cell, "scores")
    modes = collapse.failures(scores) if scores is not None else {}
    if not modes:
        return []
    dense, other = modes["dense"], modes["candidate"]
    worst = max(dense, key=lambda m: other[m] - dense[m])
    if other[worst] - dense[worst] < 0.02:
        return []
    words = {
        "no_answer": "without an answer",
        "no_stop": "not ended",
        "repetition": "repeated 4-grams",
    }
    part = scores.isel(item=scores.format.values == "generation")  # type: ignore[union-attr]
    values = part[worst].sel(model="candidate").values.astype(float)
    estimate = bootstrap(lambda pick: values[pick].mean(-1), len(values), strata=part.task.values)
    claim = f"Free answers of {name} fail by texts {words[worst]}: {estimate} (dense {dense[worst]:.2f})."
    return [
        claimed(
            claim, estimate, len(values), name, f"/scores/{worst}", mode=worst, dense=dense[worst]
        )
    ]


# --- shifts --------------------------------------------------------------------------------------


def _output(name: str, cell: xr.DataTree) -> list[Finding]:
    output = group(cell, "output")
    if output is None:
        return []
    kl, flip = (hierarchy.prompt_means(output[n]).values for n in ("kl", "flip"))
    shift = bootstrap(lambda pick: kl[pick].mean(-1), len(kl))
    flips = bootstrap(lambda pick: flip[pick].mean(-1), len(flip))
    claim = (
        f"At the output of {name} the mean KL(p || p') is {shift.value:.3g} nat "
        f"({shift.low:.3g} to {shift.high:.3g}); the most likely token changes at "
        f"{100 * flips.value:.0f} % of positions ({100 * flips.low:.0f} to {100 * flips.high:.0f} %)."
    )
    return [claimed(claim, shift, len(kl), name, "/output/kl, /output/flip", flips=list(flips))]


def _spaces(name: str, cell: xr.DataTree) -> list[Finding]:
    output = group(cell, "output")
    if output is None or not float(output.angular.max()) > 0:
        return []
    steps = hierarchy.amplification(output.angular)
    phrases = {"h": "hidden state", "z": "logits", "p": "probabilities"}
    parts = [f"{_change(s.factor)} from {phrases[s.source]} to {phrases[s.target]} (×{s.factor.value:.2g}, "
             f"{s.factor.low:.2g} to {s.factor.high:.2g})" for s in steps]  # fmt: skip
    claim = f"The perturbation of {name} is {parts[0]} and {parts[1]}, in mean 1 - cosine at the output."
    return [
        claimed(
            claim, steps[1].factor, steps[1].prompts, name, "/output/angular",
            h_to_z=list(steps[0].factor), z_to_p=list(steps[1].factor),
        )
    ]  # fmt: skip


def _change(factor: Interval) -> str:
    if factor.low > 1:
        return "magnified"
    return "absorbed" if factor.high < 1 else "carried on about unchanged"


def _layers(name: str, cell: xr.DataTree) -> list[Finding]:
    shifts = group(cell, "shifts")
    if shifts is None:
        return []
    rise = hierarchy.steepest(shifts.kl.sel(effect="propagated"))
    if not rise.size.value > 0:
        return []
    sublayer = {"attn": "attention", "mlp": "MLP"}[rise.site]
    claim = (
        f"Read through the final norm, the shift of {name} grows most at the {sublayer} of layer "
        f"{rise.layer}: mean KL rises there by {rise.size.value:.3g} nat ({rise.size.low:.3g} to "
        f"{rise.size.high:.3g}); {100 * rise.share:.0f} % of the resamples of prompts name the same place."
    )
    where = f"{name}, layer {rise.layer} {rise.site}"
    return [
        claimed(claim, rise.size, rise.prompts, where, "/shifts/kl, propagated", share=rise.share)
    ]


def _theory(name: str, cell: xr.DataTree) -> list[Finding]:
    output = group(cell, "output")
    if output is None:
        return []
    temperature = float(output.attrs.get("temperature", 1.0))
    third = {f.theorem: f for f in theory.fits(output, temperature)}.get("3")
    if third is None:
        return []
    validity = hierarchy.prompt_means(output.validity).values
    size = bootstrap(lambda pick: np.nanmedian(validity[pick], axis=-1), len(validity))
    holds = third.within >= 0.9
    claim = (
        f"The second-order estimate KL ~ Var_p[dz]/2T² {'describes' if holds else 'no longer describes'} {name}: "
        f"{100 * third.within:.0f} % of {third.n} positions lie within a factor of 2, median error "
        f"{100 * third.error:.0f} %; the third order is {size.value:.2g} of the second in the median prompt."
    )
    found = claimed(
        claim, size, len(validity), name, "/output/kl, /output/var_p",
        within=third.within, error=third.error,
    )  # fmt: skip
    return [found, *_limit(name, cell, temperature), *_weakest_layer(name, cell, temperature)]


def _limit(name: str, cell: xr.DataTree, temperature: float) -> list[Finding]:
    shifts = group(cell, "shifts")
    data = shifts.sel(effect="propagated") if shifts is not None else group(cell, "output")
    stops = theory.limit(data, temperature) if data is not None else None
    if stops is None:
        return []
    spread = f"median error {100 * stops.error.value:.0f} % ({100 * stops.error.low:.0f} to {100 * stops.error.high:.0f} %)"
    if np.isfinite(stops.validity.value):
        claim = (
            f"For {name} second order stops holding at validity |k3|/(3 k2 T) = {stops.validity}: from "
            f"there on most positions are off by a factor of 2 or more, {100 * stops.beyond:.0f} % of all; {spread}."
        )
    else:
        claim = f"For {name} second order holds at every validity seen; {spread}."
    return [
        claimed(
            claim, stops.validity, stops.prompts, name, "/shifts/validity, propagated",
            beyond=stops.beyond, error=list(stops.error),
        )
    ]  # fmt: skip


def _weakest_layer(name: str, cell: xr.DataTree, temperature: float) -> list[Finding]:
    shifts = group(cell, "shifts")
    if shifts is None:
        return []
    within = theory.by_site(shifts.sel(effect="propagated"), temperature).within.sel(theorem="3")
    if not np.isfinite(within.values).any():
        return []
    layer, site = np.unravel_index(np.nanargmin(within.values), within.shape)
    least, place = float(within.values[layer, site]), f"layer {layer} {within.site.values[site]}"
    claim = (
        f"Along the layers of {name} Theorem 3 does worst at {place}: {100 * least:.0f} % of the positions "
        f"within a factor of 2, {100 * float(np.nanmedian(within.values)):.0f} % at the median site."
    )
    return [
        Finding(
            claim, least, None, shifts.sizes["prompt"], f"{name}, {place}", "/shifts/kl", "note"
        )
    ]


def _cost(name: str, cell: xr.DataTree) -> list[Finding]:
    cost = group(cell, "cost")
    if cost is None:
        return []
    packed = (
        cost.bytes_packed.sel(model="candidate").item()
        / cost.bytes_packed.sel(model="dense").item()
    )
    held = cost.parameters.sel(model="candidate").item() / cost.parameters.sel(model="dense").item()
    zeros = (
        1
        - cost.nonzero.sel(model="candidate").item() / cost.parameters.sel(model="candidate").item()
    )
    claim = (
        f"{name} holds {100 * held:.1f} % of the parameters, {100 * zeros:.1f} % of them zero; packed it would take "
        f"{100 * packed:.1f} % of the bytes. Zeros and simulated rounding save no time by themselves."
    )
    told = [Finding(claim, packed, None, 1, name, "/cost", "note")]
    return told + ([_speed(name, cost)] if "prefill_rate" in cost else [])


def _speed(name: str, cost: xr.Dataset) -> Finding:
    """Rounds are few and the machine is shared: the range of the rounds stands for an interval."""
    rates = {
        kind: (part.sel(model="candidate") / part.sel(model="dense")).values
        for kind, part in (("reads", cost.prefill_rate), ("writes", cost.decode_rate))
    }
    words = [
        f"{kind} ×{np.median(r):.2f} ({r.min():.2f} to {r.max():.2f})" for kind, r in rates.items()
    ]
    sure = [r.min() > 1 or r.max() < 1 for r in rates.values()]
    claim = (
        f"Measured in turn, {len(rates['reads'])} rounds each, {name} {words[0]} as fast as the dense model and "
        f"{words[1]} as fast (in brackets the range of the rounds){'' if any(sure) else ': no sure difference'}"
    )
    if "peak_bytes" in cost:
        held = float(cost.peak_bytes[1] / cost.peak_bytes[0])
        claim += f"; at its peak, reading, it holds {100 * held:.0f} % of the dense model's memory"
    span = Interval(
        float(np.median(rates["writes"])),
        *map(float, (rates["writes"].min(), rates["writes"].max())),
    )
    return claimed(
        f"{claim}.",
        span,
        len(rates["writes"]),
        name,
        "/cost/prefill_rate, decode_rate",
        level="note",
    )


# --- cells against each other --------------------------------------------------------------------


def _compare(cells: Mapping[str, xr.DataTree]) -> list[Finding]:
    kls: dict[str, np.ndarray] = {}
    for name, cell in cells.items():
        output = group(cell, "output")
        if output is not None:
            kls[name] = hierarchy.prompt_means(output.kl).values
    if len(kls) < 2 or len({len(v) for v in kls.values()}) > 1:
        return []
    order = sorted(kls, key=lambda n: kls[n].mean())
    most, next_ = kls[order[-1]], kls[order[-2]]
    estimate = bootstrap(lambda pick: (most - next_)[pick].mean(-1), len(most))
    surely = "surely" if estimate.low > 0 else "not surely"
    claim = (
        f"By mean KL at the output, from least to most damage: {', '.join(order)}. {order[-1]} is {surely} "
        f"ahead of {order[-2]} (difference {estimate.value:.3g} nat, {estimate.low:.3g} to {estimate.high:.3g}, "
        "paired over prompts)."
    )
    return [claimed(claim, estimate, len(most), "all cells", "/output/kl", order=order)]
