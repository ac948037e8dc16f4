"""What a study says, in sentences: what explains the collapse, what foretells it, what to do."""

from __future__ import annotations

import numpy as np
import xarray as xr

from . import advice, correlation, forecast, matched, rankings
from .finding import Finding, claimed
from .summary import figures

EVIDENCE = "/summary of all cells"
WORDS = {"retention_generation": "free generation", "retention_choice": "multiple choice"}
PLACE = "output"


def tell(study: xr.Dataset) -> list[Finding]:
    """Findings over the cells of a study, from `open_study`; those that it is too small for are left out."""
    found = [f for outcome in correlation.OUTCOMES for f in _explained(study, outcome)]
    found += [f for outcome in correlation.OUTCOMES for f in _foretold(study, outcome)]
    found += [f for outcome in correlation.OUTCOMES for f in _kinds(study, outcome)]
    return found + _shapes(study) + _chosen(study) + _advised(study)


# --- what explains it ----------------------------------------------------------------------------


def _explained(study: xr.Dataset, outcome: str) -> list[Finding]:
    ranked = correlation.links(study, outcome) if outcome in study else []
    if not ranked:
        return []
    best, count = ranked[0], len(ranked)
    sure = [link for link in ranked if link.p_value < 0.05]
    what = figures()[best.figure].describe
    if not sure:
        claim = (
            f"None of {count} figures goes with the retention of {WORDS[outcome]} over {best.n} cells more than "
            f"chance would have it (strongest: {what}, Spearman {best.spearman}, Holm p = {best.p_value:.2g})."
        )
    else:
        claim = (
            f"Over {best.n} cells {len(sure)} of {count} figures go with the retention of {WORDS[outcome]}; the "
            f"closest is {what}: Spearman {best.spearman} (Holm p = {best.p_value:.2g}), {best.given_amount} given "
            f"the bytes saved, {best.given_method} within methods."
        )
    head = claimed(
        claim, best.spearman, best.n, "all cells", f"{EVIDENCE}, correlation", "verdict",
        outcome=outcome, figure=best.figure, space=best.space, p_value=best.p_value,
    )  # fmt: skip
    return [head, *_spaces(study, outcome, ranked)]


def _spaces(study: xr.Dataset, outcome: str, ranked: list[correlation.Link]) -> list[Finding]:
    """The same figure in the three spaces, and whether one of them follows the outcome more closely."""
    names = [f"{PLACE}_angular_{space}" for space in "hzp"]
    known = {link.figure: link for link in ranked}
    if any(n not in known for n in names):
        return []
    pairs = [correlation.contrast(study, outcome, names[2], other) for other in names[:2]]
    sure = [c for c in pairs if c and (c.difference.low > 0 or c.difference.high < 0)]
    rho = ", ".join(f"{known[n].spearman.value:.2f} in {n[-1]}" for n in names)
    told = (
        "; ".join(
            f"p follows it {'more' if c.difference.value > 0 else 'less'} closely than {c.second[-1]} "
            f"({c.difference.value:+.2f}, {c.difference.low:.2f} to {c.difference.high:.2f})"
            for c in sure
        )
        or "these do not differ measurably from each other"
    )
    claim = f"1 − cos at the output against retention of {WORDS[outcome]}, Spearman: {rho}; {told}."
    first = pairs[0]
    assert first is not None
    return [
        claimed(
            claim, first.difference, known[names[0]].n, "all cells", f"{EVIDENCE}, spaces",
            outcome=outcome,
        )
    ]  # fmt: skip


# --- what foretells it ---------------------------------------------------------------------------


def _foretold(study: xr.Dataset, outcome: str) -> list[Finding]:
    try:
        tried = forecast.trials(study, outcome)
    except forecast.ForecastError:
        return []
    found: list[Finding] = []
    for left_out in dict.fromkeys(t.left_out for t in tried):
        rows = {t.model: t for t in tried if t.left_out == left_out}
        best = min((t for t in rows.values() if t.model != "amount"), key=lambda t: t.error.value)
        better = "better than" if best.gain.low > 0 else "not measurably better than"
        collapsed = (
            "" if np.isnan(best.accuracy)
            else f" Collapsed or not: balanced accuracy {best.accuracy:.2f} ({rows['amount'].accuracy:.2f} by bytes)."
        )  # fmt: skip
        claim = (
            f"One pass over the prompts ({best.model}) foretells retention of {WORDS[outcome]} of a {left_out} that "
            f"was left out to {best.error.value:.2f} ({best.error.low:.2f} to {best.error.high:.2f}), {better} the bytes "
            f"saved alone ({rows['amount'].error.value:.2f}; gain {best.gain})." + collapsed
        )
        found.append(
            claimed(
                claim, best.error, best.n, "all cells", f"{EVIDENCE}, forecast", outcome=outcome,
                left_out=left_out, model=best.model, accuracy=best.accuracy, gain=list(best.gain),
            )
        )  # fmt: skip
    return found


# --- pruning against quantization ----------------------------------------------------------------


def _kinds(study: xr.Dataset, outcome: str) -> list[Finding]:
    found: list[Finding] = []
    for m in matched.matches(study, outcome):
        more, less = m.difference.low > 0, m.difference.high < 0
        relation = (
            "quantized models keep more" if more
            else "pruned models keep more" if less else "the two keep about as much"
        )  # fmt: skip
        claim = (
            f"At {matched.AXES[m.axis]} {relation} of {WORDS[outcome]}: quantized less pruned {m.difference} "
            f"({m.pruned} pruned and {m.quantized} quantized cells in the range that both reach)."
        )
        found.append(
            claimed(
                claim, m.difference, m.pruned + m.quantized, "all cells", f"{EVIDENCE}, kinds",
                axis=m.axis, outcome=outcome, span=list(m.span),
            )
        )  # fmt: skip
    told = {f.detail["axis"] for f in found}
    return found + [
        _unmatched(axis, outcome, spans)
        for axis, spans in matched.apart(study, outcome).items()
        if axis not in told
    ]


def _unmatched(axis: str, outcome: str, spans: list[tuple[float, float, int]]) -> Finding:
    parts = [
        f"{n} {kind} cells" + (f" from {low:.2g} to {high:.2g}" if n else "")
        for kind, (low, high, n) in zip(("pruned", "quantized"), spans, strict=True)
    ]
    faster = " that write faster than the dense model" if axis == "decode_speed" else ""
    claim = (
        f"At {matched.AXES[axis]} pruning and quantization cannot be compared for {WORDS[outcome]}: {' and '.join(parts)}"
        f"{faster}, no {matched.FEWEST} of each in a range that both reach."
    )
    count = sum(n for _, _, n in spans)
    return Finding(
        claim, float("nan"), None, count, "all cells", f"{EVIDENCE}, kinds", "note",
        {"axis": axis, "outcome": outcome},
    )  # fmt: skip


def _shapes(study: xr.Dataset) -> list[Finding]:
    rows = [s for s in matched.shapes(study) if s.difference.low > 0 or s.difference.high < 0]
    if not rows:
        return []
    parts = [
        f"{matched.SHAPES[s.figure]} {s.difference.value:+.2g} ({s.difference.low:.2g} to {s.difference.high:.2g})"
        for s in rows
    ]
    claim = f"At equal KL, quantized less pruned: {'; '.join(parts)}."
    first = rows[0]
    return [
        claimed(
            claim, first.difference, study.sizes["cell"], "all cells", f"{EVIDENCE}, shapes",
            figures=[s.figure for s in rows],
        )
    ]  # fmt: skip


# --- what to drop, what to do --------------------------------------------------------------------


def _chosen(study: xr.Dataset) -> list[Finding]:
    found: list[Finding] = []
    for row in rankings.rankings(study):
        sure = row.p_value < 0.05 and (row.difference.low > 0 or row.difference.high < 0)
        verb = "keeps more" if row.difference.value > 0 else "keeps less"
        claim = (
            f"Sublayers ranked by {row.ranking} instead of cosine: retention of generation "
            f"{row.difference.value:+.2f} ({row.difference.low:.2f} to {row.difference.high:.2f}; Holm p = "
            f"{row.p_value:.2g}) over {row.settings} settings, ahead in {row.wins}, alike in {row.same}"
            + (f": it {verb}." if sure else ": not told apart.")
        )
        found.append(
            claimed(
                claim, row.difference, row.items, "all cells", "/scores, rankings", ranking=row.ranking,
                p_value=row.p_value, settings=row.settings,
            )
        )  # fmt: skip
    return found


def _advised(study: xr.Dataset) -> list[Finding]:
    """For each model and use: the method that goes furthest, and what it rests on."""
    reached = advice.reaches(study)
    found: list[Finding] = []
    for model in dict.fromkeys(r.model for r in reached):
        for outcome, use in advice.USES.items():
            mine = [r for r in reached if r.model == model and r.outcome == outcome]
            if mine:
                found.append(_advice(model, outcome, use, mine))
    return found


def _advice(model: str, outcome: str, use: str, mine: list[advice.Reach]) -> Finding:
    intact = advice.best(mine, model, outcome, "intact")
    kept = advice.best(mine, model, outcome, "kept")
    parts = [
        f"for {use} compress {model} by {intact.intact} at most ({100 * intact.intact_saved:.0f} % of the bytes "
        "saved), which is the furthest of all methods tried that stays intact"
        if intact
        else f"for {use} nothing that was tried on {model} is surely intact"
    ]
    if kept:
        parts.append(
            f"if {100 * advice.KEPT:.0f} % of the score will do, {kept.kept} saves most ({100 * kept.kept_saved:.0f} %)"
        )
    else:
        parts.append(f"nothing keeps {100 * advice.KEPT:.0f} % of the score")
    claim = "; ".join(parts)
    saved = intact.intact_saved if intact else 0.0
    return Finding(
        f"{claim[0].upper()}{claim[1:]}.", saved, None, sum(r.tried for r in mine), model,
        f"{EVIDENCE}, advice", "verdict",
        {"outcome": outcome, "intact": intact.intact if intact else "", "kept": kept.kept if kept else "",
         "evidence": [f"{r.method}: intact to {r.intact or 'none'}, {advice.KEPT:g} to {r.kept or 'none'} (of {r.tried})" for r in mine]},
    )  # fmt: skip
