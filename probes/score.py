"""Scoring: what a model chooses, and what it writes, item by item.

A choice is the option with the largest log-likelihood after the prompt. What all prompts of a task
begin with is run once and its key-value cache shared. Free text is greedy and ends at the first
line break; a row that has ended costs nothing more once all rows have.
"""

from __future__ import annotations

import copy
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ..analysis import schema
from .kernels import log_p
from .model import Model, pad
from .tasks import Item, Task

BATCH_TOKENS = 2048
BATCH_ROWS = 32
LOGIT_ROWS = 512


@dataclass(frozen=True)
class Answer:
    """What one model made of one item."""

    score: float
    text: str
    no_answer: bool = False
    no_stop: bool = False
    repetition: float = 0.0


def answer(
    model: Model, task: Task, *, progress: Callable[[float], None] = lambda _: None
) -> list[Answer]:
    """One model's answers to all items of a task, in their order."""
    return (_choose if task.format == "choice" else _write)(model, task, progress)


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
        for name in ("score", "no_answer", "no_stop", "repetition")
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
        rows += [split(model, item.prompt, choice) for choice in item.choices]
    sums = likelihoods(model, rows, progress)
    answers: list[Answer] = []
    start = 0
    for item in task.items:
        values = sums[start : start + len(item.choices)]
        start += len(item.choices)
        if task.normalise:
            values = values / np.array([max(1, len(c.strip())) for c in item.choices])
        best = int(values.argmax())
        answers.append(Answer(float(best == item.answer), item.choices[best].strip()))
    return answers


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
) -> np.ndarray:
    """log P(ids[start:] | ids[:start]) of each row, nat, float64 `(row,)`."""
    shared = _common_prefix(rows)
    cache = _run_prefix(model, rows[0][0][:shared])
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    result = np.zeros(len(rows))
    done = 0
    for batch in _batches(order, [len(ids) - shared for ids, _ in rows]):
        tails = [rows[i][0][shared:] for i in batch]
        hidden = _hidden(model, tails, cache, shared)
        result[batch] = _target_sums(model, hidden, tails, [rows[i][1] - shared for i in batch])
        done += len(batch)
        progress(done / len(rows))
    return result


def _common_prefix(rows: Sequence[tuple[list[int], int]]) -> int:
    """Length of what all rows begin with, short of the token that predicts the first option."""
    limit = min(start for _, start in rows) - 1
    first = rows[0][0]
    length = 0
    while length < limit and all(ids[length] == first[length] for ids, _ in rows):
        length += 1
    return length


def _run_prefix(model: Model, prefix: list[int]) -> Any:
    if not prefix:
        return None
    ids = torch.tensor([prefix], device=model.device)
    with torch.no_grad():
        return model.module.base_model(input_ids=ids, use_cache=True).past_key_values


def _batches(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Rows, longest first, in batches of at most BATCH_TOKENS tokens."""
    batches: list[list[int]] = []
    for i in order:
        full = not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > BATCH_TOKENS
        if full:
            batches.append([])
        batches[-1].append(i)
    return batches


def _hidden(model: Model, tails: list[list[int]], cache: Any, shared: int) -> Tensor:
    """States after the final norm for the tails, `(row, token, d_model)`, reading a shared prefix."""
    batch = pad(model, tails)
    if cache is not None:
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(tails))
        ones = batch["attention_mask"].new_ones((len(tails), shared))
        batch["attention_mask"] = torch.cat([ones, batch["attention_mask"]], dim=-1)
        batch["position_ids"] = batch["position_ids"] + shared
    with torch.no_grad():
        base = model.module.base_model
        return base(**batch, past_key_values=cache, use_cache=cache is not None).last_hidden_state


def _target_sums(
    model: Model, hidden: Tensor, tails: list[list[int]], starts: list[int]
) -> np.ndarray:
    """Sum of the log-probabilities of each row's tokens from `start` on."""
    where = [(i, t) for i, ids in enumerate(tails) for t in range(starts[i], len(ids))]
    row = torch.tensor([i for i, _ in where])
    states = hidden[row, torch.tensor([t - 1 for _, t in where])]
    target = torch.tensor([tails[i][t] for i, t in where], device=hidden.device)
    readout = model.readout("raw")
    pieces: list[Tensor] = []
    for part, ids in zip(states.split(LOGIT_ROWS), target.split(LOGIT_ROWS), strict=True):
        logits = readout.logits(
            readout.states(part), part.new_empty((len(part), model.vocabulary), dtype=torch.float32)
        )
        pieces.append(log_p(logits, ids))
    values = torch.cat(pieces).cpu()
    return torch.zeros(len(tails), dtype=torch.float64).index_add_(0, row, values).numpy()


# --- writing -------------------------------------------------------------------------------------


def _write(model: Model, task: Task, progress: Callable[[float], None]) -> list[Answer]:
    prompts = [item.prompt for item in task.items]
    written = generate(model, prompts, task.max_new_tokens, stop_at_line=True, progress=progress)
    # A twin's answer may run on ("Paris, which ..."): its prompt does not say where to end.
    return [
        grade(text, item.accepted, tokens, stopped, exact=task.twin is None)
        for item, (text, tokens, stopped) in zip(task.items, written, strict=True)
    ]


def grade(
    text: str, accepted: Sequence[str], tokens: Sequence[int], stopped: bool, *, exact: bool
) -> Answer:
    """Right where the normalised text is an accepted answer (or, not `exact`, begins with one)."""
    found = normalise(text)
    wanted = [normalise(a) for a in accepted]
    right = any(found == w or (not exact and found.startswith(f"{w} ")) for w in wanted if w)
    return Answer(float(right), text, not found, not stopped, repetition(tokens))


def normalise(text: str) -> str:
    """Lower case, no accents, no punctuation, no articles, single spaces (as SQuAD's scorer)."""
    plain = unicodedata.normalize("NFKD", text.lower())
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    plain = re.sub(r"[^\w\s]", " ", plain)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that occurred before; 0 for a text too short to have two."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def generate(
    model: Model,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    stop_at_line: bool = False,
    progress: Callable[[float], None] = lambda _: None,
) -> list[tuple[str, list[int], bool]]:
    """Greedy continuations: text, token ids, and whether the text ended before the limit."""
    rows = [model.tokenizer(p)["input_ids"] for p in prompts]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    result: list[tuple[str, list[int], bool]] = [("", [], False)] * len(rows)
    stops, done = [_LineEnd(model)] if stop_at_line else [], 0
    for batch in (order[i : i + BATCH_ROWS] for i in range(0, len(order), BATCH_ROWS)):
        for i, tokens in zip(
            batch,
            extend(model, [rows[i] for i in batch], max_new_tokens, stops),
            strict=True,
        ):
            result[i] = _ended(model, tokens, max_new_tokens, stop_at_line)
        done += len(batch)
        progress(done / len(rows))
    return result


def extend(
    model: Model,
    rows: list[list[int]],
    limit: int,
    stops: Sequence[Callable[..., Tensor]] = (),
    processors: Sequence[Callable[..., Tensor]] = (),
    cache: Any = None,
) -> list[list[int]]:
    """Up to `limit` tokens after each row, the largest logit each time; ended rows are padded.

    `stops` and `processors` are transformers' stopping criteria and logits processors; `cache` is
    an empty one for the keys and values of all that is read.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    batch = pad(model, rows, side="left")
    del batch["position_ids"]  # generation makes its own from the mask
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


class _LineEnd:
    """A row has ended once a token holds a line break."""

    def __init__(self, model: Model) -> None:
        self.breaks = line_breaks(model).to(model.device)

    def __call__(self, ids: Tensor, _scores: Tensor, **_: Any) -> Tensor:
        return torch.isin(ids[:, -1], self.breaks)


def line_breaks(model: Model) -> Tensor:
    """Ids of the tokens whose text holds a line break."""
    texts = model.tokenizer.batch_decode([[i] for i in range(len(model.tokenizer))])
    return torch.tensor([i for i, text in enumerate(texts) if "\n" in text], dtype=torch.long)


def _ended(
    model: Model, tokens: list[int], limit: int, stop_at_line: bool
) -> tuple[str, list[int], bool]:
    """Cut what follows the end of one row."""
    tokenizer = model.tokenizer
    stopped = len(tokens) < limit
    if tokenizer.eos_token_id in tokens:
        tokens, stopped = tokens[: tokens.index(tokenizer.eos_token_id)], True
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    if stop_at_line and "\n" in text:
        head = text.split("\n", 1)[0]
        kept = next(n for n in range(len(tokens) + 1) if "\n" in tokenizer.decode(tokens[: n + 1]))
        return head.strip(), tokens[:kept], True
    return text.strip() if stop_at_line else text, tokens, stopped
