"""Rendering: findings and cells in; one HTML page, one JSON summary and the figures out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import xarray as xr

from ..analysis import (
    Finding,
    causes,
    collapse,
    decoding,
    diagnose,
    hierarchy,
    provenance,
    schema,
    theory,
)
from ..analysis.places import write_text
from . import answers, figures
from .picture import Picture, safe

KINDS = ("layers", "causes", "decoding", "neurons")  # figures of one cell each
CHANGED = 4  # changed answers shown per cell
TASKS = ("/subspace", "/perplexity", "/retrieval", "/similarity", "/scores, benchmarks")
CAUSES = ("/patches", "/memory", "/repairs")  # what the section on causes rests on
STRIPS = 4  # prompts whose texts are shown token by token
SHADE_FULL = 4.0  # nat of KL at which a token is shaded fully
_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Section:
    """What the page says of one cell."""

    name: str
    verdict: list[Finding]
    findings: list[Finding]
    retention: list[collapse.Retention]
    theory: list[theory.Fit]
    texts: list[dict[str, Any]]
    tasked: list[Finding]
    recovered: list[Finding]
    caused: list[Finding]
    blamed: list[causes.Cause]
    blamed_for: str
    flips: list[decoding.Flips]
    calibration: list[decoding.Bin]
    changed: list[dict[str, Any]]
    pictures: list[Picture]
    attributes: dict[str, Any]


def render(
    cells: Mapping[str, xr.DataTree],
    target: Path | str,
    *,
    findings: Sequence[Finding] | None = None,
) -> Path:
    """Write `target` (HTML), and `summary.json`, `figures/` and `answers/` beside it.

    Args:
        cells: the trees of a study, by name.
        target: the HTML file.
        findings: what `diagnose` found (default: it is asked).
    """
    found = list(findings) if findings is not None else diagnose(cells)
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    pictures = figures.draw(cells)
    write_figures(pictures, target.parent / "figures")
    write_text(
        target.parent / "summary.json", json.dumps(summary(cells, found), indent=1, allow_nan=False)
    )
    for file, text in answers.pages(cells, environment(), target).items():
        file.parent.mkdir(exist_ok=True)
        write_text(file, text)
    write_text(target, page(cells, found, pictures))
    return target


def page(
    cells: Mapping[str, xr.DataTree], found: Sequence[Finding], pictures: Sequence[Picture]
) -> str:
    """The whole page as text. Everything that a model wrote is escaped by the template."""
    sections = [_section(name, cell, found, pictures) for name, cell in cells.items()]
    return (
        environment()
        .get_template("report.html.jinja")
        .render(
            sections=sections,
            across=[
                f for f in found if f.where == "all cells" and f.evidence != "/scores, neurons"
            ],
            shared=[
                p for p in pictures if p.name == "neurons" or p.name.split("-")[0] not in KINDS
            ],
            cuts=[f for f in found if f.evidence == "/scores, neurons"],
            verdicts=collapse.VERDICTS,
            theorems=theory.THEOREMS,
            answers=answers.places(cells),
            shade_full=SHADE_FULL,
            elsewhere=("/steps", "/temperatures", *CAUSES, *TASKS),
            provenance=next(iter(sections)).attributes if sections else {},
            made=provenance.stamp(),
        )
    )


def environment() -> jinja2.Environment:
    """Templates, escaping on, with `number`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = _number
    return environment


def summary(cells: Mapping[str, xr.DataTree], found: Sequence[Finding]) -> dict[str, Any]:
    """What the page says, for programs: findings, retention, theory and provenance of each cell."""
    return finite(
        {
            "schema": schema.VERSION,
            "findings": [f.plain() for f in found],
            "cells": {name: _cell_summary(cell) for name, cell in cells.items()},
        }
    )


def _cell_summary(cell: xr.DataTree) -> dict[str, Any]:
    result: dict[str, Any] = {"provenance": _attributes(cell)}
    if "scores" in cell.children:
        rows = collapse.retentions(cell["scores"].to_dataset())
        result["retention"] = [{**r.__dict__, "retention": r.retention._asdict()} for r in rows]
    if "output" in cell.children:
        output = cell["output"].to_dataset()
        result["output"] = {
            str(n): float(hierarchy.prompt_means(v).mean())
            for n, v in output.data_vars.items() if "space" not in v.dims
        }  # fmt: skip
        result["theory"] = [
            f.__dict__ for f in theory.fits(output, float(output.attrs["temperature"]))
        ]
    if "patches" in cell.children:
        result["causes"] = _causes_summary(cell["patches"].to_dataset())
    if "steps" in cell.children:
        result["decoding"] = _decoding_summary(cell["steps"].to_dataset())
    if "cost" in cell.children:
        cost = cell["cost"].to_dataset()
        result["speed"] = {
            str(n): {str(m): float(v.sel(model=m).median()) for m in schema.MODELS}
            for n, v in cost.data_vars.items() if "round" in v.dims
        }  # fmt: skip
        result["cost"] = {
            str(n): dict(zip(v[v.dims[0]].values.tolist(), v.values.tolist(), strict=True))
            for n, v in cost.data_vars.items()
            if v.ndim == 1
        }
    return result


def _causes_summary(patches: xr.Dataset) -> dict[str, Any]:
    """For every figure in which anything was lost: what depths recover and sublayers cause."""
    return {
        figure: {
            "sublayers": [c.__dict__ for c in causes.ranking(patches, figure)],
            "depth": causes.by_depth(patches, figure),
            "parts": causes.by_part(patches, figure),
            "alone": causes.interaction(patches, figure),
        }
        for figure in causes.measurable(patches)
    }


def _decoding_summary(steps: xr.Dataset) -> dict[str, Any]:
    life, curves = decoding.survival(steps), decoding.curves(steps)
    return {
        "factors": {name: list(value) for name, value in decoding.factors(steps).items()},
        "kl": {str(h): curves.value.sel(history=h).values.tolist() for h in curves.history.values},
        "parted": life.parted, "prompts": life.prompts, "median": life.median,
        "half_life": list(life.half_life), "agreement": life.agreement,
        "observed": life.observed.tolist(), "lower": life.lower.tolist(), "upper": life.upper.tolist(),
    }  # fmt: skip


def finite(value: Any) -> Any:
    """NaN and infinities are no JSON: they become null."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value


def _section(
    name: str, cell: xr.DataTree, found: Sequence[Finding], pictures: Sequence[Picture]
) -> Section:
    mine = [f for f in found if f.where == name or f.where.startswith(f"{name}, ")]
    scores = cell["scores"].to_dataset() if "scores" in cell.children else None
    output = cell["output"].to_dataset() if "output" in cell.children else None
    steps = cell["steps"].to_dataset() if "steps" in cell.children else None
    tasks = {row.task for row in collapse.retentions(scores)} if scores is not None else set()
    return Section(
        name,
        [f for f in mine if f.level == "verdict"],
        [
            f
            for f in mine
            if f.level != "verdict"
            and f.where.removeprefix(f"{name}, ") not in tasks
            and not f.evidence.endswith(", recovery")
        ],
        collapse.retentions(scores) if scores is not None else [],
        theory.fits(output, float(output.attrs["temperature"])) if output is not None else [],
        _texts(steps) if steps is not None else [],
        [f for f in mine if f.evidence.startswith(TASKS)],
        [f for f in mine if f.evidence.endswith(", recovery")],
        [f for f in mine if f.evidence.startswith(CAUSES)],
        *_blamed(cell),
        decoding.flips(steps) if steps is not None else [],
        decoding.calibration(steps) if steps is not None else [],
        _changed(scores) if scores is not None else [],
        [p for p in pictures if p.name in {f"{kind}-{safe(name)}" for kind in KINDS}],
        _attributes(cell),
    )


def _blamed(cell: xr.DataTree) -> tuple[list[causes.Cause], str]:
    """Every changed sublayer, worst first, and what they are blamed for."""
    if "patches" not in cell.children:
        return [], ""
    patches = cell["patches"].to_dataset()
    figure = next(iter(causes.measurable(patches)), None)
    if figure is None:
        return [], ""
    return causes.ranking(patches, figure), causes.FIGURES[figure]


def _texts(steps: xr.Dataset) -> list[dict[str, Any]]:
    """Both texts of a few prompts, token by token with the KL of the step: first and last to part."""
    time, parts = decoding.divergence(steps)
    order = np.lexsort((time, ~parts))
    if len(order) > STRIPS:
        order = np.concatenate([order[: STRIPS // 2], order[-(STRIPS // 2) :]])
    return [
        {
            "prompt": str(row.prompt_text.item()),
            "first": int(time[i]) if parts[i] else None,
            "sides": [
                (str(model), _strip(row, str(model), history, int(time[i]) if parts[i] else -1))
                for model, history in (("dense", "forced"), ("candidate", "free"))
            ],
        }
        for i, row in ((int(i), steps.isel(prompt=int(i))) for i in order)
    ]


def _strip(row: xr.Dataset, model: str, history: str, first: int) -> list[dict[str, Any]]:
    token = row.token.sel(model=model).values
    text = row.token_text.sel(model=model).values
    kl = row.kl.sel(history=history).values
    return [
        {
            "text": str(text[t]),
            "kl": None if not np.isfinite(kl[t]) else float(kl[t]),
            "shade": 0 if not np.isfinite(kl[t]) else round(min(1.0, float(kl[t]) / SHADE_FULL), 2),
            "first": t == first,
        }
        for t in np.flatnonzero(token >= 0)
    ]


def _changed(scores: xr.Dataset) -> list[dict[str, Any]]:
    """Generated answers that the dense model had right and the candidate has wrong, tasks in turn."""
    part = scores.isel(item=np.isin(scores.format.values, ("generation", "last word")))
    lost = (part.score.sel(model="dense").values == 1) & (
        part.score.sel(model="candidate").values == 0
    )
    picked: list[int] = []
    for task in dict.fromkeys(part.task.values.tolist()):
        picked += np.flatnonzero(lost & (part.task.values == task))[:1].tolist()
    return [
        {
            "task": str(row.task.item()),
            "prompt": str(row.prompt_text.item()).rsplit("\n", 1)[-1],
            "dense": str(row.text.sel(model="dense").item()),
            "candidate": str(row.text.sel(model="candidate").item()),
        }
        for row in (part.isel(item=i) for i in picked[:CHANGED])
    ]


def _attributes(cell: xr.DataTree) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in cell.attrs.items():
        try:
            result[str(name)] = (
                json.loads(value) if isinstance(value, str) and value[:1] in "{[" else value
            )
        except ValueError:
            result[str(name)] = value
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in result.items()}


def _number(value: float) -> str:
    return "–" if not np.isfinite(value) else f"{value:.2f}"


def write_figures(pictures: Sequence[Picture], folder: Path) -> None:
    """Each picture as an SVG file."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (folder / f"{picture.name}.svg").write_bytes(picture.svg)
