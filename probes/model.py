"""A loaded language model: its module, tokenizer, anatomy and where it came from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import xarray as xr
from torch import Tensor, nn

from .anatomy import Anatomy
from .kernels import Readout
from .recipe import Recipe

Lens = Literal["norm", "raw"]
_CONTROL = ("forward", "__nnsight__")  # what tracing leaves on a module

BATCH_TOKENS = 2048


@dataclass(frozen=True, eq=False)
class Model:
    """A causal language model.

    `name` is what the user asked for, `weights` the SHA-256 of its weights, `recipe` what was done
    to it (None: dense), `achieved` what that came to, as plain JSON values, and `measured` what was
    measured on the way, by group of the schema.
    """

    module: Any
    tokenizer: Any
    anatomy: Anatomy
    name: str
    weights: str
    recipe: Recipe | None = None
    achieved: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, xr.Dataset] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the embedding is; inputs go there."""
        return self.module.get_submodule(self.anatomy.embed).weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.module.get_submodule(self.anatomy.unembed).weight.dtype

    @property
    def layer_count(self) -> int:
        """Number of decoder layers, dropped ones included."""
        return len(self.anatomy.blocks(self.module))

    @property
    def vocabulary(self) -> int:
        """Number of rows of the unembedding."""
        return len(self.module.get_submodule(self.anatomy.unembed).weight)

    @property
    def context(self) -> int:
        """Longest sequence that the model takes, in tokens."""
        return int(getattr(self.module.config, "max_position_embeddings", 1 << 30))

    @property
    def label(self) -> str:
        """Name and recipe, for people."""
        return f"{self.name} {self.recipe}" if self.recipe else self.name

    def readout(self, lens: Lens = "norm") -> Readout:
        """How hidden states become logits: through the final norm, or raw as [H]'s code does."""
        unembed = self.module.get_submodule(self.anatomy.unembed)
        cap = getattr(self.module.config, "final_logit_softcapping", None)
        norm = _outside_traces(self.module.get_submodule(self.anatomy.final_norm))
        weight, bias = unembed.weight.detach(), getattr(unembed, "bias", None)
        return Readout(weight, norm if lens == "norm" else None, bias, cap)

    def clone(self, **changes: Any) -> Model:
        """A model of its own that shares every weight: replace weights in it, never write to them."""
        shared = {id(p): p for p in self.module.parameters()}
        shared |= {id(b): b for b in self.module.buffers()}
        return replace(self, module=copy.deepcopy(self.module, shared), **changes)


def _outside_traces(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """The norm in float32, callable while a trace of its model is running."""
    bare = copy.copy(norm)
    bare.__dict__ = {k: v for k, v in norm.__dict__.items() if k not in _CONTROL}
    parameters = list(bare.parameters())
    wide = all(p.dtype == torch.float32 for p in parameters)
    module = bare if wide else copy.deepcopy(bare).float()
    return _Norm(module, tuple(id(p) for p in parameters))


@dataclass(frozen=True)
class _Norm:
    """A norm that equals another one that has the same weights."""

    module: nn.Module = field(compare=False)
    identity: tuple[int, ...]

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.module(hidden.float())


def encode(
    model: Model,
    texts: Sequence[str],
    *,
    max_tokens: int | None = None,
    side: Literal["left", "right"] = "right",
) -> dict[str, Tensor]:
    """Token ids with their mask and positions, padded on one side: `(text, token)` each.

    Right padding needs nothing but the causal mask; left padding, for generation, needs the
    positions too, which is why they are always given.
    """
    rows = [model.tokenizer(text)["input_ids"][:max_tokens] for text in texts]
    return pad(model, rows, side=side)


def pad(
    model: Model, rows: Sequence[Sequence[int]], *, side: Literal["left", "right"] = "right"
) -> dict[str, Tensor]:
    """Rows of token ids as one padded batch: `input_ids`, `attention_mask`, `position_ids`."""
    width = max(map(len, rows))
    starts = [0 if side == "right" else width - len(row) for row in rows]
    return placed(model, rows, starts, width)


def placed(
    model: Model, rows: Sequence[Sequence[int]], starts: Sequence[int], width: int
) -> dict[str, Tensor]:
    """As `pad`, each row from its own column on, `width` columns in all."""
    ids = torch.full((len(rows), width), model.tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        here = slice(start, start + len(row))
        ids[i, here] = torch.tensor(row, dtype=torch.long)
        mask[i, here] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def batches(lengths: Sequence[int], tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """Indices of rows, longest first, so many at a time as hold at most `tokens` with their padding."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found: list[list[int]] = []
    for i in order:
        if not found or (len(found[-1]) + 1) * lengths[found[-1][0]] > tokens:
            found.append([])
        found[-1].append(i)
    return found
