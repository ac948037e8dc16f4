"""What was asked, checked before anything slow: a request, and the plan that it makes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..analysis.places import SCRATCH
from ..probes import sandbox
from ..probes.compress import ranked_by
from ..probes.items import SEED, Task
from ..probes.load import DTYPES, achieved_of, exists
from ..probes.neurons import check_apart, pools
from ..probes.recipe import Recipe
from ..probes.tasks import load_tasks
from ..probes.texts import read_texts
from ..probes.twins import TWINS, data_text

SKIPPABLE = ("layers", "decoding", "speed")
"""Parts of a cell that a study may leave out; causes are left out by `causes` 0."""


class StudyError(ValueError):
    """A study that cannot start as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Request:
    """What the user asked for, as plain values; two equal requests give the same study."""

    model: str
    recipes: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    data: str | None = None
    prompts: str | None = None
    calibration: str | None = None
    limit: int | None = None
    steps: int = 32
    sampled: bool = False
    temperature: float = 1.0
    causes: int = 16
    repair: int = 0
    chat: bool = False
    allow_code_execution: bool = False
    seed: int = SEED
    lens: str = "norm"
    dtype: str = "float32"
    device: str = "cpu"
    trust_remote_code: bool = False
    skip: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """The cells, in order."""
        return [*self.recipes, *self.candidates]


@dataclass(frozen=True)
class Plan:
    """A request whose every part was found to be usable, before anything slow."""

    request: Request
    folder: Path
    recipes: dict[str, Recipe]
    tasks: tuple[Task, ...]
    prompts: tuple[str, ...]
    calibration: tuple[str, ...] | None
    ranking: dict[str, list[str]]

    @property
    def scored(self) -> tuple[Task, ...]:
        """The tasks whose items are right or wrong."""
        return tuple(task for task in self.tasks if task.scored)

    def cell(self, name: str) -> Path:
        """The file of one cell."""
        return self.folder / "cells" / f"{re.sub(r'[^A-Za-z0-9.@=+-]+', '_', name)}.nc"

    def missing(self) -> list[str]:
        """The cells that are not there yet."""
        return [name for name in self.request.names() if not self.cell(name).exists()]


def default_prompts() -> list[str]:
    """The prompts that ship with the package."""
    text = data_text("prompts.txt")
    return [line for line in text.splitlines() if line.strip()]


def plan(request: Request, folder: Path) -> Plan:
    """Check a request without loading a model.

    Raises:
        StudyError, RecipeError, TaskError, TextError, LoadError: what cannot work, and what to do.
    """
    recipes = {str(Recipe.parse(text)): Recipe.parse(text) for text in request.recipes}
    if len(recipes) < len(request.recipes):
        raise StudyError("the same recipe is given twice")
    _check_numbers(request)
    for source in (request.model, *request.candidates):
        exists(source)
    tasks = tuple(_tasks(request))
    _check_code(request, tasks)
    prompts = tuple(read_prompts(request.prompts))
    for source in request.candidates:
        check_apart(source, achieved_of(source), tasks)
    calibration = read_calibration(request.calibration)
    named = [name for recipe in recipes.values() for name in ranked_by(recipe)]
    ranking = pools(named, Path(request.data) if request.data else None, tasks)
    _check_folder(request, folder)
    return Plan(request, folder, recipes, tasks, prompts, calibration, ranking)


def _check_numbers(request: Request) -> None:
    if not request.names():
        raise StudyError(
            "nothing to compare with: give at least one --recipe, as --recipe mlp-drop@3"
        )
    _check_causes(request)
    for name, value in (("--limit", request.limit), ("--steps", request.steps)):
        if value is not None and value < 1:
            raise StudyError(f"{name} is {value}; it must be at least 1")
    if not request.temperature > 0:
        raise StudyError(f"--temperature is {request.temperature}; it must be above 0")
    if request.dtype not in DTYPES:
        raise StudyError(f"--dtype {request.dtype!r} is not one of {', '.join(DTYPES)}")
    if unknown := [part for part in request.skip if part not in SKIPPABLE]:
        raise StudyError(f"skip: {unknown[0]!r} is not one of {', '.join(SKIPPABLE)}")
    if request.lens not in ("norm", "raw"):
        raise StudyError(f"--lens {request.lens!r} is not one of norm, raw")
    try:
        torch.empty(0, device="cpu" if request.device == "auto" else request.device)
    except (RuntimeError, AssertionError) as error:
        raise StudyError(
            f"--device {request.device!r} cannot be used: {str(error).splitlines()[0]}"
        ) from error


def _check_causes(request: Request) -> None:
    for name, value in (("--causes", request.causes), ("--repair", request.repair)):
        if value < 0:
            raise StudyError(f"{name} is {value}; it must be 0 (not done) or more")
    if request.repair and not request.causes:
        raise StudyError(
            "--repair gives back what --causes blames, and that is 0; leave it above 0"
        )


def _tasks(request: Request) -> list[Task]:
    data = Path(request.data) if request.data else None
    if data is not None and not data.is_dir():
        raise StudyError(f"--data {data}: no such folder")
    names = list(request.tasks) or list(TWINS)
    return [t.limited(request.limit, request.seed) for t in load_tasks(names, data)]


def _check_code(request: Request, tasks: Sequence[Task]) -> None:
    """Programs that a model writes are run only when asked for, and only where they are isolated."""
    names = ", ".join(t.name for t in tasks if t.grade == "code")
    if names and not request.allow_code_execution:
        raise StudyError(
            f"{names}: scoring runs programs that the models write; give --allow-code-execution to run them in a "
            "sandbox, or leave the task out"
        )
    if names:
        sandbox.require()


def read_prompts(source: str | None) -> list[str]:
    """The prompts of a file, one a line; None for those that ship with us.

    Raises:
        TextError: they cannot be read.
    """
    return default_prompts() if source is None else read_texts(source, "--prompts")


def read_calibration(source: str | None) -> tuple[str, ...] | None:
    """The texts to calibrate on (see `read_texts`); None for those that ship with us.

    Raises:
        TextError: they cannot be read.
    """
    return None if source is None else tuple(read_texts(source, "--calibration"))


def training_texts(on: str, data: Path | None, limit: int, seed: int) -> list[str]:
    """What to train on: a file's texts, or the items of a task that a study would not score.

    Raises:
        TaskError, TextError: they cannot be had, or no item is left.
    """
    if Path(on).is_file():
        return read_texts(on, "--on")
    return unscored([on], data, limit, seed)[on]


def unscored(
    names: Sequence[str], data: Path | None, limit: int, seed: int
) -> dict[str, list[str]]:
    """For each task the texts of its items that a study of this limit and seed would not score.

    Raises:
        TaskError: no such task, or too few of its items are left.
    """
    scored = [task.limited(limit, seed) for name in names for task in load_tasks([name], data)]
    return pools(names, data, scored)


def _check_folder(request: Request, folder: Path) -> None:
    file = folder / "study.json"
    if file.is_file():
        there = json.loads(file.read_text("utf-8"))
        mine = json.loads(json.dumps(asdict(request)))
        keys = {k for k in {*there, *mine} if there.get(k) != mine.get(k)} - {
            "recipes",
            "candidates",
        }
        if keys:
            parts = [f"{k} {there.get(k)!r} there, {mine.get(k)!r} asked" for k in sorted(keys)]
            raise StudyError(
                f"--out {folder} holds another study ({'; '.join(parts)}); name another folder, or ask "
                "for the same to resume it"
            )
    else:
        check_empty(folder, ours=("failed",))


def check_empty(folder: Path, ours: Sequence[str] = ()) -> None:
    """Whether `--out` is new or empty, but for names that are ours.

    Raises:
        StudyError: it holds something else.
    """
    if folder.exists() and (
        not folder.is_dir()
        or any(
            entry.name not in ours and not entry.name.startswith(SCRATCH)
            for entry in folder.iterdir()
        )
    ):
        raise StudyError(
            f"--out {folder} exists and holds something else; name a new or empty folder"
        )
