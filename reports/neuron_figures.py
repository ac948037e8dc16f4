"""Neurons: how selective they are and where, and what tasks keep as they are cut away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from ..analysis import collapse, neurons
from .picture import STYLE, Picture, finish, having, safe

COLOURS = {"target": "#882255", "rest": "#4477aa"}


def drawn(cells: Mapping[str, xr.DataTree]) -> list[Picture]:
    """`cut` and `savings` in our style, for a page of its own."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        return [*cut(cells), *savings(cells)]


def cut(cells: Mapping[str, xr.DataTree]) -> list[Picture]:
    """Retention of the target task and of the others along the ratios, a panel for each order."""
    curves = {
        key: neurons.curve(ratios) for key, ratios in neurons.grouped(neurons.cuts(cells)).items()
    }
    table = {key: p for key, p in curves.items() if any(x.target or x.rest for x in p)}
    if not table:
        return []
    targets, orders = (list(dict.fromkeys(names)) for names in zip(*table, strict=True))
    shape = len(targets), len(orders)
    figure = Figure(figsize=(max(5.6, 2.5 * shape[1] + 0.8), 3.0 * shape[0] + 0.4))
    grid = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False)
    for axis in grid.ravel():
        axis.set_visible(False)
    told: list[str] = []
    for (target, order), points in table.items():
        axis = grid[targets.index(target), orders.index(order)]
        axis.set_visible(True)
        axis.tick_params(labelbottom=True)
        axis.axhline(collapse.INTACT, color="#999999", lw=0.8, ls="--")
        for side, colour in COLOURS.items():
            known = [(p.share, span) for p in points if (span := getattr(p, side)) is not None]
            _line(axis, known, colour, target if side == "target" else "other tasks")
        axis.set_title(f"{order}, {target}", fontsize=9)
        axis.set_xlabel("share of neurons cut")
        told += [
            f"{order}, {target}, {p.share:.0%}: {_number(p.target)} and {_number(p.rest)}"
            for p in points
        ]
    for row in grid:
        first = next(axis for axis in row if axis.get_visible())
        first.set_ylabel("retention, mean over tasks")
        first.tick_params(labelleft=True)
        first.legend(frameon=False, fontsize=7.5)
    figure.tight_layout()
    caption = (
        "What is kept as MLP neurons are cut out: the target task, by which they were ranked, and all other tasks; "
        "means over tasks and seeds, bands 95 % over items. Dashed: the limit of “intact”. An order is specific to "
        "the task where the two curves part, and salience is the rival explanation: importance alone."
    )
    return [finish("neurons", figure, caption, f"Retention of target and rest. {'; '.join(told)}.")]


def savings(cells: Mapping[str, xr.DataTree]) -> list[Picture]:
    """Parameters, memory and speed along the ratios."""
    rows = neurons.savings(cells)
    if not rows:
        return []
    figure = Figure(figsize=(7.2, 2.9))
    held, speed = figure.subplots(1, 2, sharex=True)
    for name, colour in (("parameters", COLOURS["rest"]), ("memory", COLOURS["target"])):
        _line(held, [(r.share, [getattr(r, name)] * 3) for r in rows], colour, name)
    for name, colour in (("reads", COLOURS["rest"]), ("writes", COLOURS["target"])):
        _line(speed, [(r.share, getattr(r, name)) for r in rows], colour, name)
    held.set_title("left of the dense model's", fontsize=9)
    held.set_ylim(0, 1.05)
    speed.set_title("tokens per second over the dense model's", fontsize=9)
    speed.axhline(1, color="#999999", lw=0.8, ls="--")
    for axis in (held, speed):
        axis.set_xlabel("share of neurons cut")
        axis.legend(frameon=False, fontsize=7.5)
    figure.tight_layout()
    caption = (
        "What cutting neurons saves: parameters and peak memory while 4 × 128 tokens are read (left), speed of "
        "reading and of writing, both models in turn (right; bands: range of rounds and cells)."
    )
    told = "; ".join(
        f"{r.share:.0%}: parameters {r.parameters:.2f}, memory {r.memory:.2f}, reads ×{r.reads.value:.2f}, "
        f"writes ×{r.writes.value:.2f}"
        for r in rows
    )
    return [finish("savings", figure, caption, f"Savings. {told}.")]


def _line(
    axis: Any, known: Sequence[tuple[float, Sequence[float]]], colour: str, label: str
) -> None:
    """Value, low and high at each share cut, from 1 where nothing is."""
    x = [0.0, *(share for share, _ in known)]
    rows = [(1.0, 1.0, 1.0), *(tuple(span) for _, span in known)]
    value, low, high = (np.array(v) for v in zip(*rows, strict=True))
    axis.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
    axis.plot(x, value, "o-", ms=3.5, lw=1.4, color=colour, label=label)


def _number(span: tuple[float, ...] | None) -> str:
    return "not known" if span is None else f"{span[0]:.2f}"


def selectivity(cells: Mapping[str, xr.DataTree]) -> list[Picture]:
    """Distribution of selectivity in every layer, and where the most selective tenth is."""
    return [_selectivity(name, data) for name, data in having(cells, "neurons").items()]


def _selectivity(name: str, data: xr.Dataset) -> Picture:
    values = data.selectivity.sel(metric="normalised").values
    there = np.flatnonzero(np.isfinite(values).any(-1))
    figure = Figure(figsize=(9.2, 2.9))
    spread, places = figure.subplots(1, 2)
    low, first, middle, third, high = np.nanquantile(
        values[there], [0.05, 0.25, 0.5, 0.75, 0.95], axis=-1
    )
    spread.fill_between(
        there, low, high, color=COLOURS["target"], alpha=0.15, lw=0, label="5 to 95 %"
    )
    spread.fill_between(
        there, first, third, color=COLOURS["target"], alpha=0.3, lw=0, label="quarters"
    )
    spread.plot(there, middle, color=COLOURS["target"], lw=1.4, label="median")
    spread.axhline(0, color="#999999", lw=0.8, ls="--")
    spread.set_title("(target − control)/(target + control)", fontsize=9)
    spread.legend(frameon=False, fontsize=7.5)
    share = neurons.share_by_layer(data, "normalised")
    places.bar(np.arange(len(share)), share, color=COLOURS["target"], width=0.8)
    places.axhline(0.1, color="#999999", lw=0.8, ls="--")
    places.set_title("share of a layer's neurons in the top 10 %", fontsize=9)
    for axis in (spread, places):
        axis.set_xlabel("layer")
    figure.tight_layout()
    densest = int(np.argmax(share))
    caption = (
        f"{name}: how much more the target task excites each MLP neuron than the control texts do, and in which "
        "layers the most selective tenth of all neurons is. Dashed on the right: where they would be if layers were alike."
    )
    told = f"Most of the top tenth is in layer {densest}: {share[densest]:.0%} of its neurons."
    return finish(f"neurons-{safe(name)}", figure, caption, told)
