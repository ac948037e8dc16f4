"""Judging what a model wrote: right or wrong, F1, and how it failed."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from .items import Grade, Item

_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def right(text: str, item: Item, grade: Grade) -> bool:
    """Whether a text answers an item (not for code, which must be run)."""
    return any(_GRADES[grade](text, accepted) for accepted in item.accepted)


def answered(text: str, grade: Grade) -> bool:
    """Whether anything could be read as an answer at all."""
    return bool(_NUMBER.findall(text)) if grade == "number" else bool(normalise(text))


def _begins(text: str, accepted: str) -> bool:
    found, wanted = normalise(text), normalise(accepted)
    return bool(wanted) and (found == wanted or found.startswith(f"{wanted} "))


def _exact(text: str, accepted: str) -> bool:
    return bool(wanted := normalise(accepted)) and normalise(text) == wanted


def _number(text: str, accepted: str) -> bool:
    return last_number(text) == last_number(accepted)


_GRADES: dict[str, Callable[[str, str], bool]] = {
    "begins": _begins,
    "exact": _exact,
    "quad": _exact,
    "number": _number,
}


def last_number(text: str) -> str:
    """The last number of a text without `$` and separators ("flexible-extract" of GSM8K); or ""."""
    found = _NUMBER.findall(text)
    return re.sub(r"[,$]|\.$", "", found[-1]) if found else ""


def f1(text: str, accepted: Sequence[str]) -> float:
    """Word overlap with the nearest accepted answer, as SQuAD's scorer."""
    return max((_f1(normalise(text).split(), normalise(a).split()) for a in accepted), default=0.0)


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    common = (Counter(found) & Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted))


def normalise(text: str) -> str:
    """Lower case, no accents, no punctuation, no articles, single spaces (as SQuAD's scorer)."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).lower())
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    plain = re.sub(r"[^\w\s]", " ", plain)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that occurred before; 0 for a text too short to have two."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0
