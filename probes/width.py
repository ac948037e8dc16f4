"""Cutting neurons out of an MLP: smaller matrices, biases included, and nothing left behind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import backends
from .anatomy import Anatomy, dropped
from .recipe import RecipeError


def width(anatomy: Anatomy, block: nn.Module) -> int:
    """Neurons of a decoder layer's MLP; 0 where it was dropped."""
    if dropped(anatomy, block, "mlp"):
        return 0
    return _inputs(block.get_submodule(anatomy.neurons.out))


def widths(anatomy: Anatomy, module: nn.Module) -> list[int]:
    """Of every decoder layer, in order."""
    return [width(anatomy, block) for block in anatomy.blocks(module)]


def _inputs(module: nn.Module) -> int:
    """What a matrix reads, however a library packs it."""
    return int(getattr(module, "in_features", 0) or getattr(module, "nx", 0))


def cut(anatomy: Anatomy, block: nn.Module, kept: Tensor) -> None:
    """Leave only the neurons `kept` `(neuron,)`, ascending, in a decoder layer, in place.

    Raises:
        RecipeError: a library has packed the weights.
    """
    roles, before = anatomy.neurons, width(anatomy, block)
    if any(backends.packed(block.get_submodule(path)) for path in (*roles.into, roles.out)):
        raise RecipeError("neurons can be cut only before a library packs the weights")
    rows = torch.cat([kept + run * before for run in range(roles.fused)])
    for path in roles.into:
        block.set_submodule(path, _part(block.get_submodule(path), rows, outputs=True))
    block.set_submodule(roles.out, _part(block.get_submodule(roles.out), kept, outputs=False))


def _part(module: nn.Module, chosen: Tensor, *, outputs: bool) -> nn.Module:
    """The module with some of its outputs (or inputs); what stays whole is shared."""
    linear = isinstance(module, nn.Linear)
    weight, bias = module.get_parameter("weight").detach(), getattr(module, "bias", None)
    along = 0 if outputs == linear else 1
    taken = weight.index_select(along, chosen.to(weight.device))
    if outputs and bias is not None:
        bias = bias.detach().index_select(0, chosen.to(bias.device))
    made = _empty(linear, taken, bias is not None)
    made.register_parameter("weight", nn.Parameter(taken, requires_grad=False))
    if bias is not None:
        made.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
    return made.eval()


def _empty(linear: bool, weight: Tensor, bias: bool) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    rows, columns = weight.shape
    with torch.device("meta"):
        return nn.Linear(columns, rows, bias=bias) if linear else Conv1D(columns, rows)


def narrow(anatomy: Anatomy, module: nn.Module, to: Sequence[int]) -> None:
    """Make room for weights of these widths, one for each layer, in place."""
    for block, size in zip(anatomy.blocks(module), to, strict=True):
        if 0 < size < width(anatomy, block):
            cut(anatomy, block, torch.arange(size))
