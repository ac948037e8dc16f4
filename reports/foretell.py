"""A forecast for one candidate: load it, pass over the study's prompts once, ask the study."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xarray as xr

from ..analysis import forecast, open_study, schema
from ..analysis.correlation import OUTCOMES
from ..analysis.places import place
from ..analysis.study_findings import WORDS
from ..analysis.summary import summarise
from ..probes.compress import compress, ranked_by
from ..probes.load import exists, load
from ..probes.measure import measure
from ..probes.model import Model
from ..probes.neurons import pools
from ..probes.recipe import Recipe, RecipeError
from .progress import Progress
from .request import StudyError, read_calibration, read_prompts


def foretell(
    candidate: str, folder: str, dense: str, progress: Progress, **options: Any
) -> tuple[str, bool]:
    """What a candidate is expected to keep, in sentences, and whether the study covers it.

    Args:
        candidate: a folder, hub id or file, or a recipe.
        folder: of a sweep or a study.
        dense: what the candidate was made from; empty for the study's model.
        progress: told what runs.
        options: of `load`.

    Raises:
        StudyError: the study has several models and `dense` was not named.
        ForecastError: the study is too small.
        LoadError, RecipeError, MeasureError: the candidate cannot be had or compared.
    """
    study = open_study(folder)
    outcomes = [o for o in OUTCOMES if o in study]
    for outcome in outcomes:
        forecast.usable(study, outcome)
    asked = _request(study)
    source = dense or _only(study)
    recipe = _recipe(candidate)
    for needed in [source] if recipe else [source, candidate]:
        exists(needed)
    options = {"dtype": asked["dtype"], "say": progress.say, **options}
    with progress.task(f"loading {source}"):
        model = load(source, **options)
    with progress.task(candidate):
        other = _made(model, recipe, asked) if recipe else load(candidate, **options)
    with progress.task("one pass") as tick:
        cell = measure(
            model, other, prompts=read_prompts(asked.get("prompts")),
            temperature=float(asked["temperature"]), layerwise=False, progress=tick,
        )  # fmt: skip
    row = summarise(cell)
    figures = dict(zip(row.figure.values.tolist(), row.value.values.tolist(), strict=True))
    found = [forecast.forecast(study, figures, outcome) for outcome in outcomes]
    return "\n".join(_sentence(candidate, f, figures) for f in found), all(f.covered for f in found)


def _recipe(candidate: str) -> Recipe | None:
    """A recipe where it reads as one and no file has its name."""
    if "@" not in candidate or Path(candidate).exists():
        return None
    try:
        return Recipe.parse(candidate)
    except RecipeError as error:
        raise RecipeError(f"{candidate}: no such file or folder, and no recipe: {error}") from None


def _made(model: Model, recipe: Recipe, asked: Mapping[str, Any]) -> Model:
    data = Path(asked["data"]) if asked.get("data") else None
    return compress(
        model, recipe, calibration=read_calibration(asked.get("calibration")),
        ranking=pools(ranked_by(recipe), data), seed=int(asked["seed"]),
    )  # fmt: skip


def _request(study: xr.Dataset) -> dict[str, Any]:
    """What the study's cells were made with."""
    told = schema.read_attributes(place(str(study.file.values[0])))
    return dict(json.loads(told["request"]))


def _only(study: xr.Dataset) -> str:
    models = list(dict.fromkeys(study.model.values.tolist()))
    if len(models) > 1:
        raise StudyError(
            f"the study has several models ({', '.join(models)}); name the candidate's with --dense"
        )
    return str(models[0])


def _sentence(candidate: str, told: forecast.Forecast, figures: Mapping[str, float]) -> str:
    kl = f"mean KL {figures['output_kl']:.3g} nat"
    if not told.covered:
        return (
            f"{candidate}, {WORDS[told.outcome]}: outside what the study covers ({kl}; {told.distance:.1f} times as far "
            "from every cell as cells of one method are from those of others), so nothing is foretold."
        )
    low, high = told.retention.low, told.retention.high
    return (
        f"{candidate}, {WORDS[told.outcome]}: expected retention {told.retention.value:.2f}, "
        f"{100 * forecast.COVER:.0f} % {low:.2f} to {high:.2f} ({kl}; {told.model}, learned from {told.n} cells)."
    )
