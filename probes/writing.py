"""Writing: what a model goes on with after a prompt, and what it had read by then.

Prompts stand left-padded, so that all texts of a batch begin in the same column; the keys and
values of writing are then those of one pass over prompts and texts laid out the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from . import trace
from .items import SEED
from .model import Model, batches, placed
from .score import extend

Rows = list[list[int]]


@dataclass(frozen=True)
class Draw:
    """How tokens are chosen: greedily (`temperature` None), or by seeded Gumbel noise."""

    temperature: float | None = None
    seed: int = SEED


@dataclass(frozen=True)
class Written:
    """A batch of texts, end-of-text tokens included, and what the model read for them.

    `states`: `(step, d_model)` of each text, before the final norm, that each token was chosen
    from; `cache`: keys and values of `layout(rows, texts)`.
    """

    rows: Rows
    texts: Rows
    states: list[Tensor]
    cache: DynamicCache


def write(
    model: Model,
    prompts: Sequence[str],
    steps: int,
    *,
    temperature: float | None = None,
    seed: int = SEED,
    progress: Callable[[float], None] = lambda _: None,
) -> Rows:
    """Token ids that a model writes after each prompt, the end-of-text token included.

    Greedy, or with a `temperature` drawn by Gumbel noise that depends on the seed, the prompt's
    number and the step alone: two models given the same seed get the same noise.
    """
    rows = [model.tokenizer(p)["input_ids"] for p in prompts]
    found: Rows = [[] for _ in rows]
    done = 0
    for part in batches([len(r) + steps for r in rows]):
        made = write_batch(model, rows, part, steps, Draw(temperature, seed))
        for i, text in zip(part, made.texts, strict=True):
            found[i] = text
        done += len(part)
        progress(done / len(rows))
    return found


def write_batch(model: Model, rows: Rows, part: Sequence[int], steps: int, draw: Draw) -> Written:
    """What a model writes after `rows[i]` for each i of `part`, up to `steps` tokens."""
    mine = [rows[i] for i in part]
    noise = [] if draw.temperature is None else [_Gumbel(draw.temperature, draw.seed, part)]
    cache = DynamicCache()
    with trace.newest_states(model.module, model.anatomy) as newest:
        found = extend(model, mine, steps, processors=noise, cache=cache)
    texts = [_until_end(ids, model.tokenizer.eos_token_id) for ids in found]
    seen = zip(torch.stack(newest, dim=1), texts, strict=True)
    return Written(mine, texts, [s[: len(text)] for s, text in seen], cache)


def read_batch(model: Model, rows: Rows, texts: Rows) -> Written:
    """The same of given texts, by one pass over them."""
    cache, batch = DynamicCache(), layout(model, rows, texts)
    states = trace.final_states(model.module, model.anatomy, batch, cache)
    return Written(rows, texts, at_steps(states, rows, texts), cache)


def at_steps(states: Tensor, rows: Rows, texts: Rows) -> list[Tensor]:
    """Of the states of a layout, those that each token was chosen from, `(step, d_model)` a text."""
    start = max(map(len, rows)) - 1
    return [row[start : start + len(text)] for row, text in zip(states, texts, strict=True)]


def layout(model: Model, rows: Rows, texts: Rows) -> dict[str, Tensor]:
    """What a model has read once it has chosen every token: `input_ids`, mask and positions.

    Prompts end, and texts without their last token begin, in the same column.
    """
    start = max(map(len, rows))
    whole = [[*row, *text[:-1]] for row, text in zip(rows, texts, strict=True)]
    starts = [start - len(row) for row in rows]
    return placed(model, whole, starts, start + max(map(len, texts)) - 1)


def _until_end(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


class _Gumbel:
    """Adds Gumbel noise to z/T: the largest sum is a draw from softmax(z/T)."""

    def __init__(self, temperature: float, seed: int, prompts: Sequence[int]) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in prompts]

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty(scores.shape, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() / self.temperature - noise.clamp_(min=1e-30).log_().to(scores.device)
