"""Tasks: items that a model is asked, as a choice between texts or as free generation.

A *twin* is one set of items asked both ways, so that the format is the only difference between
its "non-generative" and its "generative" half. The twins are ours and ship with the package; any
JSONL file in the formats that the README lists is a task too, without a line of code.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal

Format = Literal["choice", "generation"]
SEED = 24652
SHOTS = 3
CHOICES = 4


class TaskError(ValueError):
    """A task that cannot be asked; the message says which, where and what is allowed."""


@dataclass(frozen=True)
class Item:
    """One question.

    `prompt` is the whole text before the answer, `choices` the texts that may follow it (each with
    its own leading space, as it would stand after the prompt), `answer` the index of the right one,
    `accepted` every text that counts as right when the model writes freely. `shot` is the part of
    the prompt that all items share.
    """

    id: str
    prompt: str
    choices: tuple[str, ...] = ()
    answer: int = 0
    accepted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Items asked in one format. `chance` is the score of blind guessing; `twin` names the pair."""

    name: str
    format: Format
    items: tuple[Item, ...]
    twin: str | None = None
    max_new_tokens: int = 16

    @property
    def chance(self) -> float:
        """Expected score of blind guessing: the mean of 1/(number of choices), 0 for generation."""
        if self.format == "generation":
            return 0.0
        return sum(1 / len(item.choices) for item in self.items) / len(self.items)

    def limited(self, limit: int | None) -> Task:
        """The first `limit` items (all of them for None); twins keep the same items in both formats."""
        if limit is None or limit >= len(self.items):
            return self
        return Task(self.name, self.format, self.items[:limit], self.twin, self.max_new_tokens)


@dataclass(frozen=True)
class _Pair:
    question: str
    answer: str
    wrong: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


# --- the twins: what is asked ------------------------------------------------------------------


def _table(name: str) -> list[_Pair]:
    text = resources.files(__package__).joinpath("data", f"{name}.tsv").read_text("utf-8")
    rows = (line.split("\t") for line in text.splitlines())
    return [_Pair(question, answer, also=tuple(also)) for question, answer, *also in rows]


def _counting() -> list[_Pair]:
    def run(*numbers: int) -> str:
        return ", ".join(map(str, numbers))

    return [
        _Pair(
            run(a, a + 1, a + 2),
            run(a + 3, a + 4, a + 5),
            (run(a + 4, a + 5, a + 6), run(a + 3, a + 5, a + 6), run(a + 2, a + 3, a + 4)),
        )
        for a in range(2, 122)
    ]


def _addition() -> list[_Pair]:
    return [
        _Pair(f"{a} + {b}", str(a + b), tuple(str(a + b + d) for d in (-2, -1, 1)))
        for a in range(2, 13)
        for b in range(2, 13)
    ]


@dataclass(frozen=True)
class _Twin:
    describe: str
    pairs: Callable[[], list[_Pair]]
    ask: str
    max_new_tokens: int = 8


TWINS: dict[str, _Twin] = {
    "capitals": _Twin("capital cities", lambda: _table("capitals"), "The capital of {} is"),
    "opposites": _Twin("opposite words", lambda: _table("opposites"), "The opposite of {} is"),
    "kinds": _Twin("what kind of thing a word names", lambda: _table("kinds"), "{} is a kind of"),
    "plurals": _Twin("plural forms", lambda: _table("plurals"), "One {}, two"),
    "counting": _Twin("counting on from three numbers", _counting, "{},", 16),
    "addition": _Twin("sums of two small numbers", _addition, "{} ="),
}


def twin(name: str) -> tuple[Task, Task]:
    """The choice half and the generation half of a twin, over the same items in the same order.

    Each prompt starts with `SHOTS` solved examples that are no items. Order, examples and wrong
    choices are drawn once with a fixed seed, so a twin is the same on every machine.
    """
    spec, rng = TWINS[name], random.Random(f"{SEED}-{name}")
    pairs = spec.pairs()
    rng.shuffle(pairs)
    shots = "".join(f"{spec.ask.format(p.question)} {p.answer}\n" for p in pairs[:SHOTS])
    pool = sorted({p.answer for p in pairs})
    items = tuple(
        _twin_item(f"{name}-{i:03d}", shots + spec.ask.format(p.question), p, pool, rng)
        for i, p in enumerate(pairs[SHOTS:])
    )
    halves: tuple[Format, Format] = ("choice", "generation")
    choice, generation = (Task(name, f, items, name, spec.max_new_tokens) for f in halves)
    return choice, generation


def _twin_item(id: str, prompt: str, pair: _Pair, pool: list[str], rng: random.Random) -> Item:
    wrong = pair.wrong or tuple(
        rng.sample([a for a in pool if a != pair.answer], CHOICES - 1)
    )
    choices = [pair.answer, *wrong]
    rng.shuffle(choices)
    return Item(
        id, prompt, tuple(f" {c}" for c in choices), choices.index(pair.answer), (pair.answer, *pair.also)
    )
