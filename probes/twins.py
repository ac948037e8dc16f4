"""The twins: one set of items asked both ways, as a choice and as free generation.

The format is then the only difference between the "non-generative" and the "generative" half.
These are ours and ship with the package; `halves` makes a twin of any choice task.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources

from .items import SEED, Format, Item, Task

SHOTS = 3
CHOICES = 4


@dataclass(frozen=True)
class _Pair:
    question: str
    answer: str
    wrong: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


# --- the twins: what is asked ------------------------------------------------------------------


def data_text(name: str) -> str:
    """A text file that ships with the package."""
    return resources.files(__package__ or "").joinpath("data", name).read_text("utf-8")


def _table(name: str) -> list[_Pair]:
    text = data_text(f"{name}.tsv")
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
    "counting": _Twin("counting on from three numbers", _counting, "{},", 20),
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
    formats: tuple[Format, Format] = ("choice", "generation")
    choice, generation = (
        Task(name, f, items, name, spec.max_new_tokens, kind="twin", grade="begins")
        for f in formats
    )
    return choice, generation


def _twin_item(id: str, prompt: str, pair: _Pair, pool: list[str], rng: random.Random) -> Item:
    wrong = pair.wrong or tuple(rng.sample([a for a in pool if a != pair.answer], CHOICES - 1))
    choices = [pair.answer, *wrong]
    rng.shuffle(choices)
    return Item(
        id,
        prompt,
        tuple(f" {c}" for c in choices),
        choices.index(pair.answer),
        (pair.answer, *pair.also),
    )


def halves(task: Task, name: str, max_new_tokens: int) -> tuple[Task, Task]:
    """A twin from a choice task: the same prompts, once with its options and once without."""
    items = tuple(replace(i, accepted=(i.right.strip(),)) for i in task.items)
    choice = replace(task, name=name, twin=name, items=items, normalise=False, kind="twin")
    written = replace(choice, format="generation", max_new_tokens=max_new_tokens, grade="begins")
    return choice, written
