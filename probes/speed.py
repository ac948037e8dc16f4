"""How fast two models run, measured alternately: on a shared machine nothing else compares."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .model import Model, pad
from .score import extend

ROUNDS = 5
ROWS, PROMPT, TOKENS, STEPS = 4, 8, 128, 12


def speed(
    dense: Model,
    candidate: Model,
    *,
    rounds: int = ROUNDS,
    progress: Callable[[float], None] = lambda _: None,
) -> dict[str, np.ndarray]:
    """Tokens per second of both models in turn, after one round to warm up.

    Returns:
        `prefill_rate` (4 texts of 128 tokens read at once, logits included) and `decode_rate` (4
        texts written with a cache, 12 tokens each), `(round, model)`, dense first.
    """
    works = {"prefill_rate": (_read, ROWS * TOKENS), "decode_rate": (_write, ROWS * STEPS)}
    rates = {name: np.empty((rounds, 2)) for name in works}
    for turn in range(-1, rounds):
        for name, (work, tokens) in works.items():
            seconds = [_timed(work, model) for model in (dense, candidate)]
            if turn >= 0:
                rates[name][turn] = tokens / np.array(seconds)
        progress((turn + 2) / (rounds + 1))
    return rates


def _timed(work: Callable[[Model], object], model: Model) -> float:
    start = time.perf_counter()
    work(model)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - start


def _rows(model: Model, length: int) -> list[list[int]]:
    return [[(7 * i + t) % model.vocabulary for t in range(length)] for i in range(ROWS)]


def _read(model: Model) -> Any:
    length = min(TOKENS, model.context)
    with torch.no_grad():
        return model.module(**pad(model, _rows(model, length)), use_cache=False).logits


def _write(model: Model) -> list[list[int]]:
    return extend(model, _rows(model, PROMPT), STEPS, processors=[_Endless(model)])


class _Endless:
    """Never lets a text end, so that every model writes equally much."""

    def __init__(self, model: Model) -> None:
        self.end = model.tokenizer.eos_token_id

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        if self.end is not None:
            scores[:, self.end] = -torch.inf
        return scores
