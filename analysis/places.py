"""Where results lie: a folder of this machine, or a place that fsspec knows (`s3://…`, `memory://…`)."""

from __future__ import annotations

import re
import secrets
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCRATCH = ".writing-"
"""What the name of an unfinished file begins with; a process that is killed may leave one."""


class PlaceError(ValueError):
    """A place that cannot be used; the message says what to install."""


def place(text: str | Path) -> Path:
    """A path that joins, lists, reads and writes like `pathlib.Path`, wherever it is.

    Raises:
        PlaceError: no local path, and what reads such places is not installed.
    """
    if not re.match(r"[a-z][a-z0-9+.-]+://", str(text)):
        return Path(text)
    try:
        from upath import UPath

        return UPath(str(text))  # type: ignore[return-value]  # every method that is used is there
    except (ImportError, ValueError) as error:
        raise PlaceError(
            f"{text}: such places need fsspec's adapters: pip install 'prunescope[cluster]' and the one for this "
            f"protocol, as s3fs ({error})"
        ) from error


def is_local(path: Path) -> bool:
    """Whether a path is one of this machine's files."""
    return not hasattr(path, "fs")


def write_text(path: Path, text: str) -> None:
    """Written whole or not at all."""
    with beside(path) as scratch:
        scratch.write_text(text, "utf-8")


@contextmanager
def beside(path: Path) -> Generator[Path]:
    """A local file to write instead of `path`, put there at the end: a file that is there is complete.

    The name is nobody else's, so that threads, processes and machines may write the same file at once;
    the last one stays. Nothing is left of what fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(path):
        with tempfile.TemporaryDirectory() as folder:
            yield (whole := Path(folder) / path.name)
            path.write_bytes(whole.read_bytes())
        return
    scratch = path.with_name(f"{SCRATCH}{secrets.token_hex(4)}-{path.name}")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def opened(path: Path) -> Any:
    """What xarray opens: the path, or a file object of it."""
    return path if is_local(path) else path.open("rb")
