"""How fast two models run, measured alternately (on a shared machine nothing else compares), and what they hold."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import backends
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
        texts written with a cache, 12 tokens each), `(round, model)`, dense first; `peak_bytes` of
        either model while it reads these texts, `(model,)`.
    """
    works = {"prefill_rate": (_read, ROWS * TOKENS), "decode_rate": (_write, ROWS * STEPS)}
    rates = {name: np.empty((rounds, 2)) for name in works}
    held = np.array([peak_bytes(model) for model in (dense, candidate)])
    for turn in range(-1, rounds):
        for name, (work, tokens) in works.items():
            seconds = [_timed(work, model) for model in (dense, candidate)]
            if turn >= 0:
                rates[name][turn] = tokens / np.array(seconds)
        progress((turn + 2) / (rounds + 1))
    return rates | {"peak_bytes": held}


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


# --- what a model holds --------------------------------------------------------------------------


def peak_bytes(model: Model) -> float:
    """Bytes of the weights and of all tensors that live at once while 4 texts of 128 tokens are read.

    The allocator's own rounding and the scratch space inside an operation are not in it.
    """
    with _Living() as living:
        _read(model)
    return backends.held(model.module) + living.peak


class _Living(TorchDispatchMode):
    """Counts the bytes of storages made while it is on, as long as something holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet[Any]()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if _real(t)}
        out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if _real(t)):
            if storage.data_ptr() not in given and storage not in self.known:
                self.known.add(storage)
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        return out

    def _change(self, count: int) -> None:
        self.now += count
        self.peak = max(self.peak, self.now)


def _real(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type != "meta"
