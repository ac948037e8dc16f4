"""Texts that a user names: lines of a file, rows of a JSONL file, or a dataset of the hub."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROWS = 128  # of a dataset, from its beginning


class TextError(ValueError):
    """Texts that cannot be read; the message says what came, what is allowed and what to do."""


def read_texts(source: str, option: str = "texts") -> list[str]:
    """The texts that `source` names.

    Args:
        source: a file with one text a line; a `.jsonl` file whose rows have `text`; or a dataset,
            by folder or hub name, as `NAME`, `NAME:CONFIG` or `NAME:CONFIG:SPLIT` (default split:
            train), whose first rows with a column `text` are streamed.
        option: what the user gave it for, for messages.

    Raises:
        TextError: no such file or dataset, not UTF-8, no text in it, a row without `text`.
    """
    path, where = Path(source), f"{option} {source}"
    if path.is_file():
        texts = _rows(path, where) if path.suffix == ".jsonl" else _lines(path, where)
    elif Path(source.partition(":")[0]).is_dir() or _named(source):
        texts = _dataset(source, where)
    else:
        raise TextError(f"{where}: no such file, and no name of a dataset (NAME:CONFIG:SPLIT)")
    if not texts:
        raise TextError(f"{where}: no text in it; one text a line is needed")
    return texts


def _named(source: str) -> bool:
    name = source.partition(":")[0]
    return name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).suffix


def _lines(path: Path, where: str) -> list[str]:
    try:
        return [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise TextError(f"{where}: not UTF-8 text ({error})") from error


def _rows(path: Path, where: str) -> list[str]:
    found: list[str] = []
    for number, line in enumerate(_lines(path, where), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TextError(f"{where}:{number}: not valid JSON ({error})") from error
        found += _text(row, f"{where}:{number}")
    return found


def _text(row: Any, where: str) -> list[str]:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise TextError(f"{where}: a field 'text' is needed; there is {fields or 'nothing'}")
    return [text] if text.strip() else []


def _dataset(source: str, where: str) -> list[str]:
    import datasets

    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows: Iterable[Any] = datasets.load_dataset(
            name, config or None, split=split or "train", streaming=True
        )
        first = list(itertools.islice(rows, ROWS))
    except Exception as error:  # the hub's client raises a dozen kinds; all mean "not to be had"
        raise TextError(
            f"{where}: no such file, and no dataset could be loaded by that name "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    return [text for i, row in enumerate(first) for text in _text(row, f"{where}, row {i + 1}")]
