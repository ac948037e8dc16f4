"""Measuring: how the shift between two models looks at every layer, site and space.

One trace runs both models in lockstep; at each site the hidden states are reduced to figures at
once, so the largest thing held is one block of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ..analysis import formulas, schema
from . import trace
from .kernels import Figures, Readout, compare_many, workspace
from .model import Lens, Model, encode
from .reduction import worth_fusing

SPACED = ("cosine", "angular", "parallel", "orthogonal")
PLAIN = (
    "kl", "kl_reverse", "js", "tv", "var_p", "var_r", "var_uniform", "third_cumulant", "validity",
    "flip", "margin", "overlap", "entropy", "entropy_candidate",
)  # fmt: skip
MAX_TOKENS = 128
BATCH_TOKENS = 1024


class MeasureError(ValueError):
    """Two models or prompts that cannot be measured against each other."""


def measure(
    dense: Model,
    candidate: Model,
    *,
    prompts: Sequence[str],
    lens: Lens = "norm",
    temperature: float = 1.0,
    layerwise: bool = True,
    max_tokens: int = MAX_TOKENS,
    compiled: bool | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> xr.DataTree:
    """Measure the shift from `dense` to `candidate` over all positions of the prompts.

    Args:
        dense: the reference model.
        candidate: the compressed model; the same architecture and tokenizer.
        prompts: texts; each is cut to `max_tokens` tokens.
        lens: readout at inner layers: through the final `norm`, or `raw` as the paper's code does.
        temperature: softmax temperature T > 0.
        layerwise: measure every layer and site, not only the output.
        max_tokens: longest prompt, in tokens.
        compiled: fuse the kernels with `torch.compile`: three times faster, the same figures, half a
            minute to compile once per process. None: where it works and there is enough to measure.
        progress: called with the share of the work that is done.

    Returns:
        A tree with `/output` (after the model's own readout) and, layerwise, `/shifts`. Positions
        that a shorter prompt does not have are NaN.

    Raises:
        MeasureError: vocabularies, tokenizers or depths that differ, no prompts, empty prompts.
    """
    check_pair(dense, candidate, layerwise)
    check_prompts(dense, prompts)
    if candidate.module is dense.module:
        candidate = dense.clone()
    rows = [dense.tokenizer(p)["input_ids"][:max_tokens] for p in prompts]
    width = max(map(len, rows))
    if compiled is None:
        compiled = _worth_fusing(dense, sum(map(len, rows)), layerwise)
    store = _Store(len(prompts), width, dense.layer_count if layerwise else 0)
    settings: dict[str, Any] = {"temperature": temperature, "compiled": compiled}
    size = max(1, BATCH_TOKENS // width)
    for start in range(0, len(prompts), size):
        texts = prompts[start : start + size]
        batch = encode(dense, texts, max_tokens=max_tokens)
        part = _Part(store, start, batch["attention_mask"].bool())
        share = len(texts) / len(prompts)
        done = start / len(prompts)

        def tick(inner: float, done: float = done, share: float = share) -> None:
            progress(done + share * inner)

        if layerwise:
            _layers(dense, candidate, batch, part, lens, settings, tick)
        else:
            _outputs(dense, candidate, batch, part, settings)
        progress(done + share)
    return store.tree(_attributes(dense, candidate, lens, temperature, prompts))


def _worth_fusing(dense: Model, positions: int, layerwise: bool) -> bool:
    pairs = positions * (4 * dense.layer_count + 1 if layerwise else 1) * dense.vocabulary
    return worth_fusing(pairs)


def check_pair(dense: Model, candidate: Model, layerwise: bool = True) -> None:
    """Whether two models can be compared at all.

    Raises:
        MeasureError: different vocabularies, tokenizers, or (layerwise) architectures or depths.
    """
    if dense.vocabulary != candidate.vocabulary:
        raise MeasureError(
            f"{dense.label} has {dense.vocabulary} tokens, {candidate.label} {candidate.vocabulary}: "
            "logits of different vocabularies are not comparable"
        )
    if not _same_tokens(dense, candidate):
        raise MeasureError(
            f"{dense.label} and {candidate.label} have different tokenizers: their token ids mean "
            "different texts. Compare a model with a compressed form of itself"
        )
    if layerwise and (dense.anatomy, dense.layer_count) != (
        candidate.anatomy,
        candidate.layer_count,
    ):
        raise MeasureError(
            f"{dense.label} has {dense.layer_count} layers, {candidate.label} {candidate.layer_count} "
            "(or another architecture), so layers have no counterparts; measure the output only "
            "(layerwise=False), or save the candidate with `prunescope compress`, which records "
            "which layers were kept"
        )
    if layerwise and _attention_settings(dense) != _attention_settings(candidate):
        raise MeasureError(
            f"{dense.label} and {candidate.label} have different positions or attention windows "
            f"({_attention_settings(dense)} and {_attention_settings(candidate)}), so their layers "
            "cannot be run on each other's states; measure the output only (layerwise=False)"
        )


def _same_tokens(dense: Model, candidate: Model) -> bool:
    """Whether an id means the same token in both, wherever both know it."""
    known = {i: t for t, i in dense.tokenizer.get_vocab().items()}
    return all(known.get(i, t) == t for t, i in candidate.tokenizer.get_vocab().items())


def _attention_settings(model: Model) -> dict[str, Any]:
    """What attention gets from outside its layer; in lockstep the dense model provides it."""
    config = model.module.config.to_dict()
    names = ("rope_parameters", "sliding_window", "layer_types", "no_rope_layers")
    return {name: config.get(name) for name in names}


def check_prompts(dense: Model, prompts: Sequence[str]) -> None:
    """Raises MeasureError for no prompts, or one without a token."""
    if not prompts:
        raise MeasureError("no prompts: at least one text is needed")
    for i, prompt in enumerate(prompts):
        if not dense.tokenizer(prompt)["input_ids"]:
            raise MeasureError(f"prompt {i + 1} of {len(prompts)} has no token")


def _outputs(
    dense: Model, candidate: Model, batch: dict[str, Tensor], part: _Part, settings: dict[str, Any]
) -> None:
    """Output only: the two bare forward passes without their unembedding, then one reduction."""
    states = [trace.final_states(m.module, m.anatomy, batch)[part.mask] for m in (dense, candidate)]
    _keep_output(part, states[0], states[1], dense.readout(), candidate.readout(), settings)


def _keep_output(
    part: _Part, h: Tensor, other: Tensor, readout: Readout, own: Readout, settings: dict[str, Any]
) -> None:
    figures = compare_many(h, [other], readout, own, **settings)[0]
    part.keep_output(figures, angles(h, other))


def _layers(
    dense: Model,
    candidate: Model,
    batch: dict[str, Tensor],
    part: _Part,
    lens: Lens,
    settings: dict[str, Any],
    tick: Callable[[float], None],
) -> None:
    readout, own = dense.readout(lens), candidate.readout(lens)
    sites = 2 * dense.layer_count
    space = workspace(readout, int(part.mask.sum()), part.mask.device, 2)

    def visit(site: trace.Site) -> None:
        h, local, propagated = (x[part.mask] for x in (site.dense, site.local, site.propagated))
        found = compare_many(h, [local, propagated], readout, own, space=space, **settings)
        for effect, (figures, states) in enumerate(zip(found, (local, propagated), strict=True)):
            part.keep(site, effect, figures, angles(h, states))
        tick((2 * site.layer + (site.sublayer == "mlp") + 1) / (sites + 1))

    ends = trace.lockstep(dense.module, candidate.module, dense.anatomy, batch, visit)
    h, other = (end[part.mask] for end in ends)
    _keep_output(part, h, other, dense.readout(), candidate.readout(), settings)


def angles(x: Tensor, y: Tensor) -> Figures:
    """cosine, angular, parallel, orthogonal of `(position, d_model)` states, float64 `(position,)`."""
    x, d = x.double(), (y.double() - x.double())
    norm2 = (x * x).sum(-1)
    alpha = (d * x).sum(-1) / norm2
    orthogonal = ((d - alpha[:, None] * x) ** 2).sum(-1).sqrt() / norm2.sqrt()
    angular = formulas.angular_exact(1 + alpha, orthogonal)
    return {
        "cosine": 1 - angular,
        "angular": angular,
        "parallel": alpha.abs(),
        "orthogonal": orthogonal,
    }


class _Store:
    """Arrays of figures, NaN where a prompt has no token."""

    def __init__(self, prompts: int, tokens: int, layers: int) -> None:
        self.layers = layers
        self.output = _arrays((prompts, tokens))
        self.shifts = _arrays((prompts, tokens, layers, 2, 2)) if layers else {}
        self.shape = (prompts, tokens)

    def tree(self, attrs: dict[str, Any]) -> xr.DataTree:
        prompts, tokens = self.shape
        coords: dict[str, Any] = {
            "prompt": np.arange(prompts), "token": np.arange(tokens), "space": list(schema.SPACES),
        }  # fmt: skip
        groups = {"output": schema.dataset("output", self.output, coords, attrs)}
        if self.layers:
            inner = {"layer": np.arange(self.layers), "site": list(schema.SITES)}
            inner |= {"effect": list(schema.EFFECTS)}
            groups["shifts"] = schema.dataset("shifts", self.shifts, coords | inner, attrs)
        return schema.tree(groups, {})


def _arrays(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    spaced = {name: np.full((*shape, 3), np.nan, np.float32) for name in SPACED}
    return spaced | {name: np.full(shape, np.nan, np.float32) for name in PLAIN}


class _Part:
    """One batch's share of the store."""

    def __init__(self, store: _Store, start: int, mask: Tensor) -> None:
        self.store, self.mask = store, mask
        prompt, token = torch.nonzero(mask, as_tuple=True)
        self.prompt, self.token = (prompt.cpu().numpy() + start), token.cpu().numpy()

    def keep(self, site: trace.Site, effect: int, figures: Figures, h: Figures) -> None:
        where = (self.prompt, self.token, site.layer, schema.SITES.index(site.sublayer), effect)
        _put(self.store.shifts, where, figures, h)

    def keep_output(self, figures: Figures, h: Figures) -> None:
        _put(self.store.output, (self.prompt, self.token), figures, h)


def _put(
    arrays: dict[str, np.ndarray], where: tuple[Any, ...], figures: Figures, h: Figures
) -> None:
    for name in PLAIN:
        arrays[name][where] = figures[name].cpu().numpy()
    for name in SPACED:
        values = (h[name], figures[f"{name}_z"], figures[f"{name}_p"])
        arrays[name][where] = torch.stack([v.cpu() for v in values], dim=-1).numpy()


def _attributes(
    dense: Model, candidate: Model, lens: Lens, temperature: float, prompts: Sequence[str]
) -> dict[str, Any]:
    return {
        "direction": "dense first: KL(p_dense || p_candidate)",
        "lens": lens,
        "temperature": temperature,
        "phase": "prompt",
        "dense": dense.label,
        "candidate": candidate.label,
        "prompts": len(prompts),
    }
