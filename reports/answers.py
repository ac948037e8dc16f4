"""Both models' answers to every item, side by side: one page for each cell, beside the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import xarray as xr

from ..probes.items import without_examples
from .picture import having, safe

FOLDER = "answers"
KINDS = {"lost": "lost", "gained": "gained", "kept": "right in both", "never": "wrong in both"}
SHOWN = 600  # characters of a prompt, its end


def places(cells: Mapping[str, xr.DataTree]) -> dict[str, str]:
    """Name of each cell that has answers -> where its page is, from the report."""
    return {name: f"{FOLDER}/{safe(name)}.html" for name in having(cells, "scores")}


def pages(
    cells: Mapping[str, xr.DataTree], environment: jinja2.Environment, report: Path
) -> dict[Path, str]:
    """File -> page, of each cell that has answers. Model text is escaped by the template."""
    template = environment.get_template("answers.html.jinja")
    where = places(cells)
    return {
        report.parent / where[name]: template.render(
            name=name, report=report.name, kinds=KINDS, tasks=_tasks(scores)
        )
        for name, scores in having(cells, "scores").items()
    }


def _tasks(scores: xr.Dataset) -> list[dict[str, Any]]:
    names, formats = scores.task.values.tolist(), scores.format.values.tolist()
    asked = list(zip(names, formats, strict=True))
    items = _items(scores)
    result: list[dict[str, Any]] = []
    for name, format in dict.fromkeys(asked):
        mine = [i for i, key in zip(items, asked, strict=True) if key == (name, format)]
        prompts = without_examples([i["prompt"] for i in mine])
        mine = [{**i, "prompt": _ending(p)} for i, p in zip(mine, prompts, strict=True)]
        count = Counter(i["kind"] for i in mine)
        result.append({"name": name, "format": format, "rows": mine, "count": count})
    return result


def _items(scores: xr.Dataset) -> list[dict[str, Any]]:
    right = scores.score.sel(model=["dense", "candidate"]).values == 1
    texts = scores.text.sel(model=["dense", "candidate"]).values
    log_p = np.full(right.shape, np.nan)
    if "log_p" in scores:
        log_p = scores.log_p.sel(model=["dense", "candidate"]).values
    prompts = scores.prompt_text.values.tolist()
    return [
        {
            "prompt": str(prompt),
            "kind": _kind(*right[i].tolist()),
            "sides": [
                {"right": bool(right[i, k]), "text": str(texts[i, k]), "log_p": _known(log_p[i, k])}
                for k in range(2)
            ],
        }
        for i, prompt in enumerate(prompts)
    ]


def _kind(dense: bool, candidate: bool) -> str:
    if dense == candidate:
        return "kept" if dense else "never"
    return "lost" if dense else "gained"


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _ending(prompt: str) -> str:
    """The question itself, without the examples before it."""
    last = prompt.rstrip().rsplit("\n\n", 1)[-1]
    return last if len(last) <= SHOWN else "… " + last[-SHOWN:]
