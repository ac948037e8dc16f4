"""The page of a study: what its cells say together, with the table of them all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ..analysis import (
    Finding,
    correlation,
    matched,
    neuron_findings,
    open_study,
    provenance,
    recovery,
    schema,
    study_findings,
)
from ..analysis.places import place, write_text
from ..probes.recipe import Recipe, RecipeError
from . import neuron_figures, study_figures
from .picture import Picture
from .render import environment, finite, write_figures
from .sweep import Failure, failures

COLUMNS = (
    "compression", "output_kl", "retention_choice", "retention_choice_low", "retention_choice_high",
    "retention_generation", "retention_generation_low", "retention_generation_high", "decode_speed",
)  # fmt: skip
LABELS = ("model", "recipe", "method", "kind")


def render_study(folder: Path, target: Path) -> Path:
    """Write `target` (HTML), with `summary.json`, `cells.csv` and `figures/` beside it.

    Args:
        folder: what `sweep` wrote.
        target: the HTML file.

    Raises:
        SchemaError: no cell is finished.
    """
    study = open_study(folder)
    cut, failed = _neurons(study), failures(folder)
    found = [*study_findings.tell(study), *neuron_findings.across(cut), *_recovered(study)]
    pictures = [*study_figures.draw(study), *neuron_figures.drawn(cut)]
    target.parent.mkdir(parents=True, exist_ok=True)
    write_figures(pictures, target.parent / "figures")
    told = {
        "schema": schema.VERSION,
        "findings": [f.plain() for f in found],
        "cells": table(study),
        "failed": [str(f) for f in failed],
    }
    write_text(target.parent / "summary.json", json.dumps(finite(told), indent=1, allow_nan=False))
    write_text(target.parent / "cells.csv", study.to_dataframe().to_csv(index=False))
    write_text(target, page(study, found, pictures, failed))
    return target


def _neurons(study: xr.Dataset) -> dict[str, xr.DataTree]:
    """The cells that cut neurons, with scores and cost; none of several models, whose items are no pairs."""
    cells: dict[str, xr.DataTree] = {}
    if len(set(study.model.values.tolist())) > 1:
        return cells
    labels = (study[n].values.tolist() for n in ("method", "recipe", "file"))
    for method, recipe, file in zip(*labels, strict=True):
        if method.startswith("neurons-"):
            groups: dict[str, xr.Dataset] = {}
            for group in ("scores", "cost"):
                with suppress(schema.SchemaError):  # skipped
                    groups[group] = schema.read_group(place(file), group)
            cells[recipe] = schema.tree(groups, schema.read_attributes(place(file)))
    return cells


def _recovered(study: xr.Dataset) -> list[Finding]:
    """What training brought back, where candidates that were trained are among the cells."""
    files = {str(r): place(f) for r, f in zip(study.recipe.values, study.file.values, strict=True)}
    saved = [file for recipe, file in files.items() if not _is_recipe(recipe)]
    if not any('"recovered"' in str(schema.read_attributes(f).get("achieved")) for f in saved):
        return []
    return recovery.tell({name: schema.read(file) for name, file in files.items()})


def _is_recipe(name: str) -> bool:
    """Whether a cell was made by a recipe; saved candidates go by their place."""
    try:
        return bool(Recipe.parse(name))
    except RecipeError:
        return False


def page(
    study: xr.Dataset,
    found: Sequence[Finding],
    pictures: Sequence[Picture],
    failed: Sequence[Failure],
) -> str:
    """The whole page as text."""
    return (
        environment()
        .get_template("study.html.jinja")
        .render(
            models=list(dict.fromkeys(study.model.values.tolist())),
            found=found, pictures=pictures, failed=failed, rows=table(study),
            shapes=matched.shapes(study), shape_names=matched.SHAPES, fewest=correlation.FEWEST,
            recovered=any(f.evidence.endswith("recovery") for f in found), protocol=_protocol(study), made=provenance.stamp(),
        )
    )  # fmt: skip


def table(study: xr.Dataset) -> list[dict[str, Any]]:
    """One row a cell; NaN for what it does not have."""
    names = [*LABELS, *COLUMNS]
    whole = {
        n: study[n].values.tolist() if n in study.variables else [np.nan] * study.sizes["cell"]
        for n in names
    }
    return [dict(zip(names, row, strict=True)) for row in zip(*whole.values(), strict=True)]


def _protocol(study: xr.Dataset) -> dict[str, str]:
    """What was asked, as the first cell tells it."""
    told = schema.read_attributes(place(str(study.file.values[0])))
    keys = (
        "model",
        "weights",
        "seed",
        "dtype",
        "device",
        "prompts",
        "calibration",
        "request",
        "versions",
        "platform",
    )
    return {k: str(told[k]) for k in keys if k in told}
