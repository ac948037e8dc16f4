"""Perplexity and KL over running text, token by token, both models on the same windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from ..analysis import schema
from .items import Task, TaskError
from .kernels import compare_at, log_p
from .layerwise import sequences
from .model import Model

WINDOW = 512
WINDOWS = 32  # of a text, from its beginning
BLOCK = 512


def perplexity(
    dense: Model,
    candidate: Model,
    *,
    tasks: Sequence[Task],
    window: int = WINDOW,
    windows: int | None = WINDOWS,
    progress: Callable[[float], None] = lambda _: None,
) -> xr.DataTree:
    """Both models over texts, every token but the first of each window scored.

    Args:
        dense: the reference model.
        candidate: the compressed model, with the same tokens.
        tasks: of which those of whole texts are read, each one text after the other.
        window: tokens that are read together.
        windows: at most so many of each task (None: all).
        progress: called with the share of the work that is done.

    Returns:
        A tree with `/perplexity`: KL(p || p'), log p and log p' of the token that stands there, and
        whether the likeliest token differs, one row a token.

    Raises:
        TaskError: no task of whole texts, or one too short to hold two tokens.
    """
    texts = [t for t in tasks if t.format == "text"]
    if not texts:
        raise TaskError("none of the tasks is a text; wikitext2 is, and a file of rows with 'text'")
    parts = [_windows(dense, t, window, windows) for t in texts]
    total, done, columns = sum(map(len, parts)), 0, dict[str, list[np.ndarray]]()
    for tokens in parts:
        for row in tokens:
            for name, values in _figures(dense, candidate, row).items():
                columns.setdefault(name, []).append(values)
            done += 1
            progress(done / total)
    length = [len(row) - 1 for tokens in parts for row in tokens]
    names = [t.name for t, tokens in zip(texts, parts, strict=True) for _ in tokens]
    variables = {name: np.concatenate(values) for name, values in columns.items()}
    coords: dict[str, Any] = {
        "token": np.arange(sum(length)), "model": list(schema.MODELS),
        "window": ("token", np.repeat(np.arange(total), length)),
        "task": ("token", np.repeat(names, length)),
    }  # fmt: skip
    data = schema.dataset("perplexity", variables, coords, {"window_tokens": window})
    return schema.tree({"perplexity": data}, {})


def _windows(model: Model, task: Task, window: int, count: int | None) -> torch.Tensor:
    tokens = sequences(model, [item.prompt for item in task.items], window)[:count]
    if tokens.shape[1] < 2:
        raise TaskError(f"{task.name}: less than two tokens of text; nothing is predicted")
    return tokens


@torch.no_grad()
def _figures(dense: Model, candidate: Model, row: torch.Tensor) -> dict[str, np.ndarray]:
    """Of one window `(token,)`, for each token after the first."""
    states = [
        m.module.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0, :-1]
        for m in (dense, candidate)
    ]
    readouts, targets = [m.readout("raw") for m in (dense, candidate)], row[1:]
    found = compare_at(
        states[0], states[1:], *readouts, temperatures=(1.0,), targets=targets, block=BLOCK
    )[0][0]
    own: list[torch.Tensor] = []
    for part, ids in zip(states[0].split(BLOCK), targets.split(BLOCK), strict=True):
        space = part.new_empty((len(part), dense.vocabulary), dtype=torch.float32)
        own.append(log_p(readouts[0].logits(readouts[0].states(part), space), ids))
    both = torch.stack([torch.cat(own).float(), found["log_p"].float()], dim=-1)
    return {
        "kl": found["kl"].cpu().numpy(), "flip": found["flip"].cpu().numpy(),
        "log_p": both.cpu().numpy(),
    }  # fmt: skip
