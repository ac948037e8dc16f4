"""Scoring: what a model chooses, and what it writes, item by item.

A choice is the option with the largest log-likelihood after the prompt. What all prompts of a task
begin with is run once and its key-value cache shared; so is what the options of one item follow.
Free text is greedy and ends where its task says; a row that has ended costs nothing more once all
rows have.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ..analysis import schema
from . import grading, sandbox
from .items import WRITTEN, Item, Task
from .kernels import log_p
from .model import Model, pad

BATCH_TOKENS = 2048
BATCH_ROWS = 32
LOGIT_ROWS = 512
FILLED = 0.8  # of a batch's length that its shortest row has at least
STEM = 8  # tokens that the options of an item must share for a cache of their own to pay


@dataclass(frozen=True)
class Answer:
    """What one model made of one item."""

    score: float
    text: str
    no_answer: bool = False
    no_stop: bool = False
    repetition: float = 0.0
    f1: float = float("nan")
    log_p: float = float("nan")


def answer(
    model: Model, task: Task, *, progress: Callable[[float], None] = lambda _: None
) -> list[Answer]:
    """One model's answers to all items of a task, in their order."""
    return _ASKED[task.format](model, task, progress)


def answers(
    model: Model, tasks: Sequence[Task], *, progress: Callable[[float], None] = lambda _: None
) -> list[list[Answer]]:
    """One model's answers to several tasks, task by task."""
    count = len(tasks)
    return [
        answer(model, task, progress=lambda done, i=i: progress((i + done) / count))
        for i, task in enumerate(tasks)
    ]


def score(
    dense: Model,
    candidate: Model,
    *,
    tasks: Sequence[Task],
    progress: Callable[[float], None] = lambda _: None,
) -> xr.Dataset:
    """Both models on the same items: the `/scores` group.

    Args:
        dense: the reference model.
        candidate: the compressed model.
        tasks: what to ask; see `prunescope.probes.tasks`.
        progress: called with the share of the work that is done.
    """
    sides = [
        answers(model, tasks, progress=lambda done, i=i: progress((i + done) / 2))
        for i, model in enumerate((dense, candidate))
    ]
    return pair(tasks, *sides)


def pair(
    tasks: Sequence[Task], dense: Sequence[Sequence[Answer]], candidate: Sequence[Sequence[Answer]]
) -> xr.Dataset:
    """The `/scores` group from the answers of both models, task by task."""
    rows = [(t, item) for t in tasks for item in t.items]
    both = [[a for answers in side for a in answers] for side in (dense, candidate)]
    numbers = {
        name: np.array([[float(getattr(a, name)) for a in side] for side in both], np.float32).T
        for name in ("score", "no_answer", "no_stop", "repetition", "f1", "log_p")
    }
    text = np.array([[a.text for a in side] for side in both], dtype=object).T
    chance = {t.name + t.format: t.chance for t in tasks}
    coords: dict[str, Any] = {
        "item": np.arange(len(rows)),
        "model": list(schema.MODELS),
        "item_id": ("item", [item.id for _, item in rows]),
        "task": ("item", [t.name for t, _ in rows]),
        "format": ("item", [t.format for t, _ in rows]),
        "twin": ("item", [t.twin or "" for t, _ in rows]),
        "kind": ("item", [t.kind for t, _ in rows]),
        "chance": ("item", [_chance(t, item, chance) for t, item in rows]),
        "prompt_text": ("item", [item.prompt for _, item in rows]),
        "accepted": ("item", [" | ".join(item.accepted) for _, item in rows]),
    }
    return schema.dataset("scores", {**numbers, "text": text}, coords)


def _chance(task: Task, item: Item, chance: dict[str, float]) -> float:
    return 1 / len(item.choices) if task.format == "choice" else chance[task.name + task.format]


# --- choosing ------------------------------------------------------------------------------------


def _choose(model: Model, task: Task, progress: Callable[[float], None]) -> list[Answer]:
    rows: list[tuple[list[int], int]] = []  # token ids, and where the option begins
    for item in task.items:
        rows += [split(model, item.before(i), choice) for i, choice in enumerate(item.choices)]
    sizes = [len(item.choices) for item in task.items]
    sums = iter(likelihoods(model, rows, progress, sizes))
    return [
        _chosen(item, np.array(list(itertools.islice(sums, size))), task.normalise)
        for item, size in zip(task.items, sizes, strict=True)
    ]


def _chosen(item: Item, values: np.ndarray, normalise: bool) -> Answer:
    lengths = np.array([max(1, len(c.strip())) for c in item.choices])
    best = int((values / lengths if normalise else values).argmax())
    return Answer(
        float(best == item.answer), item.choices[best].strip(), log_p=float(values[item.answer])
    )


def _last_word(model: Model, task: Task, progress: Callable[[float], None]) -> list[Answer]:
    """Right where every token of the word is the likeliest after those before it."""
    rows = [split(model, item.prompt, item.choices[0]) for item in task.items]
    sums, greedy, tokens = _targets(model, rows, progress, [1] * len(rows))
    return [
        Answer(float(hit), model.tokenizer.decode(first).strip(), log_p=float(value))
        for value, hit, first in zip(sums, greedy, tokens, strict=True)
    ]


def split(model: Model, prompt: str, choice: str) -> tuple[list[int], int]:
    """Token ids of prompt + choice, and the index of the choice's first token.

    As lm-evaluation-harness: the whole is tokenized at once and cut where the prompt alone ends.
    Without a prompt the text follows the tokenizer's first special token.
    """
    tokenizer = model.tokenizer
    whole = tokenizer(prompt + choice)["input_ids"]
    if prompt:
        return whole, min(len(tokenizer(prompt)["input_ids"]), len(whole) - 1)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return ([first, *whole], 1) if whole[:1] != [first] else (whole, 1)


def likelihoods(
    model: Model,
    rows: Sequence[tuple[list[int], int]],
    progress: Callable[[float], None] = lambda _: None,
    sizes: Sequence[int] | None = None,
) -> np.ndarray:
    """log P(ids[start:] | ids[:start]) of each row, nat, float64 `(row,)`.

    `sizes`: how many rows after each other belong to one item, whose beginning is run once.
    """
    return _targets(model, rows, progress, sizes or [1] * len(rows))[0]


Targets = tuple[np.ndarray, np.ndarray, list[list[int]]]
"""Of each row: log-likelihood, whether it is what greedy decoding writes, its likeliest tokens."""


def _targets(
    model: Model,
    rows: Sequence[tuple[list[int], int]],
    progress: Callable[[float], None],
    sizes: Sequence[int],
) -> Targets:
    shared = _common_prefix(rows)
    beginning = _run(model, [rows[0][0][:shared]], None, 0)
    sums, greedy = np.zeros(len(rows)), np.zeros(len(rows), bool)
    likeliest: list[list[int]] = [[] for _ in rows]
    done = 0
    for groups in _batches(_groups(model, rows, sizes, shared), lambda g: g.stem - shared):
        past, places = beginning, [0] * len(groups)
        if any(g.stem > shared for g in groups):
            past = _run(model, [rows[g.rows[0]][0][: g.stem] for g in groups], past, shared)
            places = list(range(len(groups)))
        members = [(i, g.stem, n) for n, g in zip(places, groups, strict=True) for i in g.rows]
        members.sort(key=lambda m: m[1] - len(rows[m[0]][0]))
        for batch in _batches(members, lambda m: len(rows[m[0]][0]) - m[1]):
            found = _tails(model, rows, batch, past)
            which = [i for i, *_ in batch]
            sums[which], greedy[which] = found[:2]
            for i, tokens in zip(which, found[2], strict=True):
                likeliest[i] = tokens
            done += len(batch)
            progress(done / len(rows))
    return sums, greedy, likeliest


@dataclass(frozen=True)
class _Group:
    """The rows of one item; their first `stem` tokens are the same."""

    rows: tuple[int, ...]
    stem: int


def _groups(
    model: Model, rows: Sequence[tuple[list[int], int]], sizes: Sequence[int], shared: int
) -> list[_Group]:
    """Items, longest stem first; one that does not pay, or would move a window, is the shared one."""
    window = getattr(model.module.config, "sliding_window", None)
    result: list[_Group] = []
    start = 0
    for size in sizes:
        members = tuple(range(start, start + size))
        start += size
        longest = max(len(rows[i][0]) for i in members)
        stem = _common_prefix([rows[i] for i in members])
        if size == 1 or stem - shared < STEM or (window and longest > window):
            stem = shared
        result.append(_Group(members, stem))
    return sorted(result, key=lambda g: -g.stem)


T = TypeVar("T")


def _batches(things: Sequence[T], length: Callable[[T], int]) -> list[list[T]]:
    """Things, longest first, in batches of at most BATCH_TOKENS tokens and little padding."""
    batches: list[list[T]] = []
    for thing in things:
        first = length(batches[-1][0]) if batches else 0
        full = not batches or (len(batches[-1]) + 1) * max(1, first) > BATCH_TOKENS
        if full or length(thing) < FILLED * first - 1 or (length(thing) == 0) != (first == 0):
            batches.append([])
        batches[-1].append(thing)
    return batches


def _common_prefix(rows: Sequence[tuple[list[int], int]]) -> int:
    """Length of what all rows begin with, short of the token that predicts the first option."""
    limit = min(start for _, start in rows) - 1
    first = rows[0][0]
    length = 0
    while length < limit and all(ids[length] == first[length] for ids, _ in rows):
        length += 1
    return length


@dataclass(frozen=True)
class _Past:
    """Keys and values of beginnings, `(row, position)`: `mask` is 1 where there is a token."""

    cache: Any
    mask: Tensor
    lengths: Tensor


def _run(model: Model, rows: list[list[int]], past: _Past | None, shared: int) -> _Past | None:
    """The beginnings `rows[i][shared:]` behind what they all share; None where nothing is left."""
    if not any(len(row) > shared for row in rows):
        return past
    batch = pad(model, [row[shared:] for row in rows], side="left")
    before = None if past is None else _repeated(past, [0] * len(rows))
    state, mask = _forward(model, batch, before)
    lengths = batch["attention_mask"].new_tensor([len(row) for row in rows])
    return _Past(state.past_key_values, mask, lengths)


def _repeated(past: _Past, picks: list[int]) -> _Past:
    """The rows `picks` of a past, in a cache of their own."""
    index = torch.tensor(picks, device=past.mask.device)
    cache = copy.deepcopy(past.cache)
    cache.reorder_cache(index)
    return _Past(cache, past.mask[index], past.lengths[index])


def _forward(model: Model, batch: dict[str, Tensor], past: _Past | None) -> tuple[Any, Tensor]:
    """States and cache of a batch that goes on from `past`, and the mask of all that was read."""
    mask = batch["attention_mask"]
    if past is not None:
        batch = {**batch, "position_ids": batch["position_ids"] + past.lengths[:, None]}
        mask = torch.cat([past.mask, mask], dim=-1)
    cache = past.cache if past is not None else None
    with torch.no_grad():
        state = model.module.base_model(
            **{**batch, "attention_mask": mask}, past_key_values=cache, use_cache=True
        )
    return state, mask


def _tails(
    model: Model,
    rows: Sequence[tuple[list[int], int]],
    batch: list[tuple[int, int, int]],
    past: _Past | None,
) -> Targets:
    """Of rows `(row, stem, place of the stem in past)`, what follows their stems.

    The last token of a row predicts nothing that is asked.
    """
    tails = [rows[i][0][stem:-1] for i, stem, _ in batch]
    before = None if past is None else _repeated(past, [n for *_, n in batch])
    hidden = _forward(model, pad(model, tails), before)[0].last_hidden_state
    starts = [rows[i][1] - stem for i, stem, _ in batch]
    return _target_sums(model, hidden, starts, [rows[i][0][rows[i][1] :] for i, *_ in batch])


def _target_sums(model: Model, hidden: Tensor, starts: list[int], ends: list[list[int]]) -> Targets:
    """Of the tokens `ends` that stand from `starts` on, each predicted by the state before it."""
    row = torch.tensor([i for i, tokens in enumerate(ends) for _ in tokens])
    places = [
        start - 1 + t for start, end in zip(starts, ends, strict=True) for t in range(len(end))
    ]
    states = hidden[row, torch.tensor(places)]
    target = torch.tensor([t for tokens in ends for t in tokens], device=hidden.device)
    readout = model.readout("raw")
    values, likeliest = list[Tensor](), list[Tensor]()
    for part, ids in zip(states.split(LOGIT_ROWS), target.split(LOGIT_ROWS), strict=True):
        logits = readout.logits(
            readout.states(part), part.new_empty((len(part), model.vocabulary), dtype=torch.float32)
        )
        values.append(log_p(logits, ids))
        likeliest.append(logits.argmax(-1))
    best = torch.cat(likeliest)
    zeros = torch.zeros(len(ends), dtype=torch.float64)
    sums = zeros.clone().index_add_(0, row, torch.cat(values).double().cpu())
    missed = zeros.index_add_(0, row, (best != target).double().cpu())
    tokens = [t.tolist() for t in best.cpu().split([len(end) for end in ends])]
    return sums.numpy(), (missed == 0).numpy(), tokens


# --- writing -------------------------------------------------------------------------------------


def _write(model: Model, task: Task, progress: Callable[[float], None]) -> list[Answer]:
    prompts = [item.prompt for item in task.items]
    written = generate(model, prompts, task.max_new_tokens, until=task.until, progress=progress)
    return [judge(task, item, *w) for item, w in zip(task.items, written, strict=True)]


def judge(task: Task, item: Item, text: str, tokens: Sequence[int], stopped: bool) -> Answer:
    """What a written text is worth; code is run, in a sandbox."""
    shown = text if task.grade == "code" else text.strip()
    if task.grade == "code":
        right = sandbox.passes(item.tests.replace(WRITTEN, text))
    else:
        right = grading.right(shown, item, task.grade)
    return Answer(
        float(right), shown, not grading.answered(shown, task.grade), not stopped,
        grading.repetition(tokens),
        f1=grading.f1(shown, item.accepted) if task.grade == "quad" else float("nan"),
    )  # fmt: skip


_ASKED: dict[str, Callable[[Model, Task, Callable[[float], None]], list[Answer]]] = {
    "choice": _choose,
    "generation": _write,
    "last word": _last_word,
}


def generate(
    model: Model,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    until: Sequence[str] = (),
    progress: Callable[[float], None] = lambda _: None,
) -> list[tuple[str, list[int], bool]]:
    """Greedy continuations: text, token ids, and whether the text ended before the limit.

    A text ends before the first of `until` that it would hold.
    """
    rows = [model.tokenizer(p)["input_ids"] for p in prompts]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    result: list[tuple[str, list[int], bool]] = [("", [], False)] * len(rows)
    beginning = _beginning(model, rows)
    done = 0
    for batch in (order[i : i + BATCH_ROWS] for i in range(0, len(order), BATCH_ROWS)):
        stops = [_Until(model, until)] if until else []
        for i, tokens in zip(
            batch,
            extend(model, [rows[i] for i in batch], max_new_tokens, stops, past=beginning),
            strict=True,
        ):
            result[i] = _ended(model, tokens, max_new_tokens, until)
        done += len(batch)
        progress(done / len(rows))
    return result


def _beginning(model: Model, rows: Sequence[list[int]]) -> _Past | None:
    """What all rows begin with, run once; None where that is little, or a window would move."""
    length = min(map(len, rows)) - 1
    window = getattr(model.module.config, "sliding_window", None)
    shared = _common_prefix([(row, length + 1) for row in rows])
    if len(rows) < 2 or shared < STEM or window:
        return None
    return _run(model, [rows[0][:shared]], None, 0)


def extend(
    model: Model,
    rows: list[list[int]],
    limit: int,
    stops: Sequence[Callable[..., Tensor]] = (),
    processors: Sequence[Callable[..., Tensor]] = (),
    cache: Any = None,
    past: _Past | None = None,
) -> list[list[int]]:
    """Up to `limit` tokens after each row, the largest logit each time; ended rows are padded.

    `stops` and `processors` are transformers' stopping criteria and logits processors; `cache` is
    an empty one for the keys and values of all that is read, `past` what all rows begin with.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    shared = 0 if past is None else int(past.lengths[0])
    batch = pad(model, [row[shared:] for row in rows], side="left")
    del batch["position_ids"]  # generation makes its own from the mask
    if past is not None:
        stem = batch["input_ids"].new_tensor([rows[0][:shared]]).expand(len(rows), -1)
        before = _repeated(past, [0] * len(rows))
        parts = {"input_ids": stem, "attention_mask": before.mask}
        batch = {n: torch.cat([parts[n], batch[n]], dim=-1) for n in parts}
        cache = before.cache
    config = GenerationConfig(
        max_new_tokens=limit, do_sample=False, pad_token_id=model.tokenizer.pad_token_id,
        eos_token_id=model.tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.no_grad():
        ids = model.module.generate(
            **batch, generation_config=config, stopping_criteria=StoppingCriteriaList(stops),
            logits_processor=LogitsProcessorList(processors), past_key_values=cache,
        )  # fmt: skip
    return ids[:, batch["input_ids"].shape[1] :].tolist()


class _Until:
    """A row has ended once its text holds one of some strings; the prompt is not looked at."""

    def __init__(self, model: Model, until: Sequence[str]) -> None:
        self.tokenizer, self.until = model.tokenizer, until
        self.longest = max(map(len, until)) + 4  # tokens that the last new string can lie in
        self.start = -1

    def __call__(self, ids: Tensor, _scores: Tensor, **_: Any) -> Tensor:
        if self.start < 0:
            self.start = ids.shape[1] - 1
        tail = ids[:, max(self.start, ids.shape[1] - self.longest) :]
        texts = self.tokenizer.batch_decode(tail)
        ended = [any(stop in text for stop in self.until) for text in texts]
        return torch.tensor(ended, device=ids.device)


def _ended(
    model: Model, tokens: list[int], limit: int, until: Sequence[str]
) -> tuple[str, list[int], bool]:
    """Cut what follows the end of one row."""
    tokenizer = model.tokenizer
    stopped = len(tokens) < limit
    if tokenizer.eos_token_id in tokens:
        tokens, stopped = tokens[: tokens.index(tokenizer.eos_token_id)], True
    text = tokenizer.decode(tokens, skip_special_tokens=not until)
    ends = [place for place in map(text.find, until) if place >= 0]
    if ends:

        def over(n: int) -> bool:
            return any(stop in tokenizer.decode(tokens[: n + 1]) for stop in until)

        return text[: min(ends)], tokens[: next(filter(over, range(len(tokens))))], True
    return tokenizer.decode(tokens, skip_special_tokens=True), tokens, stopped
