"""Study files: models, recipes whose amounts multiply out, and how every cell is made."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..probes.recipe import Recipe
from .request import Plan, Request, StudyError, check_empty, plan

PATHS = ("data", "prompts", "calibration")
_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "str": (str, "text"), "int": (int, "a whole number"), "float": ((int, float), "a number"),
    "bool": (bool, "true or false"), "tuple": (list, "a list of texts"),
}  # fmt: skip
_OWN = ("models", "recipes", "seeds")
_NOT_KEYS = ("model", "recipes")


def _keys() -> dict[str, str]:
    """What may stand in a study file beside models, recipes and seeds: name and kind."""
    return {
        f.name: re.split(r"[\[ ]", str(f.type))[0]
        for f in fields(Request)
        if f.name not in _NOT_KEYS
    }


def read(file: Path, **instead: Any) -> dict[str, Request]:
    """The requests of a study file, one for each model, by the name of their folder.

    Args:
        file: TOML; paths in it are relative to its folder.
        instead: values that go before those of the file, where they are not None.

    Raises:
        StudyError: no TOML, an unknown key (with the nearest), a value of the wrong kind, no recipes.
        RecipeError: a recipe that cannot be read.
    """
    said = _parsed(file)
    _check_keys(said, file)
    options = {name: _value(file, name, value) for name, value in said.items() if name not in _OWN}
    options |= {name: value for name, value in instead.items() if value is not None}
    models = _list(file, said, "models", str) or ["smollm2"]
    seeds = _list(file, said, "seeds", int) or [options.get("seed", Request("").seed)]
    recipes = tuple(cells(_list(file, said, "recipes", str), seeds))
    if not recipes and not options.get("candidates"):
        raise StudyError(f'{file}: no recipes; give them as recipes = ["attn-drop@{{1,3,5}}", …]')
    if options.get("candidates") and len(models) > 1:
        raise StudyError(f"{file}: candidates are forms of one model, and {len(models)} are named")
    made = [Request(model=_place(file, m), recipes=recipes, **options) for m in models]
    named = {_folder(model): request for model, request in zip(models, made, strict=True)}
    if len(named) < len(models):
        raise StudyError(f"{file}: two models would have the same folder: {', '.join(models)}")
    return named


def plans(requests: Mapping[str, Request], out: Path) -> dict[str, Plan]:
    """Every request checked; each model has a folder of its own in `out`.

    Raises:
        StudyError: `out` holds something that no sweep wrote; and what `plan` raises: before anything slow.
    """
    if not any(list(out.glob(f"*/{sign}")) for sign in ("study.json", "failed")):
        check_empty(out, ours=("logs",))
    return {name: plan(request, out / name) for name, request in requests.items()}


def cells(patterns: list[str], seeds: list[int]) -> list[str]:
    """Recipes of patterns, seeded where chance plays, each once, in order.

    >>> cells(["random@{0.1,0.2}", "rtn@int8"], [1, 2])  # doctest: +NORMALIZE_WHITESPACE
    ['random@0.1,seed=1', 'random@0.1,seed=2', 'random@0.2,seed=1', 'random@0.2,seed=2', 'rtn@int8']
    """
    recipes = [Recipe.parse(text) for pattern in patterns for text in expand(pattern)]
    return list(dict.fromkeys(str(recipe.seeded(s)) for recipe in recipes for s in seeds))


def expand(pattern: str) -> list[str]:
    """Every text of a pattern whose braces hold alternatives, as a shell would expand it.

    Raises:
        StudyError: braces that do not close, or that stand in each other.

    >>> expand("{attn,mlp}-drop@{1,3}")
    ['attn-drop@1', 'attn-drop@3', 'mlp-drop@1', 'mlp-drop@3']
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    if any(c in part for part in parts for c in "{}"):
        raise StudyError(
            f"recipes: {pattern!r} has braces that do not close or stand in each other; write "
            "alternatives as {1,2,3}"
        )
    choices = [p.split(",") if i % 2 else [p] for i, p in enumerate(parts)]
    return ["".join(c.strip() for c in combined) for combined in itertools.product(*choices)]


def _parsed(file: Path) -> dict[str, Any]:
    try:
        said = tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise StudyError(f"{file}: no such study file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StudyError(f"{file}: cannot be read as TOML ({error})") from error
    return {name.replace("-", "_"): value for name, value in said.items()}


def _check_keys(said: Mapping[str, Any], file: Path) -> None:
    allowed = [*_OWN, *_keys()]
    for name in said:
        if name not in allowed:
            near = get_close_matches(name, allowed, n=1, cutoff=0.5)
            raise StudyError(
                f"{file}: unknown key {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
                + f" Allowed: {', '.join(sorted(allowed))}"
            )


def _list(file: Path, said: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    value = said.get(name, [])
    if not isinstance(value, list) or any(type(v) is not kind for v in value):
        words = {str: "texts", int: "whole numbers"}[kind]
        raise StudyError(f"{file}: {name} is {value!r}; it must be a list of {words}")
    return list(dict.fromkeys(value))


def _value(file: Path, name: str, value: Any) -> Any:
    kind, words = _KINDS[_keys()[name]]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise StudyError(f"{file}: {name} is {value!r}; it must be {words}")
    if isinstance(value, list):
        if not all(isinstance(v, str) for v in value):
            raise StudyError(f"{file}: {name} is {value!r}; it must be {words}")
        return tuple(_place(file, v) if name == "candidates" else v for v in value)
    return _place(file, str(value)) if name in PATHS else value


def _place(file: Path, name: str) -> str:
    """A path beside the study file where there is one; else what it says: a dataset, a hub id."""
    there = file.parent / name
    return str(there) if there.exists() else name


def _folder(model: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", model).strip("_.") or "model"
