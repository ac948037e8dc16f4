"""Where a number comes from: versions, commit, machine, time."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("prunescope", "torch", "transformers", "nnsight", "numpy", "scipy", "xarray")


def stamp(**what: Any) -> dict[str, Any]:
    """Provenance of a file: `what` was done, and with what."""
    return {
        **what,
        "created": now(),
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        **commit(),
    }


def now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def text_hash(texts: Sequence[str]) -> str:
    """SHA-256 of texts, with their boundaries."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


@cache
def commit() -> dict[str, Any]:
    """Commit of the source tree that runs, and whether it had changes; empty for an installed wheel."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return {}
    try:
        head = _git(root, "rev-parse", "HEAD")
        return {"commit": head, "dirty": bool(_git(root, "status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
