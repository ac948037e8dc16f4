"""The page of a study: what its cells say together, with the table of them all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ..analysis import Finding, correlation, matched, open_study, provenance, schema, study_findings
from ..analysis.places import place, write_text
from . import study_figures
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
    found, pictures, failed = (
        study_findings.tell(study),
        study_figures.draw(study),
        failures(folder),
    )
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
            recovered=False, protocol=_protocol(study), made=provenance.stamp(),
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
    cell = schema.read(place(str(study.file.values[0])))
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
    return {k: str(cell.attrs[k]) for k in keys if k in cell.attrs}
