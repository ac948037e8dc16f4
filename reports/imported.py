"""Scores that lm-evaluation-harness wrote (`--log_samples`), brought into cells, paired by document."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xarray as xr

from ..analysis import provenance, schema
from ..probes.items import Item, Row, Task, TaskError, rows_of
from ..probes.score import Answer, pair

METRICS = ("acc_norm", "exact_match", "acc", "pass@1", "pass_at_1", "em", "f1")
FILTERS = ("flexible-extract", "none")  # first choice where a document was read in several ways
_NAME = re.compile(r"samples_(.+?)(?:_\d{4}-\d\d-\d\dT.*)?\.jsonl")


def read(files: Sequence[Path], dense: Path) -> dict[str, xr.DataTree]:
    """Cells with `/scores` from sample files, one for every folder but the dense model's.

    Args:
        files: `samples_TASK_DATE.jsonl` files; a folder holds those of one model.
        dense: the folder of the dense model.

    Raises:
        TaskError: a file that is none of lm-eval's, no candidate, documents that differ.
    """
    folders: dict[Path, dict[str, dict[str, Row]]] = {}
    for file in files:
        task, rows = _samples(file)
        folders.setdefault(file.parent.resolve(), {})[task] = rows
    reference = folders.pop(dense.resolve(), None)
    if reference is None:
        raise TaskError(f"--dense {dense}: none of the files lies there")
    if not folders:
        raise TaskError("all files lie in the dense model's folder; a candidate's are needed too")
    return {
        folder.name: _cell(folder.name, reference, found, str(dense))
        for folder, found in folders.items()
    }


def _samples(file: Path) -> tuple[str, dict[str, Row]]:
    """Task and document -> sample."""
    named = _NAME.fullmatch(file.name)
    if named is None or not file.is_file():
        raise TaskError(f"{file}: no file of lm-evaluation-harness, samples_TASK_DATE.jsonl")
    found: dict[str, Row] = {}
    for line, row in rows_of(file):
        if "doc_id" not in row or _metric(row) is None:
            raise TaskError(
                f"{file}:{line}: a sample needs 'doc_id' and one of {', '.join(METRICS)}"
            )
        key = str(row["doc_id"])
        if key not in found or _rank(row) < _rank(found[key]):
            found[key] = row
    if not found:
        raise TaskError(f"{file}: no rows")
    return named.group(1), found


def _rank(row: Row) -> int:
    name = row.get("filter", "none")
    return FILTERS.index(name) if name in FILTERS else len(FILTERS)


def _metric(row: Row) -> str | None:
    return next((m for m in METRICS if isinstance(row.get(m), int | float)), None)


def _cell(
    name: str, dense: dict[str, dict[str, Row]], candidate: dict[str, dict[str, Row]], source: str
) -> xr.DataTree:
    shared = [task for task in dense if task in candidate]
    if not shared:
        raise TaskError(f"{name}: no task in common with {source} ({', '.join(dense)})")
    tasks, sides = list[Task](), ([], [])
    for task in shared:
        keys = [k for k in dense[task] if k in candidate[task]]
        for key in keys:
            _check_same(task, key, dense[task][key], candidate[task][key])
        if not keys:
            raise TaskError(f"{name}, {task}: no document in common with {source}")
        tasks.append(_task(task, [dense[task][k] for k in keys]))
        for side, rows in zip(sides, (dense[task], candidate[task]), strict=True):
            side.append([_answer(rows[k]) for k in keys])
    scores = pair(tasks, *sides)
    stamp = provenance.stamp(recipe=name, model=source, imported="lm-evaluation-harness")
    return schema.tree({"scores": scores}, stamp)


def _check_same(task: str, key: str, dense: Row, candidate: Row) -> None:
    for mark in ("doc_hash", "prompt_hash"):
        if mark in dense and mark in candidate and dense[mark] != candidate[mark]:
            raise TaskError(
                f"{task}, document {key}: {mark} differs, so the two models were not asked the same; run both "
                "with the same rows, prompts and few-shot seed"
            )


def _task(name: str, rows: Sequence[Row]) -> Task:
    choice = all(len(row.get("resps", [])) > 1 for row in rows)
    items = tuple(_item(f"{name}-{row['doc_id']}", row, choice) for row in rows)
    return Task(name, "choice" if choice else "generation", items, kind="imported")


def _item(id: str, row: Row, choice: bool) -> Item:
    arguments = row.get("arguments") or {}
    calls: list[Any] = list(arguments.values()) if isinstance(arguments, dict) else list(arguments)
    texts = [list(c.values()) if isinstance(c, dict) else list(c) for c in calls]
    prompt = str(texts[0][0]) if texts and texts[0] else ""
    options = tuple(str(t[1]) if len(t) > 1 else "" for t in texts) if choice else ()
    return Item(id, prompt, options, accepted=(str(row.get("target", "")),))


def _answer(row: Row) -> Answer:
    metric = _metric(row)
    assert metric is not None
    first = row.get("filtered_resps") or [""]
    text = first[0] if isinstance(first, list) else first
    return Answer(float(row[metric]), str(text))
