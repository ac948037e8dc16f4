"""Sweeps: the cells of all models of a study, by workers, each complete, failed or to be made.

DIR/MODEL/             a study folder of each model, as `diagnose` writes it
DIR/MODEL/failed/      a record of each cell that could not be made: why, and where it was raised
DIR/logs/              what workers beside this process say
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..analysis.places import SCRATCH, write_text
from ..analysis.provenance import now
from .engines import Trouble, Worker, WorkerDied
from .progress import Progress
from .request import Plan

TRIES = 2  # for a cell whose worker died


@dataclass(frozen=True)
class Failure:
    """A cell that could not be made, and why."""

    model: str
    cell: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.model}, {self.cell}: {self.kind}: {self.reason}"


def sweep(
    plans: Mapping[str, Plan], start: Sequence[Callable[[], Worker]], progress: Progress
) -> list[Failure]:
    """Make every cell that is missing.

    Args:
        plans: one for each model, by the name of its folder.
        start: starts a worker, each time it is called; so many work at once.
        progress: told of every cell.

    Returns:
        The cells that could not be made; their records are in `failed/` beside the cells.
    """
    queue = _Queue(plans)
    if not queue.left():
        progress.say("all cells are there already")
        return []
    with progress.task("cells") as tick:
        queue.told = lambda line: (tick(1 - queue.left() / queue.count), progress.say(line))[1]
        if len(start) == 1:
            _work(queue, start[0])
        else:
            _together(queue, start)
    return queue.failures


def _together(queue: _Queue, start: Sequence[Callable[[], Worker]]) -> None:
    """A thread for each worker; an interrupt or an error of ours ends them all."""
    working: list[Worker] = []
    wrong: list[BaseException] = []

    def run(begin: Callable[[], Worker]) -> None:
        try:
            _work(queue, begin, working)
        except BaseException as error:  # told to the main thread, which raises it
            wrong.append(error)
            queue.stop()

    threads = [threading.Thread(target=run, args=(begin,), daemon=True) for begin in start]
    try:
        for thread in threads:
            thread.start()
        while any(t.is_alive() for t in threads) and not wrong:
            for thread in threads:
                thread.join(0.2)
    finally:
        queue.stop()
        for worker in working:
            worker.close()
    if wrong:
        raise wrong[0]


def _work(queue: _Queue, begin: Callable[[], Worker], working: list[Worker] | None = None) -> None:
    """One worker's day: cells of the model that it has first; a dead worker is replaced."""
    worker: Worker | None = None
    model = ""
    while (job := queue.take(model)) is not None:
        model, name = job
        if worker is None:
            worker = begin()
            if working is not None:
                working.append(worker)
        try:
            trouble = worker.do(queue.plans[model], name)
        except WorkerDied as died:
            worker.close()
            worker = None
            queue.died(model, name, Trouble("WorkerDied", str(died)))
            continue
        queue.done(model, name, trouble)
    if worker is not None:
        worker.close()


@dataclass
class _Queue:
    """The cells to be made. A model's cells wait until one worker has made what they share."""

    plans: Mapping[str, Plan]
    told: Callable[[str], None] = lambda _: None
    failures: list[Failure] = field(default_factory=list[Failure])

    def __post_init__(self) -> None:
        self.waiting = {model: what.missing() for model, what in self.plans.items()}
        self.count = self.left()
        self._state = {m: "new" for m, names in self.waiting.items() if names}
        self._tries: dict[tuple[str, str | None], int] = {}
        self._change = threading.Condition()
        self._stopped = False
        for what in self.plans.values():
            for scratch in what.folder.glob(f"**/{SCRATCH}*"):  # of a process that was killed
                scratch.unlink(missing_ok=True)

    def left(self) -> int:
        """How many cells nobody has taken."""
        return sum(map(len, self.waiting.values()))

    def stop(self) -> None:
        """No more cells are handed out."""
        with self._change:
            self._stopped = True
            self._change.notify_all()

    def take(self, model: str) -> tuple[str, str | None] | None:
        """The next cell, of this model if there is one; None when all are taken."""
        with self._change:
            while not self._stopped:
                ready = [
                    m for m, names in self.waiting.items() if names and self._state[m] == "ready"
                ]
                new = [m for m, state in self._state.items() if state == "new"]
                if model in ready:
                    return model, self.waiting[model].pop(0)
                if new:
                    self._state[new[0]] = "busy"
                    return new[0], None
                if ready:
                    most = max(ready, key=lambda m: len(self.waiting[m]))
                    return most, self.waiting[most].pop(0)
                if "busy" not in self._state.values():
                    return None
                self._change.wait()
        return None

    def done(self, model: str, name: str | None, trouble: Trouble | None) -> None:
        """A cell was made, or could not be."""
        with self._change:
            what = self.plans[model]
            if name is not None:
                self._record(model, name, trouble)
            elif trouble is None:
                self._state[model] = "ready"
            else:
                self._state[model] = "failed"
                for cell in self.waiting[model]:
                    self._record(model, cell, trouble)
                self.waiting[model] = []
            if name is not None and trouble is None:
                record(what, name).unlink(missing_ok=True)
            self._change.notify_all()

    def died(self, model: str, name: str | None, trouble: Trouble) -> None:
        """Its worker died: it is tried again, so many times."""
        with self._change:
            tries = self._tries[model, name] = self._tries.get((model, name), 0) + 1
            again = tries < TRIES
            if again and name is None:
                self._state[model] = "new"
            elif again and name is not None:
                self.waiting[model].append(name)
            self._change.notify_all()
        if again:
            self.told(f"{model}, {name or 'dense model'}: {trouble.reason}; tried again")
        else:
            self.done(model, name, trouble)

    def _record(self, model: str, name: str, trouble: Trouble | None) -> None:
        if trouble is None:
            self.told(f"{model}, {name}: done")
            return
        failure = Failure(model, name, trouble.kind, trouble.reason)
        self.failures.append(failure)
        file = record(self.plans[model], name)
        told = {**asdict(failure), "trace": trouble.trace, "when": now()}
        write_text(file, json.dumps(told, indent=1))
        self.told(f"FAILED {failure}")


def record(what: Plan, name: str) -> Path:
    """Where the failure of a cell is written down."""
    return what.folder / "failed" / f"{what.cell(name).stem}.json"


def failures(folder: Path) -> list[Failure]:
    """What could not be made so far, by the records in a sweep's folder."""
    found: list[Failure] = []
    for file in sorted(folder.glob("*/failed/*.json")):
        with suppress(ValueError, KeyError):
            told = json.loads(file.read_text("utf-8"))
            found.append(Failure(told["model"], told["cell"], told["kind"], told["reason"]))
    return found
