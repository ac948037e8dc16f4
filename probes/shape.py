"""The shape of a change of logits: how heavy its tails, in which direction, in how many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ..analysis import schema
from . import trace
from .kernels import Readout
from .model import Model, encode

BLOCK = 128  # positions whose logits are held at once
SPECTRUM = 512  # positions that span the spectrum, evenly spaced
TOKENS = 128


def shape(
    dense: Model, candidate: Model, *, prompts: Sequence[str], max_tokens: int = TOKENS
) -> xr.Dataset:
    """The group `/shape`: dz = z' - z of every position as a vector over the vocabulary.

    Args:
        dense: the reference model.
        candidate: the compressed model, with the same vocabulary.
        prompts: texts; each is cut to `max_tokens` tokens.
        max_tokens: longest prompt, in tokens.

    Returns:
        `kurtosis`, `common`, `along` for every position (NaN where a prompt has no token), and the
        `spectrum` over at most `SPECTRUM` positions, largest share first.
    """
    readouts = dense.readout(), candidate.readout()
    rows: list[Tensor] = []
    masks: list[Tensor] = []
    for prompt in prompts:
        batch = encode(dense, [prompt], max_tokens=max_tokens)
        masks.append(batch["attention_mask"][0].bool())
        states = [
            r.states(trace.final_states(m.module, m.anatomy, batch)[0])
            for m, r in zip((dense, candidate), readouts, strict=True)
        ]
        rows.append(torch.stack(states))
    width = max(len(m) for m in masks)
    h = torch.cat(rows, dim=1)
    figures = [_figures(*_logits(readouts, h[:, at : at + BLOCK])) for at in _starts(h)]
    variables = {
        name: _placed(torch.cat([f[name] for f in figures]), masks, width) for name in figures[0]
    }
    variables["spectrum"] = spectrum(readouts, h).numpy()
    coords = {"prompt": np.arange(len(prompts)), "token": np.arange(width)}
    return schema.dataset("shape", variables, coords)


def _starts(h: Tensor) -> range:
    return range(0, h.shape[1], BLOCK)


def _logits(readouts: tuple[Readout, Readout], h: Tensor) -> tuple[Tensor, Tensor]:
    """z and dz `(position, vocab)` of states `(2, position, d_model)` after their norms."""
    z, y = (
        r.logits(x, torch.empty(len(x), len(r.weight), device=x.device))
        for r, x in zip(readouts, h, strict=True)
    )
    return z, y.sub_(z)


def _figures(z: Tensor, change: Tensor) -> dict[str, Tensor]:
    """Of `(position, vocab)` logits and their change: float64 `(position,)` each."""
    mean = change.mean(-1, keepdim=True, dtype=torch.float64)
    rest = change.sub_(mean.float())
    square = rest * rest
    second = square.mean(-1, dtype=torch.float64)
    fourth = square.square_().mean(-1, dtype=torch.float64)
    own = z - z.mean(-1, keepdim=True)
    along = (own * rest).mean(-1, dtype=torch.float64) / (
        (own * own).mean(-1, dtype=torch.float64).sqrt() * second.sqrt()
    )
    return {
        "kurtosis": fourth / second**2 - 3,
        "common": mean[:, 0] ** 2 / (mean[:, 0] ** 2 + second),
        "along": along,
    }


def spectrum(readouts: tuple[Readout, Readout], h: Tensor) -> Tensor:
    """Shares of |dz|^2, common shift left out, of its principal directions, largest first.

    From the products of positions with each other, summed over blocks of the vocabulary.
    """
    picked = torch.linspace(0, h.shape[1] - 1, min(SPECTRUM, h.shape[1]), device=h.device).long()
    h = h[:, picked]
    total = torch.zeros(h.shape[1], h.shape[1], dtype=torch.float64, device=h.device)
    means = torch.cat([_logits(readouts, h[:, at : at + BLOCK])[1].mean(-1) for at in _starts(h)])
    for start in range(0, len(readouts[0].weight), 4096):
        z, y = (_slice(r, x, start) for r, x in zip(readouts, h, strict=True))
        change = (y - z - means[:, None]).double()
        total += change @ change.T
    values = torch.linalg.eigvalsh(total).flip(0).clamp(min=0).cpu()
    whole = values.sum()
    return values / whole if whole > 0 else torch.full_like(values, float("nan"))


def _slice(readout: Readout, h: Tensor, start: int) -> Tensor:
    """Logits of 4,096 tokens of the vocabulary."""
    part = slice(start, start + 4096)
    bias = None if readout.bias is None else readout.bias[part]
    narrow = Readout(readout.weight[part], None, bias, readout.softcap)
    return narrow.logits(h, torch.empty(len(h), len(narrow.weight), device=h.device))


def _placed(values: Tensor, masks: Sequence[Tensor], width: int) -> np.ndarray:
    """`(position,)` values at `(prompt, token)`, NaN elsewhere."""
    result = np.full((len(masks), width), np.nan, np.float32)
    lengths = [len(m) for m in masks]
    parts = values.cpu().numpy()
    for i, part in enumerate(np.split(parts, np.cumsum(lengths)[:-1])):
        result[i, : len(part)] = part
    return result
