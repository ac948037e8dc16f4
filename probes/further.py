"""Everything that tasks ask beyond right and wrong: letters, running text, retrieval, similarity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr

from .embed import retrieval, similarity
from .items import Task
from .model import Model
from .perplexity import perplexity
from .subspace import subspace


def further(
    dense: Model,
    candidate: Model,
    *,
    tasks: Sequence[Task],
    progress: Callable[[float], None] = lambda _: None,
) -> dict[str, xr.Dataset]:
    """The groups `/subspace`, `/perplexity`, `/retrieval` and `/similarity`, as the tasks ask."""
    jobs = _jobs(dense, candidate, tasks)
    made: dict[str, list[xr.Dataset]] = {}
    for n, (group, job) in enumerate(jobs):
        tree = job(lambda done, n=n: progress((n + done) / len(jobs)))
        made.setdefault(group, []).append(tree[group].to_dataset())
    return {group: _joined(parts) for group, parts in made.items()}


Job = Callable[[Callable[[float], None]], xr.DataTree]


def _jobs(dense: Model, candidate: Model, tasks: Sequence[Task]) -> list[tuple[str, Job]]:
    jobs: list[tuple[str, Job]] = []
    if any(t.letters for t in tasks):
        jobs.append(("subspace", lambda p: subspace(dense, candidate, tasks=tasks, progress=p)))
    if any(t.format == "text" for t in tasks):
        jobs.append(("perplexity", lambda p: perplexity(dense, candidate, tasks=tasks, progress=p)))
    single: dict[str, Any] = {"retrieval": retrieval, "similarity": similarity}
    for task in (t for t in tasks if t.format in single):
        ask = single[task.format]
        jobs.append(
            (task.format, lambda p, ask=ask, t=task: ask(dense, candidate, task=t, progress=p))
        )
    return jobs


def _joined(parts: list[xr.Dataset]) -> xr.Dataset:
    """Several tasks of a group after each other, numbered through."""
    if len(parts) == 1:
        return parts[0]
    dim = str(parts[0]["task"].dims[0])
    whole = xr.concat(
        parts, dim, data_vars="minimal", coords="minimal", compat="override", join="outer"
    )
    return whole.assign_coords({dim: np.arange(whole.sizes[dim])})
