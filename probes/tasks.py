"""Tasks by name: the twins, the benchmarks, and any JSONL file in the formats of the README.

A new benchmark is a row of `prunescope.probes.benchmarks`; a user's file needs no code at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from .benchmarks import BENCHMARKS, MADE, benchmark
from .embed import is_retrieval, pair_rows, read_retrieval
from .items import Format, Item, Row, Task, TaskError, rows_of
from .rows import pair_item, question_item, whole_item, written_item
from .twins import TWINS, twin


def load_tasks(names: Sequence[str], data: Path | None = None) -> list[Task]:
    """The tasks of these names: twins (both halves), benchmarks, or `NAME.jsonl` in `data`.

    A benchmark comes from the folder `data` if its file is there, else from the hub.

    Raises:
        TaskError: an unknown name (with the nearest), an empty file, a row that cannot be read
            (file and line), a benchmark that cannot be had.
    """
    tasks: list[Task] = []
    for name in names:
        plain = name.partition(":")[0]
        if plain in BENCHMARKS or plain in MADE:
            tasks.extend(benchmark(name, data))
        elif data is not None and (data / f"{name}.jsonl").is_file():
            tasks.append(read_task(data / f"{name}.jsonl"))
        elif data is not None and is_retrieval(data / name):
            tasks.append(read_retrieval(data / name))
        elif name in TWINS:
            tasks.extend(twin(name))
        else:
            raise TaskError(_unknown(name, data))
    return tasks


def _unknown(name: str, data: Path | None) -> str:
    files = (
        sorted(p.stem for p in data.glob("*.jsonl")) if data is not None and data.is_dir() else []
    )
    near = get_close_matches(name, [*TWINS, *BENCHMARKS, *MADE, *files], n=3, cutoff=0.4)
    return (
        f"unknown task {name!r}"
        + (f"; nearest: {', '.join(near)}" if near else "")
        + f". Embedded: {', '.join(TWINS)}. Benchmarks: {', '.join([*BENCHMARKS, *MADE])}"
        + (f". In {data}: {', '.join(files) or 'no .jsonl file'}" if data is not None else "")
        + ("" if data is not None else ". Your own NAME.jsonl: name its folder with --data")
    )


def read_task(file: Path) -> Task:
    """A task from a JSONL file; the fields of its rows say which kind it is.

    Multiple choice: `question`, `choices`, `answer` (index), optional `context`. Minimal pairs:
    `good`, `bad`. Generation: `question`, `answer` (text), optional `aliases`, `context`. Text
    (perplexity): `text`. Sentence pairs: `sentence1`, `sentence2`, `score`.

    Raises:
        TaskError: no rows, malformed JSON, a field that is missing or wrong (file, line, field).
    """
    rows = list(rows_of(file))
    if not rows:
        raise TaskError(f"{file}: no rows")
    kinds = {_kind(row, f"{file}:{line}") for line, row in rows}
    if len(kinds) > 1:
        raise TaskError(f"{file}: rows of different kinds ({', '.join(sorted(kinds))})")
    kind = kinds.pop()
    if kind == "sentence pairs":
        return pair_rows(file.stem, [(f"{file}:{line}", row) for line, row in rows])
    make, format = _KINDS[kind]
    items = tuple(make(row, f"{file}:{line}", f"{file.stem}-{line}") for line, row in rows)
    return Task(file.stem, format, items, normalise=format == "choice" and bool(items[0].prompt))


def _kind(row: Row, where: str) -> str:
    for fields, kind in _FIELDS.items():
        if all(field in row for field in fields.split("+")):
            return kind
    needed = ", ".join(f"{fields} ({kind})" for fields, kind in _FIELDS.items())
    raise TaskError(
        f"{where}: fields {', '.join(sorted(row)) or '(none)'} are those of no task; needed are "
        f"one of {needed}"
    )


_FIELDS = {
    "question+choices": "multiple choice",
    "good+bad": "minimal pairs",
    "question+answer": "generation",
    "sentence1+sentence2+score": "sentence pairs",
    "text": "text",
}
_KINDS: dict[str, tuple[Callable[[Row, str, str], Item], Format]] = {
    "multiple choice": (question_item, "choice"),
    "minimal pairs": (pair_item, "choice"),
    "generation": (written_item, "generation"),
    "text": (whole_item, "text"),
}
