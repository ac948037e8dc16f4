"""Where the damage is caused, drawn: layers from bottom to top."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..analysis import causes as found
from ..analysis.cause_findings import NAMES, place
from .picture import Picture, finish, safe

COLOURS = {"attn": "#4477aa", "mlp": "#cc6600"}
SPANS = {"all": "#333333", "last": "#aa3377"}
SPAN_NAMES = {"all": "at all tokens", "last": "where the answer is predicted"}
OFFSET = {"attn": -0.18, "mlp": 0.18}


def causes(cells: Mapping[str, xr.DataTree]) -> list[Picture]:
    """What each sublayer causes, what each layer recovers, whose memory it is; one row a cell."""
    pictures: list[Picture] = []
    for name, cell in cells.items():
        if "patches" not in cell.children:
            continue
        patches = cell["patches"].to_dataset()
        figures = found.measurable(patches)
        if figures and patches.changed.values.any():
            pictures.append(_causes(name, cell, patches, figures[0]))
    return pictures


def _causes(name: str, cell: xr.DataTree, patches: xr.Dataset, figure: str) -> Picture:
    layers = patches.sizes["layer"]
    remembers = "memory" in cell.children
    drawn = Figure(figsize=(9.6 if remembers else 7.2, 1.4 + 0.13 * layers))
    widths = [1.3, 1, 1] if remembers else [1.3, 1]
    axes = drawn.subplots(1, len(widths), sharey=True, width_ratios=widths)
    ranked = found.ranking(patches, figure)
    _bars(axes[0], ranked)
    axes[0].set_title(f"share of the {found.FIGURES[figure]}", fontsize=9)
    _depth(axes[1], found.by_depth(patches, figure))
    if remembers:
        _memory(axes[2], cell["memory"].to_dataset())
    axes[0].set_ylim(-0.7, layers - 0.3)
    axes[0].set_ylabel("layer")
    drawn.tight_layout()
    caption = (
        f"{name}, layers from bottom to top. Left: what each changed sublayer causes, the mean of what it does alone in "
        "the dense model and of what comes back when it alone is made dense. Middle: share recovered by the dense "
        "residual stream, written in after the layer; where the line climbs, the damage is done."
    )
    if remembers:
        caption += " Right: KL of decoding steps when all layers up to here remember with the dense model's keys and values."
    worst = "; ".join(f"{place(c.layer, c.site)} {100 * c.share.value:.0f} %" for c in ranked[:5])
    alternative = f"Causes of {name} by sublayer, worst first: {worst}."
    return finish(
        f"causes-{safe(name)}", drawn, caption + " Bars and bands: 95 % over prompts.", alternative
    )


def _bars(axis: Any, ranked: list[found.Cause]) -> None:
    for site, colour in COLOURS.items():
        mine = [c for c in ranked if c.site == site]
        at = [c.layer + OFFSET[site] for c in mine]
        axis.barh(at, [c.share.value for c in mine], 0.34, color=colour)
        for y, cause in zip(at, mine, strict=True):
            axis.plot(cause.share[1:], [y, y], color="#222222", lw=0.8)
    axis.axvline(0, color="#666666", lw=0.8)
    handles = [Patch(color=colour, label=NAMES[site]) for site, colour in COLOURS.items()]
    axis.legend(handles=handles, frameon=False, fontsize=7.5, loc="lower right")


def _depth(axis: Any, curves: dict[str, list[Any]]) -> None:
    for span, colour in SPANS.items():
        if span not in curves:
            continue
        value, low, high = np.array(curves[span]).T
        at = np.arange(len(value))
        axis.plot(value, at, color=colour, lw=1.4, label=SPAN_NAMES[span])
        axis.fill_betweenx(at, low, high, color=colour, alpha=0.13, lw=0)
    for limit in (0, 1):
        axis.axvline(limit, color="#999999", lw=0.8, ls="--")
    axis.set_title("share recovered by the dense stream", fontsize=9)
    axis.legend(frameon=False, fontsize=7.5, loc="upper left")


def _memory(axis: Any, memory: xr.Dataset) -> None:
    kl = memory.kl.transpose("prompt", "cut").values.astype(float)
    band = [found.mean(kl[:, cut]) for cut in range(kl.shape[1])]
    value, low, high = np.array(band).T
    at = np.arange(len(value)) - 1
    axis.plot(value, at, color="#228833", lw=1.4)
    axis.fill_betweenx(at, low, high, color="#228833", alpha=0.13, lw=0)
    axis.set_xlim(left=0)
    axis.set_title("KL with dense memory up to here, nat", fontsize=9)
