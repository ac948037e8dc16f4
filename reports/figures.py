"""Figures: what `analysis` computed, drawn. Each comes with the text that says what it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..analysis import collapse, decoding, hierarchy, theory
from .cause_figures import causes
from .neuron_figures import cut, savings, selectivity
from .picture import STYLE, Picture, finish, having, safe
from .task_figures import subspace

COLOURS = {"h": "#4477aa", "z": "#228833", "p": "#cc3311", "kl": "#882255"}
HISTORIES = {"step": "#4477aa", "forced": "#228833", "free": "#cc3311", "swapped": "#333333"}
FORMATS = {"choice": "#4477aa", "generation": "#cc6600", "last word": "#117733"}
OFFSETS = {"choice": -0.15, "generation": 0.15}  # of the two halves of a twin
PANELS = 4  # side by side
WIDE = 34  # characters of a title
SPACE_NAMES = {"h": "hidden state h", "z": "logits z", "p": "probabilities p"}


def draw(cells: Mapping[str, xr.DataTree]) -> list[Picture]:
    """Every figure that the cells have data for."""
    with mpl.rc_context(STYLE):
        return [picture for make in FIGURES for picture in make(cells)]


# --- retention -----------------------------------------------------------------------------------


def retention(cells: Mapping[str, xr.DataTree]) -> list[Picture]:
    """Retention of every task, choice beside generation, one panel per cell."""
    rows = {name: collapse.retentions(s) for name, s in having(cells, "scores").items()}
    if not rows:
        return []
    tasks = _by_kind(next(iter(having(cells, "scores").values())))
    across = min(len(rows), PANELS)
    down = -(-len(rows) // across)
    figure = Figure(figsize=(2.6 * across + 1.2, (0.36 * len(tasks) + 0.8) * down + 0.5))
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    for axis, (name, found) in zip(axes, rows.items(), strict=False):
        _retention_panel(axis, found, tasks)
        axis.set_title(name if len(name) < WIDE else name.replace(",", ",\n", 1), fontsize=9)
    for axis in axes[len(rows) :]:
        axis.set_visible(False)
    axes[0].set_yticks(range(len(tasks)), tasks)
    axes[0].set_ylim(len(tasks) - 0.5, -0.5)
    axes[0].set_xlim(-0.35, 1.45)
    figure.supxlabel("retention of the score above chance", fontsize=9)
    handles = [
        Line2D([], [], color=c, marker="o", lw=1.5, label=f)
        for f, c in FORMATS.items()
        if any(r.format == f for found in rows.values() for r in found)
    ]
    figure.legend(
        handles=handles,
        loc="upper right",
        ncols=len(handles),
        frameon=False,
        bbox_to_anchor=(1, 1.06),
    )
    figure.tight_layout()
    told = "; ".join(
        f"{name}: " + ", ".join(_told(r) for r in found) for name, found in rows.items()
    )
    caption = (
        "Retention of each task's score above chance, with 95 % paired bootstrap intervals. Dashed: the "
        "limits of “intact” (0.95) and “collapsed” (0.10). Hollow: the dense model is not above chance. "
        "Values beyond the axis are drawn at its edge."
    )
    return [finish("retention", figure, caption, f"Retention by task and format. {told}.")]


def _by_kind(scores: xr.Dataset) -> list[str]:
    """Task names, those of one kind together, kinds in the order in which they were asked."""
    tasks = scores.task.values.tolist()
    kinds = scores.kind.values.tolist() if "kind" in scores.coords else [""] * len(tasks)
    order = list(dict.fromkeys(kinds))
    return sorted(dict.fromkeys(tasks), key=lambda t: order.index(kinds[tasks.index(t)]))


def _told(row: collapse.Retention) -> str:
    return f"{row.task} {row.format} {row.retention.value:.2f}"


def _retention_panel(axis: Any, rows: list[collapse.Retention], tasks: list[str]) -> None:
    for limit in (collapse.COLLAPSED, collapse.INTACT):
        axis.axvline(limit, color="#999999", lw=0.8, ls="--")
    for row in rows:
        y = tasks.index(row.task) + (OFFSETS.get(row.format, 0.0))
        value, low, high = (float(np.clip(v, -0.3, 1.4)) for v in row.retention)
        colour, known = FORMATS[row.format], row.verdict != "uninformative"
        if known:
            axis.plot([low, high], [y, y], color=colour, lw=1.5, solid_capstyle="round")
        axis.plot([value], [y], "o", ms=4.5, color=colour, mfc=colour if known else "white")


# --- hierarchy -----------------------------------------------------------------------------------


def layers(cells: Mapping[str, xr.DataTree]) -> list[Picture]:
    """1 - cosine in h, z and p by layer, and KL, one row of panels per cell (paper's Figures 2, 6)."""
    return [_layers(name, data) for name, data in having(cells, "shifts").items()]


def _layers(name: str, data: xr.Dataset) -> Picture:
    figure = Figure(figsize=(9.2, 5.2))
    axes = figure.subplots(2, 2).ravel()
    angular, kl = hierarchy.by_layer(data.angular), hierarchy.by_layer(data.kl)
    for axis, effect in zip(axes[:2], ("local", "propagated"), strict=True):
        for space, colour in COLOURS.items():
            if space != "kl":
                _curve(axis, angular.sel(effect=effect, space=space), colour, SPACE_NAMES[space])
        axis.set_title(f"1 − cosine, {effect}", fontsize=9)
    for effect, style in (("local", ":"), ("propagated", "-")):
        _curve(axes[2], kl.sel(effect=effect), COLOURS["kl"], effect, style)
    axes[2].set_title("KL(p‖p′), nat", fontsize=9)
    steps = hierarchy.amplification_by_layer(data.angular).sel(effect="propagated")
    axes[3].axhline(1, color="#999999", lw=0.8, ls="--")
    for step, colour in zip(steps.step.values, (COLOURS["z"], COLOURS["p"]), strict=True):
        _curve(axes[3], steps.sel(step=step), colour, str(step).replace("->", " → "))
    axes[3].set_title("amplification of 1 − cosine, propagated", fontsize=9)
    for axis in axes:
        axis.set_xlabel("layer")
        axis.set_yscale("log")
        axis.set_xlim(-0.5, data.sizes["layer"])
    for axis in axes[1:]:
        axis.legend(frameon=False, fontsize=7.5)
    figure.tight_layout()
    last = angular.sel(effect="propagated").isel(layer=-1, site=-1)["mean"]
    told = ", ".join(f"{SPACE_NAMES[s]} {float(last.sel(space=s)):.2g}" for s in ("h", "z", "p"))
    caption = (
        f"{name}: how far candidate and dense model are apart after each sublayer (attention at the number "
        "of the layer, MLP half a step later), read out through the "
        f"{'final norm' if data.attrs.get('lens') == 'norm' else 'raw lens'}. Local: this sublayer's "
        "compression alone, on the dense model's own input. Propagated: what has come together so far. "
        "Amplification: mean 1 − cosine of one space over that of the one before it; above 1 magnified. "
        "Bands: 95 % over prompts; no point means exactly no shift."
    )
    alternative = f"Curves over layers for {name}. After the last layer, 1 minus cosine is: {told}."
    return finish(f"layers-{safe(name)}", figure, caption, alternative)


def _curve(axis: Any, data: xr.Dataset, colour: str, label: str, style: str = "-") -> None:
    """One value per site, in forward order; zeros are left out of a logarithmic axis."""
    ordered = data.transpose("layer", "site", ...)
    x = (ordered.layer.values[:, None] + np.array([0.0, 0.5])).ravel()
    mean, low, high = (ordered[n].values.ravel() for n in ("mean", "low", "high"))
    mean = np.where(mean > 0, mean, np.nan)
    marker = "o" if np.isfinite(mean).sum() < 20 else None
    axis.plot(x, mean, style, color=colour, lw=1.4, label=label, marker=marker, ms=3)
    axis.fill_between(x, np.where(low > 0, low, np.nan), high, color=colour, alpha=0.15, lw=0)


# --- theory --------------------------------------------------------------------------------------


def theorems(cells: Mapping[str, xr.DataTree]) -> list[Picture]:
    """Estimate against exact value: angle in p (Theorem 2) and KL (Theorem 3), one column per cell."""
    found = {name: _theory_pairs(cell) for name, cell in cells.items()}
    found = {name: pairs for name, pairs in found.items() if pairs}
    if not found:
        return []
    figure = Figure(figsize=(2.4 * len(found) + 0.8, 4.8))
    axes = figure.subplots(2, len(found), squeeze=False, sharex="row", sharey="row")
    told: list[str] = []
    for column, (name, pairs) in enumerate(found.items()):
        for row, theorem in enumerate(("2", "3")):
            told += _theory_panel(axes[row, column], name, theorem, *pairs[theorem])
        axes[0, column].set_title(name, fontsize=9)
    axes[0, 0].set_ylabel("Var_r[Δz] / 2T²")
    axes[1, 0].set_ylabel("Var_p[Δz] / 2T²")
    for axis in axes[0]:
        axis.set_xlabel("1 − cos(p, p′)", fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("KL(p‖p′), nat", fontsize=8)
    figure.tight_layout()
    caption = (
        "Theory against measurement, all positions, layers and sites (propagated) and the output: the "
        "second-order estimates of 1 − cos(p, p′) and of KL(p‖p′) against the exact values. Solid: equality; "
        "dashed: a factor of 2. Percentages: positions within a factor of 2."
    )
    return [
        finish("theory", figure, caption, "Two-dimensional histograms. " + "; ".join(told) + ".")
    ]


def validity(cells: Mapping[str, xr.DataTree]) -> list[Picture]:
    """Where second order stops: validity and the error that goes with it, against bytes saved."""
    found: dict[str, tuple[float, theory.Departure]] = {}
    for name, cell in cells.items():
        if {"output", "cost"} <= set(cell.children):
            output, cost = cell["output"].to_dataset(), cell["cost"].to_dataset()
            departure = theory.departure(output, float(output.attrs.get("temperature", 1.0)))
            packed = cost.bytes_packed.sel(model=["dense", "candidate"]).values
            if departure is not None:
                found[name] = (100 * (1 - packed[1] / packed[0]), departure)
    if not found:
        return []
    figure = Figure(figsize=(9.2, 3))
    axes = figure.subplots(1, 2)
    for axis, field, title in (
        (axes[0], "validity", "third order over second, |κ₃| / 3κ₂T"),
        (axes[1], "error", "relative error of Var_p[Δz] / 2T²"),
    ):
        for name, (saved, departure) in found.items():
            value, low, high = getattr(departure, field)
            axis.plot([saved, saved], [low, high], color=COLOURS["kl"], lw=1.5)
            axis.plot([saved], [value], "o", ms=4.5, color=COLOURS["kl"])
            axis.annotate(name, (saved, value), (5, 4), textcoords="offset points", fontsize=7.5)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("bytes saved, packed, %")
        values = [getattr(d, field).value for _, d in found.values()]
        if max(values) > 20 * max(min(values), 1e-12):
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.margins(x=0.25)
    figure.tight_layout()
    told = "; ".join(
        f"{n}: {saved:.0f} % saved, validity {d.validity.value:.2g}, error {d.error.value:.2g}"
        for n, (saved, d) in found.items()
    )
    caption = (
        "How far second order describes each candidate, against the amount of compression: medians over "
        "the positions at the output, 95 % over prompts. Well below 1 on the left, Theorems 2 and 3 hold."
    )
    return [finish("validity", figure, caption, f"Points by bytes saved. {told}.")]


# --- decoding ------------------------------------------------------------------------------------


def histories(cells: Mapping[str, xr.DataTree]) -> list[Picture]:
    """The four histories on one axis, survival observed and predicted, and temperature, by cell."""
    return [
        _decoding(name, cell["steps"].to_dataset(), cell)
        for name, cell in cells.items()
        if "steps" in cell.children and float(cell["steps"].kl.max()) > 0
    ]


def _decoding(name: str, steps: xr.Dataset, cell: xr.DataTree) -> Picture:
    figure = Figure(figsize=(9.2, 3.1))
    axes = figure.subplots(1, 3, width_ratios=[1.5, 1.1, 1])
    curves = decoding.curves(steps)
    for history, colour in HISTORIES.items():
        _step_curve(axes[0], curves.sel(history=history), colour, history)
    axes[0].set_yscale("log")
    axes[0].set_title("KL(p‖p′) by history, nat", fontsize=9)
    axes[0].set_xlabel("step")
    axes[0].legend(frameon=False, fontsize=7.5, ncols=2)
    life = decoding.survival(steps)
    _survival_panel(axes[1], life, bool(steps.attrs.get("sampled")))
    if "temperatures" in cell.children:
        _temperature_panel(axes[2], cell["temperatures"].to_dataset())
    figure.tight_layout()
    caption = (
        f"{name}, decoding. Left: step: the dense text and the dense cache, one compressed step; forced: its own "
        "cache; free: its own text; swapped: the dense model on that text, no compressed weight at all. Middle: "
        "share of texts that are still the dense text (Kaplan–Meier), and the band predicted from the forced pass "
        "for draws with common random numbers. Right: mean KL of the same logits at other temperatures. Bands and "
        "bars: 95 % over prompts."
    )
    last = ", ".join(f"{h} {float(curves.value.sel(history=h).mean()):.2g}" for h in HISTORIES)
    alternative = f"Decoding of {name}. Mean KL over the steps: {last} nat. {life.parted} of {life.prompts} texts part."
    return finish(f"decoding-{safe(name)}", figure, caption, alternative)


def _step_curve(axis: Any, data: xr.Dataset, colour: str, label: str) -> None:
    value, low, high = (
        np.where(data[n].values > 1e-12, data[n].values, np.nan) for n in ("value", "low", "high")
    )
    style = "--" if label == "swapped" else "-"
    axis.plot(data.step.values, value, style, color=colour, lw=1.4, label=label)
    axis.fill_between(data.step.values, low, high, color=colour, alpha=0.13, lw=0)


def _survival_panel(axis: Any, life: decoding.Survival, sampled: bool) -> None:
    label = "predicted" if sampled else "predicted, were it drawn"
    axis.fill_between(
        life.step, life.lower, life.upper, color="#4477aa", alpha=0.25, lw=0, label=label
    )
    axis.step(life.step, life.observed, where="post", color="#cc3311", lw=1.4, label="observed")
    axis.fill_between(
        life.step, life.low, life.high, step="post", color="#cc3311", alpha=0.13, lw=0
    )
    axis.axhline(0.5, color="#999999", lw=0.8, ls="--")
    axis.set_ylim(-0.02, 1.02)
    axis.set_title("share of texts not yet parted", fontsize=9)
    axis.set_xlabel("tokens")
    axis.legend(frameon=False, fontsize=7.5)


def _temperature_panel(axis: Any, temperatures: xr.Dataset) -> None:
    data = decoding.by_temperature(temperatures)
    for history, colour in HISTORIES.items():
        line = data.sel(history=history)
        value, low, high = (line[n].values for n in ("value", "low", "high"))
        bars = [np.maximum(value - low, 0), np.maximum(high - value, 0)]
        axis.errorbar(
            line.temperature.values, value, yerr=bars, color=colour, lw=1.2, marker="o", ms=3
        )
    axis.set_yscale("log")
    axis.set_title("mean KL, nat", fontsize=9)
    axis.set_xlabel("temperature T")


def _theory_pairs(cell: xr.DataTree) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    parts: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []
    for group in ("shifts", "output"):
        if group in cell.children:
            data = cell[group].to_dataset()
            data = data.sel(effect="propagated") if group == "shifts" else data
            parts.append(theory.pairs(data, float(data.attrs.get("temperature", 1.0))))
    if not parts:
        return {}
    joined = {
        k: (np.concatenate([p[k][0] for p in parts]), np.concatenate([p[k][1] for p in parts]))
        for k in ("2", "3")
    }
    return joined if all(len(pair[0]) >= 8 for pair in joined.values()) else {}


def _theory_panel(
    axis: Any, name: str, theorem: str, exact: np.ndarray, estimate: np.ndarray
) -> list[str]:
    low = max(1e-7, float(np.quantile(exact, 0.002)))
    high = float(max(exact.max(), np.quantile(estimate, 0.998)))
    bins = np.geomspace(low, high, 46).tolist()
    axis.hist2d(exact, estimate, bins=[bins, bins], cmap="Blues", norm=LogNorm(), rasterized=True)
    axis.set_xscale("log")
    axis.set_yscale("log")
    line = np.array([low, high])
    axis.plot(line, line, color="#333333", lw=0.8)
    for factor in (0.5, 2):
        axis.plot(line, factor * line, color="#333333", lw=0.6, ls="--")
    result = theory.fit(theorem, exact, estimate)
    if result is None:
        return []
    axis.text(
        0.04, 0.96, f"{100 * result.within:.0f} %", transform=axis.transAxes, va="top", fontsize=9
    )
    return [
        f"{name}, Theorem {theorem}: {100 * result.within:.0f} % of positions within a factor of 2"
    ]


FIGURES: tuple[Callable[[Mapping[str, xr.DataTree]], list[Picture]], ...] = (
    retention,
    subspace,
    cut,
    savings,
    selectivity,
    layers,
    theorems,
    validity,
    causes,
    histories,
)
"""Every figure. A new one is a function from cells to pictures, and a row here."""
