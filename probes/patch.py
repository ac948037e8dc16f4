"""Patching: where the damage comes from, by putting one model's part into the other.

* by depth: the candidate, with the dense residual stream written in after a layer.
* by sublayer: the candidate with one sublayer made dense (`denoise`), and the dense model with one
  sublayer made the candidate's (`noise`).
* by part: only one part of the change of h or z is kept at the output.

One sweep over the layers serves all of them. At each layer, the streams that change there leave
the model's own and join the batch of those that changed before, so that nothing is computed
twice. What must come out as it went in, since no sublayer was changed, is not computed at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from ..analysis import schema
from . import trace
from .anatomy import SUBLAYERS, Anatomy, Sublayer, contribution
from .kernels import Figures, Readout, compare_at, compare_logits, leaders, log_p
from .measure import MeasureError, check_pair, check_prompts
from .model import Model
from .reduction import worth_fusing
from .score import split

TOP_K = 10
POSITIONS = 512  # final states are read out once so many positions have come together
FIGURES = ("kl", "flip", "log_p")


class Text(NamedTuple):
    """Token ids, and from where on they are an answer: its tokens are what is asked about."""

    ids: list[int]
    start: int


def patch(
    dense: Model,
    candidate: Model,
    *,
    prompts: Sequence[str],
    answers: Sequence[str] | None = None,
    max_tokens: int = 128,
    compiled: bool | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> xr.DataTree:
    """Measure what every layer and sublayer contributes to the damage at the output.

    Args:
        dense: the reference model.
        candidate: the compressed model, whose layers have counterparts in the dense one.
        prompts: texts.
        answers: what should follow each prompt, with its leading space: figures are then taken
            where its tokens are predicted. Without, at every position of the prompts, of which
            the next token counts as the answer.
        max_tokens: longest prompt with its answer, in tokens; prompts lose their beginning.
        compiled: fuse the kernels with `torch.compile`. None: as in `measure`.
        progress: called with the share of the work that is done.

    Returns:
        A tree with `/patches`: for each prompt the mean KL and flips over its positions, and the
        log-probability of its answer, of the candidate as it is, of every patched model, and of
        every part of the change kept alone.

    Raises:
        MeasureError: models whose layers have no counterparts, no prompts, an empty one, a number
            of answers that differs from that of the prompts.
    """
    check_pair(dense, candidate)
    check_prompts(dense, prompts)
    texts = _texts(dense, prompts, answers, max_tokens)
    if candidate.module is dense.module:
        candidate = dense.clone()
    changed = changes(dense, candidate)
    if compiled is None:
        positions = sum(len(ids) - start for ids, start in texts)
        compiled = worth_fusing(positions * 3 * max(1, int(changed.sum())) * dense.vocabulary)
    store = _Store(len(texts), changed, answers is not None, compiled)
    waiting = _Waiting()
    for i, text in enumerate(texts):
        _sweep(dense, candidate, text, changed, waiting, i)
        if waiting.positions >= POSITIONS or i + 1 == len(texts):
            store.keep(dense, candidate, waiting)
            waiting = _Waiting()
        progress((i + 1) / len(texts))
    return store.tree(dense, candidate, prompts, answers)


def _texts(
    model: Model, prompts: Sequence[str], answers: Sequence[str] | None, longest: int
) -> list[Text]:
    if answers is None:
        rows = [model.tokenizer(p)["input_ids"][:longest] for p in prompts]
        short = [i for i, ids in enumerate(rows) if len(ids) < 2]
        if short:
            raise MeasureError(
                f"prompt {short[0] + 1} has a single token, so that nothing in it is predicted; "
                "give a longer one, or answers"
            )
        return [Text(ids, 1) for ids in rows]
    if len(answers) != len(prompts):
        raise MeasureError(
            f"{len(answers)} answers for {len(prompts)} prompts; one for each is needed"
        )
    pairs = (split(model, p, a) for p, a in zip(prompts, answers, strict=True))
    cuts = ((ids, start, max(0, len(ids) - longest)) for ids, start in pairs)
    return [Text(ids[cut:], max(1, start - cut)) for ids, start, cut in cuts]


def changes(dense: Model, candidate: Model) -> np.ndarray:
    """Whether a sublayer (its norms included) differs between the models, `(layer, site)`."""
    blocks = (m.anatomy.blocks(m.module) for m in (dense, candidate))
    return np.array(
        [
            [not _equal(dense.anatomy, block, other, site) for site in SUBLAYERS]
            for block, other in zip(*blocks, strict=True)
        ]
    )


def _equal(anatomy: Anatomy, block: nn.Module, other: nn.Module, sublayer: Sublayer) -> bool:
    part = anatomy.part(sublayer)
    for path in (part.norm, *part.body, part.post):
        if path is None:
            continue
        a, b = block.get_submodule(path), other.get_submodule(path)
        mine, theirs = dict(a.named_parameters()), dict(b.named_parameters())
        if type(a) is not type(b) or mine.keys() != theirs.keys():
            return False
        if not all(_same(mine[name], theirs[name]) for name in mine):
            return False
    return True


def _same(x: Tensor, y: Tensor) -> bool:
    if x is y:
        return True
    return type(x) is type(y) and x.shape == y.shape and bool(torch.equal(x, y))


# --- the sweep -----------------------------------------------------------------------------------

Name = tuple[Any, ...]
"""What a stream is: ("own",), ("depth", layer, span), ("denoise" or "noise", layer, site)."""


@dataclass(frozen=True)
class _Side:
    """One model's sublayers in the surroundings of a text."""

    model: Model
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def add(self, layer: int, sublayer: Sublayer, x: Tensor) -> Tensor:
        """What the sublayer adds to every stream of `x`, `(stream, token, d_model)`."""
        anatomy = self.model.anatomy
        block = anatomy.blocks(self.model.module)[layer]
        extra = self.calls[layer] if sublayer == "attn" else ((), {})
        return contribution(anatomy, block, sublayer, x, *extra)


@dataclass
class _Streams:
    """A model's own stream, first, and those that left it: `(stream, token, d_model)`."""

    side: _Side
    other: _Side
    kind: str
    states: Tensor
    names: list[Name] = field(default_factory=lambda: [("own",)])

    def advance(self, layer: int, swap: np.ndarray) -> None:
        """Through one layer; where `swap` says so, a stream leaves by the other model's sublayer."""
        x, attn = self.states, self.side.add(layer, "attn", self.states)
        theirs = self.other.add(layer, "attn", x[:1]) if swap[0] else None
        if self.side.model.anatomy.parallel:
            mlp = self.side.add(layer, "mlp", x)
            rows = [mlp + attn + x]
            rows += [mlp[:1] + theirs + x[:1]] if theirs is not None else []
            rows += [self.other.add(layer, "mlp", x[:1]) + attn[:1] + x[:1]] if swap[1] else []
        else:
            mid = x + attn
            mid = torch.cat([mid, x[:1] + theirs]) if theirs is not None else mid
            rows = [mid + self.side.add(layer, "mlp", mid)]
            rows += [mid[:1] + self.other.add(layer, "mlp", mid[:1])] if swap[1] else []
        self.states = torch.cat(rows)
        self.names += [
            (self.kind, layer, s) for s, here in zip(SUBLAYERS, swap, strict=True) if here
        ]

    def join(self, name: Name, state: Tensor) -> None:
        """A stream that starts here, `(1, token, d_model)`."""
        self.states = torch.cat([self.states, state])
        self.names.append(name)


@torch.no_grad()
def _sweep(
    dense: Model, candidate: Model, text: Text, changed: np.ndarray, waiting: _Waiting, prompt: int
) -> None:
    """Final states of every patched model at the positions that predict the answer."""
    ids = torch.tensor([text.ids], device=dense.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    calls = trace.surroundings(dense.module, dense.anatomy, batch)
    sides = [_Side(model, calls) for model in (dense, candidate)]
    mine, other = (
        _Streams(a, b, kind, trace.entry(m.module, m.anatomy, batch))
        for a, b, kind, m in (
            (sides[0], sides[1], "noise", dense), (sides[1], sides[0], "denoise", candidate)
        )
    )  # fmt: skip
    layers, asked = np.asarray(changed.any(-1)), slice(text.start - 1, len(text.ids) - 1)
    for layer in range(dense.layer_count):
        mine.advance(layer, changed[layer])
        other.advance(layer, changed[layer])
        if layers[: layer + 1].any():
            if layers[layer + 1 :].any():
                other.join(("depth", layer, "all"), mine.states[:1])
            if text.start > 1:
                partly = other.states[:1].clone()
                partly[:, asked] = mine.states[:1, asked]
                other.join(("depth", layer, "last"), partly)
    waiting.add(prompt, ids[0, text.start :], mine, other, asked)


class _Waiting:
    """Final states of several prompts, to be read out together: stream -> prompt -> states."""

    def __init__(self) -> None:
        self.prompts: list[int] = []
        self.targets: list[Tensor] = []
        self.dense: list[Tensor] = []
        self.streams: dict[Name, list[Tensor]] = {}
        self.positions = 0

    def add(
        self, prompt: int, targets: Tensor, mine: _Streams, other: _Streams, asked: slice
    ) -> None:
        """Take in the streams of one prompt at the positions asked about."""
        self.prompts.append(prompt)
        self.targets.append(targets)
        self.dense.append(mine.states[0, asked])
        self.positions += len(targets)
        for side in (mine, other):
            for i, name in enumerate(side.names):
                if (side, i) != (mine, 0):
                    self.streams.setdefault(name, []).append(side.states[i, asked])


# --- parts of the change at the output -----------------------------------------------------------


def parts(
    h: Tensor, other: Tensor, readout: Readout, own: Readout, targets: Tensor
) -> dict[str, Figures]:
    """Figures of the dense output plus one part of the change alone.

    `parallel`, `orthogonal`: of Δh, along h and across it, read by the dense readout. `common`,
    `rest`: of Δz, what is the same for all tokens and what is not. `top`, `tail`: of Δz, at the ten
    tokens that are likeliest in the dense model, and at all others. `share` is the part's share of
    the squared change.
    """
    d = (other - h).double()
    along = (d * h).sum(-1, keepdim=True) / h.double().square().sum(-1, keepdim=True) * h.double()
    pieces = {"parallel": along, "orthogonal": d - along}
    states = [(h.double() + piece).to(h.dtype) for piece in pieces.values()]
    found = compare_at(h, states, readout, readout, temperatures=(1.0,), targets=targets)[0]
    shares = [_share(piece, d) for piece in pieces.values()]
    result = {n: f | {"share": s} for n, f, s in zip(pieces, found, shares, strict=True)}
    blocks = zip(h.split(64), other.split(64), targets.split(64), strict=True)
    tables = [_logit_parts(*block, readout, own) for block in blocks]
    return result | {
        name: {f: torch.cat([table[name][f] for table in tables]) for f in (*FIGURES, "share")}
        for name in ("common", "rest", "top", "tail")
    }


def _logit_parts(
    h: Tensor, other: Tensor, targets: Tensor, readout: Readout, own: Readout
) -> dict[str, Figures]:
    room = h.new_empty((2, len(h), len(readout.weight)), dtype=torch.float32)
    z = readout.logits(readout.states(h), room[0])
    d = own.logits(own.states(other), room[1]) - z
    common = d.mean(-1, keepdim=True).expand_as(d)
    top = torch.zeros_like(d).scatter_(1, leaders(z, TOP_K)[1], 1.0) * d
    pieces = {"common": common, "rest": d - common, "top": top, "tail": d - top}
    return {name: _kept(z, piece, d, targets) for name, piece in pieces.items()}


def _kept(z: Tensor, piece: Tensor, d: Tensor, targets: Tensor) -> Figures:
    y = z + piece
    return compare_logits(z, y) | {"log_p": log_p(y, targets), "share": _share(piece, d)}


def _share(piece: Tensor, d: Tensor) -> Tensor:
    whole = d.double().square().sum(-1)
    return torch.where(whole > 0, piece.double().square().sum(-1) / whole, torch.nan)


# --- storing -------------------------------------------------------------------------------------


class _Store:
    """Arrays of `/patches`; what no stream was needed for has the value that it must have."""

    def __init__(self, prompts: int, changed: np.ndarray, answered: bool, compiled: bool) -> None:
        self.changed, self.answered, self.compiled = changed, answered, compiled
        layers = len(changed)
        shapes = {"": (), "depth_": (layers, 2), "swap_": (layers, 2, 2), "part_": (6,)}
        self.arrays = {
            prefix + name: np.full((prompts, *shape), np.nan, np.float64)
            for prefix, shape in shapes.items()
            for name in (*FIGURES, *(("share",) if prefix == "part_" else ()))
        }
        self.arrays["log_p_dense"] = np.full(prompts, np.nan)

    def keep(self, dense: Model, candidate: Model, waiting: _Waiting) -> None:
        """Read out what has come together and store it."""
        h, targets = torch.cat(waiting.dense), torch.cat(waiting.targets)
        sizes = [len(t) for t in waiting.targets]
        base = self._means(compare_at(
            h, [h], dense.readout(), dense.readout(), temperatures=(1.0,), targets=targets
        )[0][0], sizes)  # fmt: skip
        self.arrays["log_p_dense"][waiting.prompts] = base["log_p"]
        found = {name: torch.cat(states) for name, states in waiting.streams.items()}
        figures: dict[Name, dict[str, np.ndarray]] = {}
        for model, mine in ((dense, True), (candidate, False)):
            names = [n for n in found if (n[0] == "noise") == mine]
            if names:
                rows = compare_at(
                    h, [found[n] for n in names], dense.readout(), model.readout(),
                    temperatures=(1.0,), targets=targets, compiled=self.compiled,
                )[0]  # fmt: skip
                figures |= {n: self._means(f, sizes) for n, f in zip(names, rows, strict=True)}
        kept = parts(h, found[("own",)], dense.readout(), candidate.readout(), targets)
        for name in FIGURES:
            self._fill(waiting.prompts, name, figures, base[name])
        for i, part in enumerate(kept.values()):
            for name, values in self._means(part, sizes, (*FIGURES, "share")).items():
                self.arrays[f"part_{name}"][waiting.prompts, i] = values

    def _fill(
        self, prompts: list[int], name: str, figures: dict[Name, dict[str, np.ndarray]], base: Any
    ) -> None:
        own = figures[("own",)][name]
        self.arrays[name][prompts] = own
        layers = np.asarray(self.changed.any(-1))
        for layer in range(len(layers)):
            before = not layers[: layer + 1].any()
            for s, span in enumerate(schema.SPANS):
                known = own if before else base if span == "all" else np.full(len(own), np.nan)
                row = figures.get(("depth", layer, span))
                self.arrays[f"depth_{name}"][prompts, layer, s] = row[name] if row else known
            for s, site in enumerate(SUBLAYERS):
                for k, kind in enumerate(schema.SWAPS):
                    row = figures.get((kind, layer, site))
                    known = own if kind == "denoise" else base
                    self.arrays[f"swap_{name}"][prompts, layer, s, k] = row[name] if row else known

    def _means(
        self, figures: Figures, sizes: list[int], names: tuple[str, ...] = FIGURES
    ) -> dict[str, np.ndarray]:
        """Means over the positions of each prompt; answers' log-probabilities add up."""
        result: dict[str, np.ndarray] = {}
        for name in names:
            pieces = figures[name].cpu().split(sizes)
            total = name == "log_p" and self.answered
            result[name] = np.array([float(p.sum() if total else p.mean()) for p in pieces])
        return result

    def tree(
        self, dense: Model, candidate: Model, prompts: Sequence[str], answers: Sequence[str] | None
    ) -> xr.DataTree:
        coords: dict[str, Any] = {
            "prompt": np.arange(len(prompts)), "layer": np.arange(len(self.changed)),
            "site": list(schema.SITES), "span": list(schema.SPANS), "swap": list(schema.SWAPS),
            "part": list(schema.PARTS),
        }  # fmt: skip
        texts = {
            "prompt_text": np.array(list(prompts), dtype=object),
            "answer": np.array(list(answers or [""] * len(prompts)), dtype=object),
            "changed": self.changed.astype(np.int64),
        }
        attrs = {
            "direction": "dense first: KL(p_dense || p_patched)", "dense": dense.label,
            "candidate": candidate.label, "answered": int(self.answered),
        }  # fmt: skip
        data = schema.dataset("patches", self.arrays | texts, coords, attrs)
        return schema.tree({"patches": data}, {})
