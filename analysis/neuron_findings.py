"""What cuts of neurons say, in sentences: within a cell, and across orders, ratios and seeds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

from . import collapse, neurons
from .finding import Finding, claimed
from .statistics import Interval

WHERE = "all cells"


def across(cells: Mapping[str, xr.DataTree]) -> list[Finding]:
    """The findings of all cells that cut neurons."""
    found = neurons.cuts(cells)
    table = neurons.grouped(found)
    result = [
        _specific(target, order, ratios) for (target, order), ratios in table.items()
    ]  # fmt: skip
    result += [_contrast(row) for row in neurons.contrasts(found)]
    for (target, order), ratios in table.items():
        row = neurons.threshold(target, order, ratios) if len(ratios) > 1 else None
        if row is not None:
            result.append(_threshold(row))
    rows = neurons.savings(cells)
    return [f for f in [*result, _saving(rows[-1]) if rows else None] if f is not None]


def _saving(row: neurons.Saving) -> Finding:
    """At the largest ratio, where most is saved."""

    def words(span: Interval) -> str:
        return f"×{span.value:.2f} ({span.low:.2f} to {span.high:.2f})"

    claim = (
        f"{row.share:.0%} of the neurons cut: {row.parameters:.0%} of the parameters and {row.memory:.0%} of the "
        f"memory at its peak are left; it reads {words(row.reads)} and writes {words(row.writes)} as fast as the "
        f"dense model, measured in turn over {row.cells} cell{'s' * (row.cells != 1)} (in brackets the range of "
        "the rounds)."
    )
    return claimed(claim, row.writes, row.cells, WHERE, "/cost, neurons", level="note")


def _seeds(count: int) -> str:
    few = f", where {neurons.LEAST_SEEDS} are needed to tell it from the draw"
    return f"over {count} seed{'s' * (count != 1)}{few if count < neurons.LEAST_SEEDS else ''}"


def _specific(target: str, order: str, ratios: Mapping[float, list[neurons.Cut]]) -> Finding | None:
    """The ratio at which the target and the rest are furthest apart."""
    points = [p for p in neurons.curve(ratios) if p.specific is not None]
    if not points:
        return None
    worst = max(points, key=lambda p: abs(p.specific.value))  # type: ignore[union-attr]
    gap, mine, rest = worst.specific, worst.target, worst.rest
    assert gap is not None
    assert mine is not None
    assert rest is not None
    if max(mine.high, rest.high) <= collapse.COLLAPSED:
        verdict = "it destroys both, so that nothing can be told apart"
    elif gap.low > 0:
        verdict = f"it harms {target} more than the rest"
    elif gap.high < 0:
        verdict = f"it harms {target} less than the rest"
    elif rest.high < collapse.INTACT:
        verdict = f"it harms {target} and the rest alike, so nothing here is specific to a task"
    else:
        verdict = f"no difference between {target} and the rest can be told"
    claim = (
        f"neurons-{order}, {worst.share:.0%} cut, {_seeds(worst.seeds)}: retention of {target} {mine}, of the "
        f"other tasks {rest}; difference {gap.value:.2f} ({gap.low:.2f} to {gap.high:.2f}): {verdict}."
    )
    n = sum(len(t.dense) for t in neurons.tasks_of(ratios[worst.asked], target))
    return claimed(
        claim, gap, n, WHERE, "/scores, neurons", order=order, target=target, asked=worst.asked,
        seeds=worst.seeds, of_target=list(mine), of_rest=list(rest),
    )  # fmt: skip


def _contrast(row: neurons.Contrast) -> Finding:
    sure = row.p_value < collapse.ALPHA and np.sign(row.difference.low) == np.sign(
        row.difference.high
    )
    verdict = "told apart" if sure else "not told apart"
    more = row.difference.value >= 0
    size, *ends = (v if more else -v for v in row.difference)
    claim = (
        f"At {row.asked:.0%}, {_seeds(row.seeds)}: beside the other tasks neurons-{row.order} "
        f"{'costs' if more else 'spares'} {row.target} more than neurons-{row.rival} does, by {size:.2f} "
        f"({min(ends):.2f} to {max(ends):.2f}; signs flipped, Holm: p = {row.p_value:.2g}): {verdict}."
    )
    return claimed(
        claim, row.difference, row.n, WHERE, "/scores, neurons", order=row.order, rival=row.rival,
        target=row.target, asked=row.asked, seeds=row.seeds, p_value=row.p_value,
    )  # fmt: skip


def _threshold(row: neurons.Threshold) -> Finding:
    upto = (
        f"up to {row.harmless:.0%} cut, the interval of retention of {row.target} stays above {collapse.INTACT}"
        if row.harmless
        else f"the interval of retention of {row.target} is below {collapse.INTACT} from the first ratio on"
    )
    claim = f"neurons-{row.order}: {upto} (tried: {', '.join(f'{r:.0%}' for r in row.tried)})"
    estimate = row.change if row.drop < collapse.INTACT - 1 else None  # else there is no step
    if estimate is not None:
        claim += (
            f"; two levels fit best with the step at {estimate.value:.1%} ({estimate.low:.1%} to "
            f"{estimate.high:.1%}), {row.drop:+.2f} from none to the last"
        )
    return Finding(
        f"{claim}.", row.harmless, None, len(row.tried), WHERE, "/scores, neurons", "finding",
        {"order": row.order, "target": row.target, "change": list(estimate) if estimate else None},
    )  # fmt: skip
