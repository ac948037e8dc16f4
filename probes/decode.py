"""Decoding: four histories that tell one step's error from what the cache and the text add to it.

The dense model's own text fixes what is compared. Both models write by batched generation; all
figures then come from single passes over whole texts, in which every position is a step (what a
model writes itself is read while it writes):

* `step`: the candidate reads the dense text, and in every attention the dense model's keys and
  values of all earlier tokens; only the newest token's are its own.
* `forced`: the candidate reads the dense text and its own keys and values.
* `free`: the candidate reads its own text.
* `swapped`: the dense model reads the candidate's text: no compressed weight at all.

A sublayer that was dropped reads nothing, so that nothing stands in for its keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import create_masks_for_generate

from ..analysis import schema
from . import trace
from .anatomy import dropped
from .items import SEED
from .kernels import Figures, Readout, compare_at
from .measure import MeasureError, angles, check_pair, check_prompts
from .model import Model, batches
from .reduction import worth_fusing
from .writing import Draw, Rows, Written, at_steps, layout, read_batch, write_batch

STEPS = 64
TEMPERATURES = (0.3, 0.7, 1.0, 1.5)


class DecodeError(ValueError):
    """Models, prompts or settings that cannot be decoded; says what came and what is allowed."""


def decode(
    dense: Model,
    candidate: Model,
    *,
    prompts: Sequence[str],
    steps: int = STEPS,
    temperature: float = 1.0,
    temperatures: Sequence[float] = TEMPERATURES,
    sampled: bool = False,
    seed: int = SEED,
    written: Rows | None = None,
    compiled: bool | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> xr.DataTree:
    """Both models write after every prompt; every step is measured with four histories.

    Args:
        dense: the reference model; its text fixes the trajectory.
        candidate: the compressed model, with the same tokenizer.
        prompts: texts to go on from.
        steps: most tokens that each model writes.
        temperature: softmax temperature T > 0 of the figures, and of drawing where `sampled`.
        temperatures: further temperatures for the group `/temperatures`.
        sampled: draw tokens at `temperature` instead of taking the most likely one; both models
            get the same Gumbel noise, so that they part only where their distributions do.
        seed: of that noise.
        written: what `write` gave for the dense model with the same settings, to spare it here.
        compiled: fuse the kernels with `torch.compile`. None: as in `measure`.
        progress: called with the share of the work that is done.

    Returns:
        A tree with `/steps` and `/temperatures`; steps after the end of a text are NaN (-1 for
        tokens), and so is `step` where the two models' layers have no counterparts.

    Raises:
        DecodeError, MeasureError: see `check`; raised before anything runs.
    """
    check(dense, candidate, prompts, steps, (temperature, *temperatures))
    if candidate.module is dense.module:
        candidate = dense.clone()
    rows = [dense.tokenizer(p)["input_ids"] for p in prompts]
    draw = Draw(temperature if sampled else None, seed)
    store, every = _Store(len(prompts), steps, temperatures), (temperature, *temperatures)
    if compiled is None:
        pairs = len(prompts) * steps * len(schema.HISTORIES) * len(every)
        compiled = worth_fusing(pairs * dense.vocabulary)
    cached, done = readable(dense, candidate), 0
    for part in batches([len(row) + steps for row in rows]):
        mine = _dense_side(dense, rows, part, steps, draw, written)
        progress((done + (0.4 if written is None else 0.0) * len(part)) / len(rows))
        other = write_batch(candidate, rows, part, steps, draw)
        progress((done + 0.8 * len(part)) / len(rows))
        batch = _Batch(part, mine, other)
        _measure((dense, candidate), batch, every, store, cached, compiled)
        done += len(part)
        progress(done / len(rows))
    attrs = _attributes(dense, candidate, steps, temperature, sampled, seed, cached)
    return store.tree(dense, candidate, prompts, attrs)


def _dense_side(
    dense: Model, rows: Rows, part: list[int], steps: int, draw: Draw, written: Rows | None
) -> Written:
    """The dense texts of a batch, with states and cache.

    In 16 bits the cached steps of writing differ visibly from a pass over the whole text; the
    histories are passes, so that there the texts are read once more.
    """
    if written is not None:
        return read_batch(dense, [rows[i] for i in part], [written[i] for i in part])
    made = write_batch(dense, rows, part, steps, draw)
    return made if dense.dtype.itemsize >= 4 else read_batch(dense, made.rows, made.texts)


def check(
    dense: Model,
    candidate: Model,
    prompts: Sequence[str],
    steps: int,
    temperatures: Sequence[float],
) -> None:
    """Whether two models can write after these prompts and be compared.

    Raises:
        MeasureError: different vocabularies or tokenizers, no prompts, an empty prompt.
        DecodeError: no stop token, prompts that leave no room in the context, bad numbers.
    """
    check_pair(dense, candidate, layerwise=False)
    check_texts(dense, prompts, steps)
    for temperature in temperatures:
        if not (temperature > 0 and np.isfinite(temperature)):
            raise DecodeError(
                f"temperature {temperature} cannot be used: it must be finite and above 0; greedy "
                "decoding is the default and needs none"
            )
    if candidate.context < dense.context:
        check_texts(candidate, prompts, steps)


def check_texts(model: Model, prompts: Sequence[str], steps: int) -> None:
    """Whether a model can write `steps` tokens after every prompt; raises as `check`."""
    check_prompts(model, prompts)
    if steps < 1:
        raise DecodeError(f"{steps} steps were asked for; at least 1 is needed")
    if model.tokenizer.eos_token_id is None:
        raise DecodeError(
            f"the tokenizer of {model.label} has no end-of-text token, so no text would ever end; "
            "set tokenizer.eos_token"
        )
    for i, prompt in enumerate(prompts):
        length = len(model.tokenizer(prompt)["input_ids"])
        if length + steps > model.context:
            raise DecodeError(
                f"prompt {i + 1} has {length} tokens; with {steps} steps that passes the context of "
                f"{model.label}, {model.context} tokens. Shorten it, or ask for at most "
                f"{max(0, model.context - length)} steps"
            )


def readable(dense: Model, candidate: Model) -> bool:
    """Whether the candidate's attentions can read the dense model's keys and values."""
    try:
        check_pair(dense, candidate)
    except MeasureError:
        return False
    blocks = dense.anatomy.blocks(dense.module)
    return not any(dropped(dense.anatomy, block, "attn") for block in blocks)


# --- measuring -----------------------------------------------------------------------------------


class _Batch:
    """Prompts with both texts: which, and the steps that both have."""

    def __init__(self, prompts: list[int], dense: Written, candidate: Written) -> None:
        self.prompts, self.dense, self.candidate = prompts, dense, candidate
        self.steps = [len(text) for text in dense.texts]
        pairs = zip(dense.texts, candidate.texts, strict=True)
        self.common = [min(len(a), len(b)) for a, b in pairs]

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and step of every position, `(position,)` each."""
        prompt = np.repeat(self.prompts, self.steps)
        return prompt, np.concatenate([np.arange(n) for n in self.steps])

    def shared(self) -> np.ndarray:
        """Whether the candidate's text has the step as well, `(position,)`."""
        return np.concatenate(
            [np.arange(n) < m for n, m in zip(self.steps, self.common, strict=True)]
        )

    def common_steps(self, states: list[Tensor], rest: Tensor) -> Tensor:
        """States of the steps that both texts have, then those of `rest`, `(position, d_model)`."""
        others = zip(states, self.common, rest.split(self.steps), strict=True)
        return torch.cat([piece for x, n, other in others for piece in (x[:n], other[n:])])


def _measure(
    pair: tuple[Model, Model],
    batch: _Batch,
    temperatures: Sequence[float],
    store: _Store,
    cached: bool,
    compiled: bool,
) -> None:
    """All histories of one batch, beside what was seen while writing: three passes over texts."""
    dense, candidate = pair
    mine, other = batch.dense, batch.candidate
    h = torch.cat(mine.states)
    found = {"step": torch.cat(one_step(candidate, mine, mine.cache))} if cached else {}
    found["forced"] = torch.cat(_states(candidate, mine.rows, mine.texts))
    found["free"] = batch.common_steps(other.states, h)
    found["swapped"] = batch.common_steps(_states(dense, other.rows, other.texts), h)
    readouts = {name: candidate.readout() for name in found} | {"swapped": dense.readout()}
    for names in _by_readout(readouts, dense.readout()):
        states = [found[name] for name in names]
        figures = compare_at(
            h, states, dense.readout(), readouts[names[0]], temperatures=temperatures,
            compiled=compiled,
        )  # fmt: skip
        for i, name in enumerate(names):
            store.keep(batch, name, [f[i] for f in figures], angles(h, states[i]))
    store.keep_texts(batch)


def _by_readout(readouts: dict[str, Readout], dense: Readout) -> list[list[str]]:
    """Histories in groups that share a readout."""
    if all(readout.same(dense) for readout in readouts.values()):
        return [list(readouts)]
    return [[name for name in readouts if name != "swapped"], ["swapped"]]


def _states(model: Model, rows: Rows, texts: Rows) -> list[Tensor]:
    """States of a model that reads texts, at the positions that predict their tokens."""
    states = trace.final_states(model.module, model.anatomy, layout(model, rows, texts))
    return at_steps(states, rows, texts)


def one_step(model: Model, read: Written, memory: Any) -> list[Tensor]:
    """States of a model whose every position is a first step from another model's cache.

    Each attention reads `memory` strictly before the position, and at it the model's own key and
    value: what a single cached step computes, for all positions in one pass.

    Args:
        model: that makes the step.
        read: the texts.
        memory: keys and values of every layer for `layout(rows, texts)`, as `memory.layers`.
    """
    batch: dict[str, Any] = layout(model, read.rows, read.texts)
    start = max(map(len, read.rows)) - 1
    masks = _masks(model, batch, start)
    batch = {name: batch[name][:, start:] for name in ("input_ids", "position_ids")}
    batch["attention_mask"] = masks
    states = trace.final_states(model.module, model.anatomy, batch, _Remembered(memory))
    return [row[: len(text)] for row, text in zip(states, read.texts, strict=True)]


class _Remembered(DynamicCache):
    """Gives every attention another model's keys and values before its own of the newest tokens."""

    def __init__(self, memory: Any) -> None:
        super().__init__()
        self.memory = memory

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """`(row, head, token, width)`: theirs, then its own. A dropped attention gets nothing."""
        theirs: Any = self.memory.layers[layer_idx]
        if key_states.shape[1::2] != theirs.keys.shape[1::2]:
            return key_states, value_states
        keys = torch.cat([theirs.keys, key_states], dim=-2)
        return keys, torch.cat([theirs.values, value_states], dim=-2)


def _masks(model: Model, batch: dict[str, Any], start: int) -> Any:
    """The model's own masks without their diagonal, beside the diagonal alone, from `start` on."""
    ids: Tensor = batch["input_ids"]
    made: Any = create_masks_for_generate(
        model.module.config, torch.empty((*ids.shape, 0), dtype=model.dtype, device=ids.device),
        batch["attention_mask"], None, batch["position_ids"],
        and_mask_function=lambda _batch, _head, query, key: query != key,
    )  # fmt: skip
    if isinstance(made, dict):
        return {kind: _beside_diagonal(mask[..., start:, :]) for kind, mask in made.items()}
    return _beside_diagonal(made[..., start:, :])


def _beside_diagonal(mask: Tensor) -> Tensor:
    newest = mask.shape[-2]
    own = torch.eye(newest, dtype=torch.bool, device=mask.device)
    own = own.expand(*mask.shape[:-2], newest, newest)
    if mask.dtype != torch.bool:
        own = torch.where(own, 0.0, torch.finfo(mask.dtype).min).to(mask.dtype)
    return torch.cat([mask, own], dim=-1)


# --- storing -------------------------------------------------------------------------------------

_SPACED = ("cosine", "angular")
_PLAIN = ("kl", "kl_reverse", "js", "tv", "var_p", "var_r", "flip", "entropy_candidate")
_BY_TEMPERATURE = tuple(schema.SCHEMA["temperatures"])


class _Store:
    """Arrays of figures, NaN where a text has ended."""

    def __init__(self, prompts: int, steps: int, temperatures: Sequence[float]) -> None:
        self.temperatures, self.shape = list(temperatures), (prompts, steps)
        shape = (prompts, steps, len(schema.HISTORIES))
        self.steps = {name: _nan(*shape, 3) for name in _SPACED}
        self.steps |= {name: _nan(*shape) for name in _PLAIN}
        self.steps |= {name: _nan(*self.shape) for name in ("margin", "entropy")}
        self.further = {name: _nan(*shape, len(self.temperatures)) for name in _BY_TEMPERATURE}
        self.texts: tuple[Rows, Rows] = ([[]] * prompts, [[]] * prompts)

    def keep_texts(self, batch: _Batch) -> None:
        """Store what both models wrote."""
        for mine, side in zip(self.texts, (batch.dense, batch.candidate), strict=True):
            for i, text in zip(batch.prompts, side.texts, strict=True):
                mine[i] = text

    def keep(self, batch: _Batch, history: str, figures: list[Figures], h: Figures) -> None:
        """Store one history of a batch: figures at the main temperature first, then the others."""
        prompt, step = batch.places()
        main, number = figures[0], schema.HISTORIES.index(history)
        there = batch.shared() if history in ("free", "swapped") else np.full(len(prompt), True)
        where = (prompt[there], step[there], number)
        for name in _PLAIN:
            self.steps[name][where] = main[name].cpu().numpy()[there]
        for name in _SPACED:
            values = torch.stack(
                [h[name].cpu(), *(main[f"{name}_{s}"].cpu() for s in "zp")], dim=-1
            )
            self.steps[name][where] = values.numpy()[there]
        for name in ("margin", "entropy"):
            self.steps[name][prompt, step] = main[name].cpu().numpy()
        for i, further in enumerate(figures[1:]):
            for name in _BY_TEMPERATURE:
                self.further[name][(*where, i)] = further[name].cpu().numpy()[there]

    def tree(
        self, dense: Model, candidate: Model, prompts: Sequence[str], attrs: dict[str, Any]
    ) -> xr.DataTree:
        count, steps = self.shape
        sides = list(zip((dense, candidate), self.texts, strict=True))
        token = np.full((count, steps, 2), -1)
        for s, (_, rows) in enumerate(sides):
            for i, ids in enumerate(rows):
                token[i, : len(ids), s] = ids
        named: dict[int, str] = {
            int(i): dense.tokenizer.decode([int(i)]) for i in np.unique(token) if i >= 0
        }
        text = [
            [m.tokenizer.decode(ids, skip_special_tokens=True) for ids in rows] for m, rows in sides
        ]
        end = dense.tokenizer.eos_token_id
        no_stop = [[float(ids[-1] != end) for ids in rows] for _, rows in sides]
        written = {
            "token": token,
            "token_text": np.vectorize(lambda i: named.get(int(i), ""), otypes=[object])(token),
            "text": np.array(text, dtype=object).T,
            "prompt_text": np.array(list(prompts), dtype=object),
            "no_stop": np.array(no_stop, np.float32).T,
        }
        coords: dict[str, Any] = {
            "prompt": np.arange(count), "step": np.arange(steps),
            "history": list(schema.HISTORIES),
        }  # fmt: skip
        inner = {"space": list(schema.SPACES), "model": list(schema.MODELS)}
        groups = {"steps": schema.dataset("steps", self.steps | written, coords | inner, attrs)}
        at = {"temperature": np.array(self.temperatures, float)}
        groups["temperatures"] = schema.dataset("temperatures", self.further, coords | at, attrs)
        return schema.tree(groups, {})


def _nan(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


def _attributes(
    dense: Model, candidate: Model, steps: int, temperature: float, sampled: bool, seed: int,
    cached: bool,
) -> dict[str, Any]:  # fmt: skip
    return {
        "direction": "dense first: KL(p_dense || p_candidate)",
        "phase": "decoding",
        "decoding": f"sampled at T = {temperature}, seed {seed}" if sampled else "greedy",
        "sampled": int(sampled),
        "steps": steps,
        "temperature": temperature,
        "step_history": "dense keys and values; a dropped attention reads nothing"
        if cached
        else "not measured: the layers of the two models have no counterparts",
        "dense": dense.label,
        "candidate": candidate.label,
    }
