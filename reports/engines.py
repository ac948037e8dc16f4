"""Who makes the cells: this process, processes beside it, or actors of a Ray cluster.

A worker keeps the dense model of its last cell, so that cells of one model share its weights.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console

from ..analysis.places import is_local
from .progress import Progress, hush
from .request import Plan, StudyError
from .study import Dense, make, prepare


@dataclass(frozen=True)
class Trouble:
    """Why a cell was not made: the kind of the error, its message, where it was raised."""

    kind: str
    reason: str
    trace: str = ""


class WorkerDied(RuntimeError):  # noqa: N818  (an event of the outside world, told as it is)
    """A worker that is gone: killed, or out of memory."""


class Worker(Protocol):
    """Makes cells, one at a time."""

    def do(self, what: Plan, name: str | None) -> Trouble | None:
        """Make one cell, or with no name what all cells of a model share.

        Raises:
            WorkerDied: and nobody knows how far it came.
        """

    def close(self) -> None:
        """Let it go, whatever it does."""


class Here:
    """This process."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._held: tuple[Path, Plan, Dense] | None = None

    def do(self, what: Plan, name: str | None) -> Trouble | None:
        """See `Worker`; KeyboardInterrupt passes."""
        try:
            plan, dense = self._ready(what)
            if name is not None:
                make(plan, name, dense, self.progress)
        except Exception as error:  # whatever a cell dies of must not end the rest
            trace = "".join(traceback.format_exception(error)[-8:])
            return Trouble(type(error).__name__, str(error), trace)
        finally:
            gc.collect()
        return None

    def _ready(self, what: Plan) -> tuple[Plan, Dense]:
        if self._held is None or self._held[0] != what.folder:
            self._held = None  # the old model goes before the new one comes
            self._held = (what.folder, *prepare(what, self.progress, lenient=True))
        return self._held[1], self._held[2]

    def close(self) -> None:
        """Nothing to let go."""


def _quiet(log: str) -> Progress:
    return Progress(Console(file=open(log, "a", encoding="utf-8", buffering=1), width=120))


def _serve(pipe: Any, threads: int, log: str) -> None:
    """What a process beside this one does until its pipe closes."""
    hush()
    torch.set_num_threads(threads)
    worker = Here(_quiet(log))
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            pipe.send(worker.do(*pipe.recv()))


class Beside:
    """A process of its own on this machine, with its share of the cores."""

    def __init__(self, threads: int, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, threads, str(log)), daemon=True)
        self.process.start()
        theirs.close()

    def do(self, what: Plan, name: str | None) -> Trouble | None:
        """See `Worker`."""
        try:
            self._pipe.send((what, name))
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join(5)
            raise WorkerDied(f"its process ended with {_exit(self.process.exitcode)}") from error

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self._pipe.close()


def _exit(code: int | None) -> str:
    if code == -9:
        return "signal 9 (killed; most often the machine was out of memory)"
    return f"signal {-code}" if code and code < 0 else f"status {code}"


class Remote:
    """An actor of a Ray cluster."""

    def __init__(self, cpus: float, gpus: float) -> None:
        ray: Any = ray_module()
        self._ray = ray
        self._actor = (
            ray.remote(_Actor).options(num_cpus=cpus, num_gpus=gpus, max_restarts=0).remote(cpus)
        )

    def do(self, what: Plan, name: str | None) -> Trouble | None:
        """See `Worker`."""
        try:
            return self._ray.get(self._actor.do.remote(what, name))
        except self._ray.exceptions.RayActorError as error:
            raise WorkerDied(f"its actor is gone ({str(error).splitlines()[0]})") from error

    def close(self) -> None:
        """End the actor."""
        with suppress(Exception):
            self._ray.kill(self._actor)


class _Actor:
    """What runs in the cluster."""

    def __init__(self, cpus: float) -> None:
        hush()
        torch.set_num_threads(max(1, int(cpus)))
        self._worker = Here(_quiet(os.devnull))

    def do(self, what: Plan, name: str | None) -> Trouble | None:
        return self._worker.do(what, name)


def ray_module() -> Any:
    """Ray, which is an extra.

    Raises:
        StudyError: it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise StudyError(
            "--engine ray needs Ray: pip install 'prunescope[ray]', or --engine local"
        ) from None
    return ray


def workers(
    engine: str, count: int, folder: Path, progress: Progress, *, cpus: float, gpus: float
) -> list[Callable[[], Worker]]:
    """How to start each of `count` workers; one local worker is this process.

    Raises:
        StudyError: an engine that is not known, no worker, or Ray is not installed.
    """
    if count < 1:
        raise StudyError(f"--workers is {count}; it must be at least 1")
    if engine == "ray":
        ray_module()
        return [lambda: Remote(cpus, gpus) for _ in range(count)]
    if engine != "local":
        raise StudyError(f"--engine {engine!r} is not one of local, ray")
    if count == 1:
        return [lambda: Here(progress)]
    threads = max(1, (os.cpu_count() or 1) // count)
    logs = folder / "logs" if is_local(folder) else Path(tempfile.mkdtemp(prefix="prunescope-"))
    return [lambda i=i: Beside(threads, logs / f"worker-{i}.log") for i in range(count)]
