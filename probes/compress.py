"""Compression: a dense model and a recipe in, a candidate out, the dense model untouched.

The candidate shares every weight that the recipe leaves alone. Embeddings and unembedding are
never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from . import trace
from .anatomy import SUBLAYERS, Sublayer, drop, dropped, linears
from .model import Model, encode
from .recipe import Amount, Count, Integer, Layers, Ratio, Recipe, RecipeError
from .tasks import data_text

CALIBRATION_TOKENS = 128  # per text, at most
CALIBRATION_BATCH = 8
_IMPORTANCE: WeakKeyDictionary[nn.Module, dict[str, np.ndarray]] = WeakKeyDictionary()


def calibration_texts() -> list[str]:
    """The texts that ship with the package, one a line, on which importance is measured."""
    return [line for line in data_text("calibration.txt").splitlines() if line.strip()]


def compress(
    dense: Model,
    recipe: Recipe,
    *,
    calibration: Sequence[str] | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> Model:
    """Carry out a recipe.

    Args:
        dense: the model to compress; it stays as it is.
        recipe: what to do, step by step, left to right.
        calibration: texts on which importance is measured (default: those that ship with us).
        progress: called with the share of the work that is done.

    Returns:
        The candidate; `achieved` holds what came of it (layers dropped, share of zeros, bits).

    Raises:
        RecipeError: an amount that this model does not allow, or a recipe that changes no weight.
    """
    check(dense, recipe)
    candidate = dense.clone(recipe=recipe, achieved={})
    texts = list(calibration) if calibration is not None else calibration_texts()
    for i, step in enumerate(recipe.steps):
        before = {name: id(p) for name, p in candidate.module.named_parameters()}
        _APPLY[step.method](candidate, step.amount, texts)
        after = {name: id(p) for name, p in candidate.module.named_parameters()}
        if before == after:
            raise RecipeError(f"recipe '{step}' changed no weight of {dense.label}")
        progress((i + 1) / len(recipe.steps))
    candidate.achieved["recipe"] = str(recipe)
    return candidate


def check(dense: Model, recipe: Recipe) -> None:
    """Whether the model allows the recipe's amounts, before any work.

    Raises:
        RecipeError: more layers than there are, a group that does not divide a width.
    """
    for step in recipe.steps:
        match step.amount:
            case Count(n) if n >= dense.layer_count:
                raise RecipeError(
                    f"recipe '{step}': {dense.name} has {dense.layer_count} layers; "
                    f"1 to {dense.layer_count - 1} can be dropped"
                )
            case Layers(layers) if max(layers) >= dense.layer_count:
                raise RecipeError(
                    f"recipe '{step}': {dense.name} has layers 0 to {dense.layer_count - 1}"
                )
            case Integer(_, group) if group:
                _check_group(dense, str(step), group)
            case _:
                pass


def _check_group(dense: Model, step: str, group: int) -> None:
    for name, module in linears(dense.anatomy, dense.module).items():
        width = _matrix(module).shape[1]
        if width % group:
            raise RecipeError(
                f"recipe '{step}': {name} reads {width} inputs, which {group} does not divide; "
                "choose another group, or none (one scale per row)"
            )


# --- dropping ----------------------------------------------------------------------------------


def importance(model: Model, texts: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """1 - cosine of what goes into and what comes out of each sublayer, averaged over tokens.

    Returns `attn`, `mlp` and `block`, each `(layer,)` in float64, over the calibration texts. The
    smaller, the less the sublayer does. (As LLM-Drop and ShortGPT rank.)
    """
    if texts is None and model.module in _IMPORTANCE:
        return _IMPORTANCE[model.module]
    chosen = list(texts) if texts is not None else calibration_texts()
    sums = {name: np.zeros(model.layer_count) for name in ("attn", "mlp", "block")}
    count = 0
    for start in range(0, len(chosen), CALIBRATION_BATCH):
        texts_here = chosen[start : start + CALIBRATION_BATCH]
        batch = encode(model, texts_here, max_tokens=CALIBRATION_TOKENS)
        mask = batch["attention_mask"].bool()
        found = trace.sublayer_cosines(model.module, model.anatomy, batch, mask)
        for name, values in found.items():
            sums[name] += np.array(values)
        count += int(mask.sum())
    result = {name: 1 - total / count for name, total in sums.items()}
    if texts is None:
        _IMPORTANCE[model.module] = result
    return result


def _dropper(what: str) -> Callable[[Model, Amount, list[str]], None]:
    sublayers: tuple[Sublayer, ...] = SUBLAYERS if what == "block" else (what,)  # type: ignore[assignment]

    def apply(candidate: Model, amount: Amount, texts: list[str]) -> None:
        blocks = candidate.anatomy.blocks(candidate.module)
        gone = [
            i
            for i, b in enumerate(blocks)
            if all(dropped(candidate.anatomy, b, s) for s in sublayers)
        ]
        layers = _chosen(candidate, what, amount, texts, gone)
        for layer in layers:
            for sublayer in sublayers:
                if not dropped(candidate.anatomy, blocks[layer], sublayer):
                    drop(candidate.anatomy, blocks[layer], sublayer, layer)
                    candidate.achieved.setdefault("dropped", {}).setdefault(sublayer, []).append(
                        layer
                    )

    return apply


def _chosen(
    candidate: Model, what: str, amount: Amount, texts: list[str], gone: list[int]
) -> list[int]:
    if isinstance(amount, Layers):
        return [layer for layer in amount.layers if layer not in gone]
    assert isinstance(amount, Count)
    order = np.argsort(importance(candidate, texts)[what], kind="stable")
    left = [int(layer) for layer in order if layer not in gone]
    if amount.n >= len(left):
        raise RecipeError(f"{what}-drop@{amount}: only {len(left)} are left to drop")
    return left[: amount.n]


# --- zeroing and rounding ------------------------------------------------------------------------


def _matrix(module: nn.Module) -> Tensor:
    """The weight as `(output, input)`, whichever way the module keeps it."""
    weight = module.get_parameter("weight").detach()
    return weight if isinstance(module, nn.Linear) else weight.T


def _replace(module: nn.Module, matrix: Tensor) -> None:
    """Give a module a new weight; nothing changes where the values are the same."""
    old = module.get_parameter("weight")
    new = matrix if isinstance(module, nn.Linear) else matrix.T
    if not torch.equal(new, old):
        module.register_parameter("weight", nn.Parameter(new.contiguous(), requires_grad=False))


def _magnitude(candidate: Model, amount: Amount, _: list[str]) -> None:
    assert isinstance(amount, Ratio)
    for module in linears(candidate.anatomy, candidate.module).values():
        matrix = _matrix(module)
        count = int(matrix.numel() * amount.share)
        smallest = matrix.abs().flatten().float().topk(count, largest=False, sorted=False).indices
        pruned = matrix.clone(memory_format=torch.contiguous_format)
        pruned.view(-1)[smallest] = 0
        _replace(module, pruned)
    candidate.achieved["sparsity"] = sparsity(candidate)


def sparsity(model: Model) -> float:
    """Share of zeros among the weight matrices of the decoder layers."""
    matrices = [_matrix(m) for m in linears(model.anatomy, model.module).values()]
    zeros = sum(int((m == 0).sum()) for m in matrices)
    return zeros / max(1, sum(m.numel() for m in matrices))


def round_to_nearest(matrix: Tensor, bits: int, group: int = 0) -> Tensor:
    """Quantize-dequantize `(output, input)` weights to `bits`-bit integers, group by group.

    Each group of `group` inputs (0: the whole row) of each output has its own scale and zero point,
    from its smallest to its largest weight (0 included, so that zeros stay zeros).
    """
    wide = matrix.float().unflatten(1, (-1, group or matrix.shape[1]))
    low = wide.amin(-1, keepdim=True).clamp(max=0)
    high = wide.amax(-1, keepdim=True).clamp(min=0)
    levels = 2**bits - 1
    scale = ((high - low) / levels).clamp(min=1e-12)
    zero = (-low / scale).round()
    codes = ((wide / scale).round() + zero).clamp(0, levels)
    return ((codes - zero) * scale).flatten(1).to(matrix.dtype)


def _rtn(candidate: Model, amount: Amount, _: list[str]) -> None:
    assert isinstance(amount, Integer)
    for module in linears(candidate.anatomy, candidate.module).values():
        _replace(module, round_to_nearest(_matrix(module), amount.bits, amount.group))
    overhead = 32 / amount.group if amount.group else 0.0  # a 16-bit scale and zero point per group
    candidate.achieved["bits"] = amount.bits
    candidate.achieved["bits_stored"] = amount.bits + overhead


_APPLY: dict[str, Callable[[Model, Amount, list[str]], None]] = {
    "attn-drop": _dropper("attn"),
    "mlp-drop": _dropper("mlp"),
    "block-drop": _dropper("block"),
    "magnitude": _magnitude,
    "rtn": _rtn,
}


# --- what it costs -------------------------------------------------------------------------------


def cost(model: Model) -> dict[str, float]:
    """Parameters, non-zero parameters, bytes in memory and bytes that a packed format would take."""
    matrices = {
        id(m.get_parameter("weight")) for m in linears(model.anatomy, model.module).values()
    }
    bits: Any = model.achieved.get("bits_stored")
    total = nonzero = held = packed = 0.0
    for p in {id(p): p for p in model.module.parameters()}.values():
        total += p.numel()
        nonzero += int(torch.count_nonzero(p))
        held += p.numel() * p.element_size()
        packed += p.numel() * (bits / 8 if bits and id(p) in matrices else p.element_size())
    return {"parameters": total, "nonzero": nonzero, "bytes": held, "bytes_packed": packed}
