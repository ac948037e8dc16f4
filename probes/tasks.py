"""Tasks: items that a model is asked, as a choice between texts or as free generation.

A *twin* is one set of items asked both ways, so that the format is the only difference between
its "non-generative" and its "generative" half. The twins are ours and ship with the package; any
JSONL file in the formats that the README lists is a task too, without a line of code.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
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
    `accepted` every text that counts as right when the model writes freely.
    """

    id: str
    prompt: str
    choices: tuple[str, ...] = ()
    answer: int = 0
    accepted: tuple[str, ...] = ()

    @property
    def right(self) -> str:
        """The right answer as it would stand after the prompt."""
        return self.choices[self.answer] if self.choices else f" {self.accepted[0]}"


@dataclass(frozen=True)
class Task:
    """Items asked in one format.

    `twin` names the pair that the task is half of. `normalise`: choose by log-likelihood per
    character (`acc_norm` of lm-evaluation-harness) and not by its sum (`acc`).
    """

    name: str
    format: Format
    items: tuple[Item, ...]
    twin: str | None = None
    max_new_tokens: int = 16
    normalise: bool = False

    @property
    def chance(self) -> float:
        """Expected score of blind guessing: the mean of 1/(number of choices), 0 for generation."""
        if self.format == "generation":
            return 0.0
        return sum(1 / len(item.choices) for item in self.items) / len(self.items)

    def limited(self, limit: int | None, seed: int = SEED) -> Task:
        """`limit` items drawn with a seed, in their order; the same items in both halves of a twin."""
        if limit is None or limit >= len(self.items):
            return self
        picked = sorted(random.Random(seed).sample(range(len(self.items)), limit))
        return replace(self, items=tuple(self.items[i] for i in picked))


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
    halves: tuple[Format, Format] = ("choice", "generation")
    choice, generation = (Task(name, f, items, name, spec.max_new_tokens) for f in halves)
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


# --- tasks from files ----------------------------------------------------------------------------


def load_tasks(names: Sequence[str], data: Path | None = None) -> list[Task]:
    """The tasks of these names: our twins (both halves), or `NAME.jsonl` in the folder `data`.

    Raises:
        TaskError: an unknown name (with the nearest), an empty file, a row that cannot be read
            (file and line).
    """
    tasks: list[Task] = []
    for name in names:
        if data is not None and (data / f"{name}.jsonl").is_file():
            tasks.append(read_task(data / f"{name}.jsonl"))
        elif name in TWINS:
            tasks.extend(twin(name))
        else:
            raise TaskError(_unknown(name, data))
    return tasks


def _unknown(name: str, data: Path | None) -> str:
    files = (
        sorted(p.stem for p in data.glob("*.jsonl")) if data is not None and data.is_dir() else []
    )
    near = get_close_matches(name, [*TWINS, *files], n=3, cutoff=0.4)
    return (
        f"unknown task {name!r}"
        + (f"; nearest: {', '.join(near)}" if near else "")
        + f". Embedded: {', '.join(TWINS)}"
        + (f". In {data}: {', '.join(files) or 'no .jsonl file'}" if data is not None else "")
        + ("" if data is not None else ". Your own NAME.jsonl: name its folder with --data")
    )


def read_task(file: Path) -> Task:
    """A task from a JSONL file; the fields of its rows say which kind it is.

    Multiple choice: `question`, `choices`, `answer` (index), optional `context`. Minimal pairs:
    `good`, `bad`. Generation: `question`, `answer` (text), optional `aliases`, `context`.

    Raises:
        TaskError: no rows, malformed JSON, a field that is missing or wrong (file, line, field).
    """
    rows = list(_rows(file))
    if not rows:
        raise TaskError(f"{file}: no rows")
    kinds = {_kind(row, f"{file}:{line}") for line, row in rows}
    if len(kinds) > 1:
        raise TaskError(f"{file}: rows of different kinds ({', '.join(sorted(kinds))})")
    make, format = _KINDS[kinds.pop()]
    items = tuple(make(row, f"{file}:{line}", f"{file.stem}-{line}") for line, row in rows)
    return Task(file.stem, format, items, normalise=format == "choice" and bool(items[0].prompt))


def _rows(file: Path) -> Iterable[tuple[int, dict[str, Any]]]:
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


def _kind(row: dict[str, Any], where: str) -> str:
    if "choices" in row:
        return "multiple choice"
    if "good" in row and "bad" in row:
        return "minimal pairs"
    if "question" in row and "answer" in row:
        return "generation"
    raise TaskError(
        f"{where}: fields {', '.join(sorted(row)) or '(none)'} are those of no task; needed are "
        "question+choices+answer (multiple choice), good+bad (minimal pairs) or question+answer"
    )


def _text(row: dict[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise TaskError(f"{where}: field {field!r} must be text, not {value!r}")
    return value


def _asked(row: dict[str, Any], where: str) -> str:
    context = f"{_text(row, 'context', where)}\n" if row.get("context") else ""
    return f"{context}Question: {_text(row, 'question', where)}\nAnswer:"


def _choice_item(row: dict[str, Any], where: str, id: str) -> Item:
    choices, answer = row["choices"], row.get("answer")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(c, str) for c in choices)
    ):
        raise TaskError(f"{where}: field 'choices' must be a list of at least two texts")
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise TaskError(
            f"{where}: field 'answer' must be the number of a choice, 0 to {len(choices) - 1}, not {answer!r}"
        )
    if choices.count(choices[answer]) > 1:  # wrong ones may repeat: some benchmarks' do
        raise TaskError(f"{where}: field 'choices' holds the right answer twice")
    return Item(
        str(row.get("id", id)),
        _asked(row, where),
        tuple(f" {c}" for c in choices),
        answer,
        (choices[answer],),
    )


def _pair_item(row: dict[str, Any], where: str, id: str) -> Item:
    good, bad = _text(row, "good", where), _text(row, "bad", where)
    if good == bad:
        raise TaskError(f"{where}: 'good' and 'bad' are the same text")
    return Item(str(row.get("id", id)), "", (good, bad), 0, (good,))


def _generation_item(row: dict[str, Any], where: str, id: str) -> Item:
    answer, aliases = _text(row, "answer", where), row.get("aliases", [])
    if not isinstance(aliases, list) or not all(isinstance(a, str) for a in aliases):
        raise TaskError(f"{where}: field 'aliases' must be a list of texts")
    return Item(
        str(row.get("id", id)),
        _asked(row, where),
        accepted=tuple(dict.fromkeys([answer, *aliases])),
    )


_KINDS: dict[str, tuple[Callable[[dict[str, Any], str, str], Item], Format]] = {
    "multiple choice": (_choice_item, "choice"),
    "minimal pairs": (_pair_item, "choice"),
    "generation": (_generation_item, "generation"),
}
