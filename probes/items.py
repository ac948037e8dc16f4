"""What a model is asked: items, tasks, and rows of files with messages that name file and line."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

Format = Literal["choice", "generation", "last word", "text", "retrieval", "similarity"]
Grade = Literal["begins", "exact", "number", "quad", "code"]
"""How a written answer is judged: see `prunescope.probes.grading`."""

SEED = 24652
WRITTEN = "\0what the model wrote\0"
Row = dict[str, Any]


class TaskError(ValueError):
    """A task that cannot be asked; the message says which, where and what is allowed."""


def not_had(name: str, where: str, error: Exception, instead: str) -> TaskError:
    """The error for rows of the hub that cannot be had, whichever of a dozen kinds its client raised."""
    first = (str(error).splitlines() or [""])[0]
    return TaskError(
        f"{name}: {where} cannot be had ({type(error).__name__}: {first}); --data DIR reads {instead}"
    )


@dataclass(frozen=True)
class Item:
    """One question.

    `prompt` is the whole text before the answer, `choices` the texts that may follow it (each with
    its own leading space, as it would stand after the prompt), `answer` the index of the right one,
    `accepted` every text that counts as right when the model writes freely. Where each choice
    follows a prompt of its own, these are `contexts`. `tests` is the program that judges code, with
    `WRITTEN` where the model's goes. `grade` is the gold score of a pair, `relevant` the documents of a
    query with their grades.
    """

    id: str
    prompt: str
    choices: tuple[str, ...] = ()
    answer: int = 0
    accepted: tuple[str, ...] = ()
    contexts: tuple[str, ...] = ()
    tests: str = ""
    grade: float = 0.0
    relevant: tuple[tuple[str, float], ...] = ()

    @property
    def right(self) -> str:
        """The right answer as it would stand after the prompt."""
        return self.choices[self.answer] if self.choices else f" {self.accepted[0]}"

    def before(self, choice: int) -> str:
        """The text that this choice follows."""
        return self.contexts[choice] if self.contexts else self.prompt


@dataclass(frozen=True)
class Task:
    """Items asked in one format.

    `kind` groups tasks for people. `twin` names the pair that the task is half of. `normalise`:
    choose by log-likelihood per character (`acc_norm` of lm-evaluation-harness) and not by its sum
    (`acc`). `letters`: the choices are option letters. Written text ends before the first of
    `until`, and is judged as `grade` says. `corpus` holds `(id, text)` of what is searched.
    """

    name: str
    format: Format
    items: tuple[Item, ...]
    twin: str | None = None
    max_new_tokens: int = 16
    normalise: bool = False
    kind: str = "yours"
    letters: bool = False
    until: tuple[str, ...] = ("\n",)
    grade: Grade = "exact"
    corpus: tuple[tuple[str, str], ...] = ()

    @property
    def chance(self) -> float:
        """Expected score of blind guessing: the mean of 1/(number of choices), else 0."""
        if self.format != "choice":
            return 0.0
        return sum(1 / len(item.choices) for item in self.items) / len(self.items)

    @property
    def scored(self) -> bool:
        """Whether every item is right or wrong."""
        return self.format in ("choice", "generation", "last word")

    def limited(self, limit: int | None, seed: int = SEED) -> Task:
        """`limit` items drawn with a seed, in their order; the same items in both halves of a twin."""
        if limit is None or limit >= len(self.items):
            return self
        picked = sorted(random.Random(seed).sample(range(len(self.items)), limit))
        return replace(self, items=tuple(self.items[i] for i in picked))


def without_examples(texts: Sequence[str]) -> list[str]:
    """The texts without the lines that all of them begin with, as solved examples are."""
    if len(set(texts)) < 2:
        return list(texts)
    both = takewhile(lambda pair: pair[0] == pair[1], zip(min(texts), max(texts), strict=False))
    start = "".join(a for a, _ in both).rfind("\n") + 1
    return [text[start:] for text in texts]


def rows_of(file: Path) -> Iterable[tuple[int, Row]]:
    """Line number and JSON object of every row of a JSONL file.

    Raises:
        TaskError: not readable as such (file, line).
    """
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise TaskError(f"{file}:{number}: not valid JSON ({error})") from error
            if not isinstance(row, dict):
                raise TaskError(
                    f"{file}:{number}: a JSON object is needed, not {type(row).__name__}"
                )
            yield number, row


def text_of(row: Row, field: str, where: str) -> str:
    """A field that must be text.

    Raises:
        TaskError: it is missing, empty or something else.
    """
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise TaskError(f"{where}: field {field!r} must be text, not {value!r}")
    return value
