"""A study in pictures: what goes with the collapse, how well it is foretold, pruning beside quantization."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from ..analysis import correlation, forecast, matched
from ..analysis.collapse import COLLAPSED, INTACT
from ..analysis.study_findings import WORDS
from ..analysis.summary import figures
from .picture import STYLE, Picture, finish

SPACES = {"h": "#4477aa", "z": "#228833", "p": "#aa3377"}
KINDS = {"pruning": "#4477aa", "quantization": "#cc6611", "other": "#777777"}
MARKS = {
    "q8_0": 0.0014,
    "q6_K": 0.0055,
    "q4_K_M": 0.031,
    "q3_K_M": 0.10,
    "q2_K": 0.445,
    "iq1_S": 2.2,
}
"""Mean KL of LLaMA-3-8B's quantized files as llama.cpp publishes them: a scale to read ours by."""
SHOWN = 24  # figures in a forest plot
MARKERS = "osD^vP*X<>hpd8"


def draw(study: xr.Dataset) -> list[Picture]:
    """Every figure that the study is large enough for."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        made = [_damage(study), *_forests(study), *_calibrations(study), _kinds(study)]
    return [picture for picture in made if picture is not None]


def _damage(study: xr.Dataset) -> Picture | None:
    """Retention of both formats against mean KL, cell by cell."""
    outcomes = [o for o in correlation.OUTCOMES if o in study]
    if not outcomes or "output_kl" not in study:
        return None
    figure = Figure(figsize=(9.2, 4.0))
    axes = figure.subplots(1, len(outcomes), sharex=True, sharey=True, squeeze=False)[0]
    methods = list(dict.fromkeys(study.method.values.tolist()))
    for axis, outcome in zip(axes, outcomes, strict=True):
        _levels(axis)
        for method, marker in zip(methods, MARKERS * 3, strict=False):
            part = study.isel(cell=np.flatnonzero(study.method.values == method))
            kind = str(part.kind.values[0])
            axis.plot(
                np.maximum(part.output_kl.values, 1e-6), part[outcome].values, marker, ms=5, lw=0,
                alpha=0.8, color=KINDS.get(kind, KINDS["other"]), label=method,
            )  # fmt: skip
        axis.set_title(f"retention of {WORDS[outcome]}", fontsize=9)
        axis.set_xscale("log")
        axis.set_xlabel("mean KL(p‖p′) at the output, nat")
        _scale(axis, study.output_kl.values)
    axes[-1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    caption = (
        "Every cell: what it keeps against its mean KL in one pass over the prompts. Blue: pruned, orange: quantized. "
        "Dashed: limits of intact and collapsed. Above, mean KL of LLaMA-3-8B's quantized files as llama.cpp publishes them."
    )
    low, high = np.nanmin(study.output_kl.values), np.nanmax(study.output_kl.values)
    told = f"{study.sizes['cell']} cells with mean KL from {low:.2g} to {high:.2g} nat."
    return finish("damage", figure, caption, told)


def _levels(axis: Any) -> None:
    for level in (INTACT, COLLAPSED):
        axis.axhline(level, color="#999999", lw=0.8, ls="--")


def _scale(axis: Any, kl: np.ndarray) -> None:
    low, high = np.nanmin(kl), np.nanmax(kl)
    for name, value in MARKS.items():
        if low / 3 <= value <= 3 * high:
            axis.axvline(value, color="#cccccc", lw=0.7)
            axis.text(
                value, 0.02, name, rotation=90, fontsize=6, color="#777777", ha="right", va="bottom",
                transform=axis.get_xaxis_transform(),
            )  # fmt: skip


def _forests(study: xr.Dataset) -> list[Picture]:
    return [
        _forest(ranked, outcome)
        for outcome in correlation.OUTCOMES
        if outcome in study and (ranked := correlation.links(study, outcome))
    ]


def _forest(ranked: list[correlation.Link], outcome: str) -> Picture:
    shown = ranked[:SHOWN][::-1]
    figure = Figure(figsize=(9.2, 0.24 * len(shown) + 1.2))
    axis = figure.subplots()
    described = figures()
    if max(k.spearman.high for k in shown) > -0.3:
        axis.axvline(0, color="#999999", lw=0.8)
    for i, link in enumerate(shown):
        colour = SPACES[link.space]
        axis.plot([link.spearman.low, link.spearman.high], [i, i], color=colour, lw=1.6)
        axis.plot(
            link.spearman.value,
            i,
            "o",
            ms=5,
            color=colour,
            mfc=colour if link.p_value < 0.05 else "white",
        )
        axis.plot(link.given_amount.value, i, "|", ms=8, color="#333333")
        axis.plot(link.given_method.value, i, "x", ms=4, color="#333333")
    axis.set_yticks(
        range(len(shown)),
        [f"{described[k.figure].describe}  [{k.space}]" for k in shown],
        fontsize=7.5,
    )
    axis.set_xlabel(f"Spearman correlation with retention of {WORDS[outcome]}")
    ends = [x for k in shown for x in (k.spearman.low, k.spearman.high, k.given_method.value)]
    axis.set_xlim(min(ends) - 0.05, max(max(ends) + 0.05, 0.02 if max(ends) > -0.3 else -1.0))
    figure.tight_layout()
    caption = (
        f"Which figure goes with the retention of {WORDS[outcome]} over {ranked[0].n} cells: Spearman with 95 % bootstrap "
        f"intervals over cells, the {len(shown)} strongest of {len(ranked)}. Blue h, green z, purple p; filled where Holm's p "
        "is below 0.05. |: given the bytes saved; ×: within methods."
    )
    told = "; ".join(f"{described[k.figure].describe} {k.spearman.value:.2f}" for k in ranked[:6])
    return finish(f"forest-{outcome}", figure, caption, f"Strongest: {told}.")


def _calibrations(study: xr.Dataset) -> list[Picture]:
    found: list[Picture] = []
    for outcome in correlation.OUTCOMES:
        try:
            tried = [t for t in forecast.trials(study, outcome) if t.left_out == "method"]
        except forecast.ForecastError:
            continue
        found.append(_calibration(tried, outcome))
    return found


def _calibration(tried: list[forecast.Trial], outcome: str) -> Picture:
    figure = Figure(figsize=(9.2, 3.2))
    axes = figure.subplots(1, len(tried), sharex=True, sharey=True)
    names = {
        "amount": "bytes saved (baseline)",
        "kl": "log KL, monotone",
        "logistic": "six figures, logistic",
    }
    for axis, trial in zip(axes, tried, strict=True):
        axis.plot([0, 1], [0, 1], color="#999999", lw=0.8, ls="--")
        axis.plot(trial.predicted, trial.observed, "o", ms=4, alpha=0.7, color="#4477aa")
        _binned(axis, trial)
        axis.set_title(f"{names[trial.model]}: error {trial.error.value:.2f}", fontsize=9)
        axis.set_xlabel("foretold")
    axes[0].set_ylabel(f"retention of {WORDS[outcome]}")
    figure.tight_layout()
    caption = (
        f"Retention of {WORDS[outcome]} as foretold for cells of a method that was left out, against what they kept; "
        "squares: means of quarters. On the dashed line forecasts are right on average."
    )
    told = "; ".join(f"{names[t.model]}: mean absolute error {t.error.value:.2f}" for t in tried)
    return finish(f"forecast-{outcome}", figure, caption, told)


def _binned(axis: Any, trial: forecast.Trial) -> None:
    order = np.argsort(trial.predicted, kind="stable")
    parts = np.array_split(order, 4)
    x, y = (
        [float(v[p].mean()) for p in parts if len(p)] for v in (trial.predicted, trial.observed)
    )
    axis.plot(x, y, "s-", ms=6, color="#aa3377", lw=1)


def _kinds(study: xr.Dataset) -> Picture | None:
    """Retention of generation along each fair axis, pruned beside quantized."""
    outcome = correlation.OUTCOMES[0]
    axes_of = [a for a in matched.AXES if a in study and np.isfinite(study[a].values).any()]
    if outcome not in study or not axes_of or len(set(study.kind.values) & set(matched.KINDS)) < 2:
        return None
    figure = Figure(figsize=(9.2, 3.4))
    axes = figure.subplots(1, len(axes_of), sharey=True, squeeze=False)[0]
    names = {
        "compression": "share of stored bytes saved",
        "output_kl": "mean KL at the output, nat",
        "decode_speed": "decoding speed, × dense",
    }
    for axis, name in zip(axes, axes_of, strict=True):
        _levels(axis)
        for kind in matched.KINDS:
            keep = (study.kind.values == kind) & ~np.isin(study.method.values, matched.CONTROLS)
            axis.plot(
                study[name].values[keep],
                study[outcome].values[keep],
                "o",
                ms=4.5,
                alpha=0.75,
                color=KINDS[kind],
                label=kind,
            )
        if name == "output_kl":
            axis.set_xscale("log")
        axis.set_xlabel(names[name])
    axes[0].set_ylabel(f"retention of {WORDS[outcome]}")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    caption = (
        "Pruning beside quantization at equal bytes, equal damage in one pass and equal speed (simulated rounding and "
        "zeros write no faster than the dense model). Controls are left out."
    )
    told = "; ".join(
        f"{matched.AXES[m.axis]}: quantized less pruned {m.difference}"
        for m in matched.matches(study, outcome)
    )
    return finish("kinds", figure, caption, told or "The kinds share no range.")
