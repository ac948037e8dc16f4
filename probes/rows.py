"""Rows of the common formats as items; a wrong field is an error that names file, line and field."""

from __future__ import annotations

from dataclasses import replace

from .items import WRITTEN, Item, Row, TaskError, text_of

LETTERS = "ABCDEFGHIJ"


def asked(row: Row, where: str) -> str:
    """`context` if there is one, question, and the word that an answer follows."""
    context = f"{text_of(row, 'context', where)}\n" if row.get("context") else ""
    return f"{context}Question: {text_of(row, 'question', where)}\nAnswer:"


def choices_of(row: Row, where: str, twice: bool = False) -> tuple[list[str], int]:
    """The options of a row and the index of the right one; may it be there `twice`?

    Raises:
        TaskError: fewer than two options, no text, an answer out of range, the right one twice.
    """
    choices, answer = row.get("choices"), row.get("answer")
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
    if (
        not twice and choices.count(choices[answer]) > 1
    ):  # wrong ones may repeat: some benchmarks' do
        raise TaskError(f"{where}: field 'choices' holds the right answer twice")
    return choices, answer


def choice_item(row: Row, where: str, id: str, prompt: str) -> Item:
    """The options themselves follow the prompt, one space before each."""
    choices, answer = choices_of(row, where)
    texts = tuple(f" {c}" for c in choices)
    return Item(str(row.get("id", id)), prompt, texts, answer, (choices[answer],))


def question_item(row: Row, where: str, id: str) -> Item:
    """Context and question, then the options themselves."""
    return choice_item(row, where, id, asked(row, where))


def letter_item(row: Row, where: str, id: str, prefix: str = "") -> Item:
    """The options stand in the prompt, one a line, and their letters follow it."""
    choices, answer = choices_of(row, where, twice=True)
    if len(choices) > len(LETTERS):
        raise TaskError(f"{where}: {len(choices)} choices; at most {len(LETTERS)} have letters")
    context = f"{text_of(row, 'context', where)}\n" if row.get("context") else ""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    question = prefix + text_of(row, "question", where).strip()
    prompt = context + "\n".join([question, *lines, "Answer:"])
    letters = tuple(f" {letter}" for letter in LETTERS[: len(choices)])
    return Item(str(row.get("id", id)), prompt, letters, answer, (choices[answer],))


def blank_item(row: Row, where: str, id: str) -> Item:
    """The options fill the blank `_`; what follows it is what is scored, after each of them."""
    choices, answer = choices_of(row, where)
    before, mark, after = text_of(row, "question", where).partition("_")
    if not mark:
        raise TaskError(f"{where}: field 'question' has no blank '_'")
    item = Item(str(row.get("id", id)), before, (f" {after.strip()}",) * len(choices), answer)
    return replace(item, accepted=(choices[answer],), contexts=tuple(before + c for c in choices))


def pair_item(row: Row, where: str, id: str) -> Item:
    """Two whole texts, the first of which is the good one."""
    good, bad = text_of(row, "good", where), text_of(row, "bad", where)
    if good == bad:
        raise TaskError(f"{where}: 'good' and 'bad' are the same text")
    return Item(str(row.get("id", id)), "", (good, bad), 0, (good,))


def text_item(row: Row, where: str, id: str, prompt: str) -> Item:
    """A question that is answered in writing, with every answer that counts."""
    answer, aliases = text_of(row, "answer", where), row.get("aliases", [])
    if not isinstance(aliases, list) or not all(isinstance(a, str) for a in aliases):
        raise TaskError(f"{where}: field 'aliases' must be a list of texts")
    return Item(str(row.get("id", id)), prompt, accepted=tuple(dict.fromkeys([answer, *aliases])))


def written_item(row: Row, where: str, id: str) -> Item:
    """Context and question, answered in writing."""
    return text_item(row, where, id, asked(row, where))


def whole_item(row: Row, where: str, id: str) -> Item:
    """A text that is read, not answered."""
    return Item(str(row.get("id", id)), text_of(row, "text", where))


def code_item(row: Row, where: str, id: str, prompt: str) -> Item:
    """A program to write, and the one that tests it, with `WRITTEN` where that goes."""
    style, tests = row.get("style"), text_of(row, "test", where)
    if style not in ("completion", "instruction"):
        raise TaskError(f"{where}: field 'style' must be completion or instruction, not {style!r}")
    head = text_of(row, "prompt", where) if style == "completion" else ""
    program = f"{head}{WRITTEN}\n{tests}"
    reference = str(row.get("canonical_solution", ""))
    return Item(str(row.get("id", id)), prompt, accepted=(reference,), tests=program)
