"""Ranking sublayers for removal: how little does the model miss each of them?

`cosine`: 1 - cosine of what goes into and what comes out of a sublayer (LLM-Drop, ShortGPT).
`angular`: angle between the inputs of two layers n apart, at the last token (Gromov et al.,
arXiv 2403.17887), for a run of n whole layers. `kl` and `var-r`: the damage at the output that
dropping this sublayer alone does, measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import trace
from .anatomy import contribution
from .kernels import compare_many
from .layerwise import layer_calls, sequences
from .model import Model, encode
from .reduction import worth_fusing
from .remembered import remembered
from .twins import data_text

TOKENS = 128  # per text, at most
BATCH = 8
KINDS = ("attn", "mlp", "block")
DAMAGE = {"kl": "kl", "var-r": "var_r"}


def calibration_texts() -> list[str]:
    """The texts that ship with the package, one a line, for ranking and calibration."""
    return [line for line in data_text("calibration.txt").splitlines() if line.strip()]


def importance(
    model: Model, texts: Sequence[str] | None = None, by: str = "cosine"
) -> dict[str, np.ndarray]:
    """How much the model misses each sublayer: `attn`, `mlp` and `block`, each `(layer,)`.

    Args:
        model: its dropped sublayers are still listed, with what is measured of them (nothing).
        texts: calibration texts (default: those that ship with us).
        by: `cosine`, `kl` (nat) or `var-r` (nat²).
    """
    chosen = list(texts) if texts is not None else calibration_texts()
    if by in DAMAGE:
        return _remembered_damage(model, chosen)[by]
    sums = {name: np.zeros(model.layer_count) for name in KINDS}
    count = 0
    for start in range(0, len(chosen), BATCH):
        batch = encode(model, chosen[start : start + BATCH], max_tokens=TOKENS)
        mask = batch["attention_mask"].bool()
        found = trace.sublayer_cosines(model.module, model.anatomy, batch, mask)
        for name, values in found.items():
            sums[name] += np.array(values)
        count += int(mask.sum())
    return {name: 1 - total / count for name, total in sums.items()}


def _remembered_damage(model: Model, texts: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """`damage`, kept: a study ranks by the same sweep in many cells, and it is the slowest part of them."""

    def sweep() -> dict[str, Tensor]:
        return {
            f"{by} {kind}": torch.from_numpy(values)
            for by, kinds in damage(model, texts).items()
            for kind, values in kinds.items()
        }

    found = remembered(model, "damage", [TOKENS, *texts], sweep)
    return {by: {kind: found[f"{by} {kind}"].numpy() for kind in KINDS} for by in DAMAGE}


@torch.no_grad()
def damage(model: Model, texts: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """Mean of every figure of `DAMAGE` at the output when one sublayer (or layer) alone is dropped.

    One sweep over the layers for all of them: at each layer the states without it join the batch of
    those that miss an earlier one, so that the dense prefix is computed once.
    """
    tokens = sequences(model, texts, TOKENS)
    calls = layer_calls(model, tokens[:1])
    readout = model.readout()
    total = np.zeros((len(DAMAGE), model.layer_count, len(KINDS)))
    compiled = worth_fusing(tokens.numel() * model.layer_count * len(KINDS) * model.vocabulary)
    for row in tokens.split(1):
        batch = {"input_ids": row, "attention_mask": torch.ones_like(row)}
        seen: dict[str, Tensor] = {}
        trace.roles(model.module, model.anatomy, batch, seen.__setitem__)
        states: list[Tensor] = []
        for layer, call in enumerate(calls):
            after = list(call(torch.cat(states)).split(1)) if states else []
            states = after + _without(model, layer, seen)
        found = compare_many(
            seen["final_norm.input"][0], [s[0] for s in states], readout, readout, compiled=compiled
        )
        means = [[float(f[figure].mean()) for f in found] for figure in DAMAGE.values()]
        total += np.array(means).reshape(total.shape)
    return {
        by: dict(zip(KINDS, part.T, strict=True))
        for by, part in zip(DAMAGE, total / len(tokens), strict=True)
    }


def _without(model: Model, layer: int, seen: dict[str, Tensor]) -> list[Tensor]:
    """The state after a layer without its attention, without its MLP, without either."""
    block, x = model.anatomy.blocks(model.module)[layer], seen[f"layer.{layer}.input"]
    mlp = contribution(model.anatomy, block, "mlp", x)
    return [x + mlp, x + seen[f"layer.{layer}.attn"], x]


@torch.no_grad()
def angular(model: Model, texts: list[str], count: int) -> np.ndarray:
    """Angle over pi between the inputs of layers l and l + count, `(layer - count + 1,)`.

    At the last token of each text; the run of layers after the smallest one is missed least.
    """
    total = np.zeros(model.layer_count - count + 1)
    for text in texts:
        batch = encode(model, [text], max_tokens=TOKENS)
        ends: list[Tensor] = []

        def keep(name: str, state: Tensor, ends: list[Tensor] = ends) -> None:
            if name.endswith(".input"):
                ends.append(state[0, -1].double())

        trace.roles(model.module, model.anatomy, batch, keep)
        last = torch.stack(ends)
        cosine = torch.cosine_similarity(last[:-count], last[count:], dim=-1)
        total += (cosine.clamp(-1, 1).arccos() / torch.pi).cpu().numpy()
    return total / len(texts)


def order(
    model: Model, kinds: Sequence[str], texts: Sequence[str] | None, by: str
) -> list[tuple[str, int]]:
    """(kind, layer) of all sublayers of these kinds, the least missed first."""
    found = importance(model, texts, by)
    values = np.concatenate([found[kind] for kind in kinds])
    places = [(kind, layer) for kind in kinds for layer in range(model.layer_count)]
    return [places[i] for i in np.argsort(values, kind="stable")]
