"""What multiple choice reads and what it does not, drawn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from ..analysis.statistics import bootstrap
from .picture import Picture, finish, having

COLOURS = {"options": "#117733", "top": "#cc6600", "whole": "#882255"}
LABELS = {"options": "the options", "top": "dense top 10", "whole": "whole vocabulary"}
FLOOR = 1e-7  # nat, the least that a logarithmic axis shows


def subspace(cells: Mapping[str, xr.DataTree]) -> list[Picture]:
    """KL over the options, the head and the whole vocabulary on the same positions (Figure 7)."""
    rows = having(cells, "subspace")
    if not rows:
        return []
    figure = Figure(figsize=(7.6, 0.7 + 0.75 * len(rows)))
    axis = figure.subplots()
    told: list[str] = []
    for y, (name, data) in enumerate(rows.items()):
        kl = np.maximum(data.kl.values.astype(float), FLOOR)
        for k, subset in enumerate(data.subset.values.tolist()):
            place = y + 0.24 * (k - 1)
            jitter = np.random.default_rng(k).uniform(-0.08, 0.08, len(kl))
            axis.plot(kl[:, k], place + jitter, ".", ms=2.5, alpha=0.35, color=COLOURS[subset])
            mean = bootstrap(lambda pick, k=k, kl=kl: kl[pick, k].mean(-1), len(kl))
            axis.plot([mean.low, mean.high], [place] * 2, color="black", lw=1.6)
            axis.plot([mean.value], [place], "o", ms=5, mec="black", color=COLOURS[subset],
                      label=LABELS[subset] if y == 0 else None)  # fmt: skip
            told.append(f"{name}, {LABELS[subset]}: {mean.value:.3g}")
    axis.set_xscale("log")
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel("KL(p‖p′) over the subset, renormalised, nat")
    figure.legend(loc="upper right", ncols=3, frameon=False, bbox_to_anchor=(1, 1.08))
    figure.tight_layout()
    caption = (
        "Where the letter of a multiple-choice answer is predicted: how far the probabilities of the options alone, of "
        "the dense model's ten likeliest tokens and of the whole vocabulary move. One dot an item; means with 95 % "
        "intervals. Multiple choice reads the options only."
    )
    return [finish("subspace", figure, caption, f"Mean KL by subset. {'; '.join(told)}.")]
