"""Progress: what runs now and how long is left; bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars


def hush() -> None:
    """Keep libraries from noting that GPU code is missing, where it is there."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for library in ("torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)


class Progress:
    """Reports long work on standard error. Use as a context manager.

    Ctrl-C while a destructor or a callback runs is swallowed by Python, so it is remembered here and
    raised again at the next report.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.interrupted = False
        self._before: Any = None
        self.console = console or Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description:<40.40}"), BarColumn(bar_width=28), TaskProgressColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> Progress:
        self._bars.start()
        ignored = (
            signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        )  # as in the background of a shell
        if threading.current_thread() is threading.main_thread() and not ignored:
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        self._bars.stop()

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self.interrupted = True
        raise KeyboardInterrupt

    def _check(self) -> None:
        if self.interrupted:
            raise KeyboardInterrupt

    def say(self, line: str) -> None:
        """One line, above the bars."""
        self.console.print(line, highlight=False, markup=False)

    @contextmanager
    def task(self, name: str) -> Generator[Callable[[float], None]]:
        """A piece of work; yields a function that takes the share that is done, 0 to 1."""
        self._check()
        bar, start = self._bars.add_task(name, total=1.0), time.perf_counter()

        def tick(done: float) -> None:
            self._check()
            self._bars.update(bar, completed=min(1.0, done))

        yield tick
        self._bars.update(bar, completed=1.0)
        if not self.console.is_terminal:
            self.say(f"{name}: {time.perf_counter() - start:.1f} s")
