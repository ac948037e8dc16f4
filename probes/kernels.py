"""Every per-position figure of a pair of logit rows, exactly, without storing the logits.

Logits are made in row blocks of bounded size and reduced at once (`reduction`). The names and
formulas are those of the README's table (z: logits, p = softmax(z/T), dense first).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .reduction import (
    FIGURES,
    Figures,
    Leaders,
    Settings,
    even,
    keep_freed_memory,
    leaders,
    reduce_block,
    reduce_rows,
)

TOP_K = 10
ROW_BLOCK_ELEMENTS = 20_000_000  # one block of logits of one model: 80 MB in float32


@dataclass(frozen=True, eq=False)
class Readout:
    """How hidden states become logits: softcap(weight @ norm(h) + bias), in float32.

    `weight` is `(vocab, d_model)`; `norm` maps `(position, d_model)` to itself, None for the raw
    lens; `softcap` is Gemma's tanh bound, None elsewhere.
    """

    weight: Tensor
    norm: Callable[[Tensor], Tensor] | None = None
    bias: Tensor | None = None
    softcap: float | None = None

    def same(self, other: Readout) -> bool:
        """Whether both are certain to give the same logits: the same weights, norm and cap."""
        return (
            _same_storage(self.weight, other.weight)
            and self.norm == other.norm
            and self.softcap == other.softcap
            and ((self.bias is None and other.bias is None) or _same_storage(self.bias, other.bias))
        )

    def states(self, hidden: Tensor) -> Tensor:
        """`hidden` after the norm, float32, contiguous: `(position, d_model)`."""
        normed = hidden if self.norm is None else self.norm(hidden)
        return normed.float().contiguous()

    def logits(self, normed: Tensor, out: Tensor) -> Tensor:
        """Logits `(position, vocab)` of normed states, written into the first rows of `out`."""
        z = out[: len(normed)]
        if self.weight.dtype == torch.float32:
            torch.mm(normed, self.weight.T, out=z)
        else:  # widen the weights a slice at a time: a float32 copy of all would double the memory
            for start in range(0, len(self.weight), 8192):
                part = self.weight[start : start + 8192].float()
                z[:, start : start + len(part)] = normed @ part.T
        if self.bias is not None:
            z += self.bias.float()
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z


def _same_storage(x: Tensor | None, y: Tensor | None) -> bool:
    return x is not None and y is not None and x.data_ptr() == y.data_ptr() and x.shape == y.shape


@torch.no_grad()
def compare_logits(
    dense: Tensor,
    candidate: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = TOP_K,
    compiled: bool = False,
) -> Figures:
    """All `FIGURES` of two logit tensors `(..., vocab)`, float32 or narrower.

    Args:
        dense: logits of the dense model, in nat.
        candidate: logits of the compressed model at the same positions.
        temperature: softmax temperature T > 0.
        top_k: size of the two sets whose overlap is measured.
        compiled: fuse the passes with `torch.compile` (same numbers; some seconds to compile).

    Returns:
        name -> float64 tensor `(...)`. Divergences and entropies in nat, variances in nat²,
        cosines, overlap and flip without unit. Tokens that are -inf in both are left out; where
        only the candidate has -inf, `kl` is infinite and the figures of z are NaN.

    Raises:
        ValueError: shapes that differ, no vocabulary to speak of, T <= 0, NaN or +inf logits.
    """
    _check(dense, candidate, temperature, top_k)
    shape = dense.shape[:-1]
    rows, other = dense.reshape(-1, dense.shape[-1]), candidate.reshape(-1, dense.shape[-1])
    if not rows.numel():
        return {name: rows.new_zeros(shape, dtype=torch.float64) for name in FIGURES}
    keep_freed_memory()
    settings = Settings(float(temperature), top_k, compiled)
    blocks: list[Tensor] = []
    for z, y in zip(rows.split(settings.rows(rows)), other.split(settings.rows(rows)), strict=True):
        z, y = z.float(), y.float()
        masked = bool(torch.minimum(z.amin(), y.amin()) == -math.inf)
        blocks.append(_masked_rows(z, y, settings) if masked else _rows(z, y, settings))
    columns = torch.cat(blocks).T
    return {name: column.reshape(shape) for name, column in zip(FIGURES, columns, strict=True)}


def compare_states(
    dense: Tensor,
    candidate: Tensor,
    unembedding: Tensor | Readout,
    *,
    norm: Callable[[Tensor], Tensor] | None = None,
    candidate_unembedding: Tensor | Readout | None = None,
    temperature: float = 1.0,
    top_k: int = TOP_K,
    block: int | None = None,
    compiled: bool = False,
) -> Figures:
    """All `FIGURES` of two hidden-state tensors `(position, d_model)`, logits never held whole.

    Args:
        dense: hidden states of the dense model.
        candidate: hidden states of the compressed model at the same positions.
        unembedding: weight `(vocab, d_model)`, or a `Readout` that carries norm, bias and softcap.
        norm: final norm to apply first, for an unembedding that is a plain weight (None: raw lens).
        candidate_unembedding: the candidate's own, where it differs.
        temperature: softmax temperature T > 0.
        top_k: size of the two sets whose overlap is measured.
        block: positions whose logits are held at a time (default: 80 MB of them for each model).
        compiled: fuse the passes with `torch.compile`.

    Returns:
        name -> float64 tensor `(position,)`, as `compare_logits`.

    Raises:
        ValueError: shapes that do not fit, T <= 0, NaN or infinite states.
    """
    readout = unembedding if isinstance(unembedding, Readout) else Readout(unembedding, norm)
    own = candidate_unembedding if candidate_unembedding is not None else readout
    own = own if isinstance(own, Readout) else Readout(own, norm)
    return compare_many(
        dense, [candidate], readout, own,
        temperature=temperature, top_k=top_k, block=block, compiled=compiled,
    )[0]  # fmt: skip


def compare_many(
    dense: Tensor,
    candidates: Sequence[Tensor],
    readout: Readout,
    candidate_readout: Readout,
    *,
    temperature: float = 1.0,
    top_k: int = TOP_K,
    block: int | None = None,
    compiled: bool = False,
    space: Tensor | None = None,
) -> list[Figures]:
    """As `compare_states` for several candidate states, making the dense logits only once.

    `space` of `workspace` saves getting the memory for the logits again at every call.

    A candidate whose states and readout equal the dense ones costs no product: its shifts are
    exactly zero.
    """
    return compare_at(
        dense, candidates, readout, candidate_readout,
        temperatures=(temperature,), top_k=top_k, block=block, compiled=compiled, space=space,
    )[0]  # fmt: skip


@torch.no_grad()
def compare_at(
    dense: Tensor,
    candidates: Sequence[Tensor],
    readout: Readout,
    candidate_readout: Readout,
    *,
    temperatures: Sequence[float],
    top_k: int = TOP_K,
    block: int | None = None,
    compiled: bool = False,
    space: Tensor | None = None,
    targets: Tensor | None = None,
) -> list[list[Figures]]:
    """As `compare_many` at several temperatures, `[temperature][candidate]`: logits are made once.

    `targets` are token ids `(position,)`: their log p' (nat, T = 1) come as a further figure `log_p`.
    """
    for temperature in temperatures:
        _check_states(dense, candidates, readout, candidate_readout, temperature, top_k)
    keep_freed_memory()
    every = [Settings(float(t), top_k, compiled) for t in temperatures]
    done: list[list[list[Tensor]]] = [[[] for _ in candidates] for _ in every]
    if space is None:
        space = workspace(readout, block or len(dense), dense.device, len(candidates))
    block = even(len(dense), min(block or len(dense), space.shape[1]))
    chosen: list[list[Tensor]] = [[] for _ in candidates]
    for start in range(0, len(dense), block):
        states = [x[start : start + block] for x in (dense, *candidates)]
        first: Leaders | None = None
        for i, z, y in _pairs(states, readout, candidate_readout, space):
            first = first or leaders(z, top_k)
            if targets is not None:
                chosen[i].append(log_p(y, targets[start : start + block]))
            for settings, columns in zip(every, done, strict=True):
                columns[i].append(reduce_block(z, y, settings, first))
    extra: list[Figures] = [{"log_p": torch.cat(c)} for c in chosen if c] or [{}] * len(candidates)
    return [
        [
            dict(zip(FIGURES, torch.cat(columns).T, strict=True)) | more
            for columns, more in zip(here, extra, strict=True)
        ]
        for here in done
    ]


def log_p(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits) at one token id a row, float64 `(row,)`, in nat."""
    picked = logits.gather(1, targets[:, None])[:, 0]
    return picked.double() - logits.logsumexp(-1).double()


def _pairs(
    states: list[Tensor], readout: Readout, candidate_readout: Readout, space: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number and logits of each candidate beside the dense logits; the same tensor where equal."""
    rows, others = states[0], states[1:]
    same_readout, room = readout.same(candidate_readout), len(space) - 1
    moved = [i for i, x in enumerate(others) if not (same_readout and torch.equal(x, rows))]
    ahead = moved[:room] if same_readout else []
    z, *made = _logits(readout, [rows, *(others[i] for i in ahead)], space)
    yield from ((i, z, z) for i in range(len(others)) if i not in moved)
    rest = moved[len(ahead) :]
    for group in (ahead, *(rest[i : i + room] for i in range(0, len(rest), room))):
        if group is not ahead:
            made = _logits(candidate_readout, [others[i] for i in group], space[1:])
        for i, y in zip(group, made, strict=True):
            if same_readout:
                _settle(y, z, torch.all(others[i] == rows, dim=-1))
            yield i, z, y


def _logits(readout: Readout, states: list[Tensor], space: Tensor) -> list[Tensor]:
    """Logits of several blocks of states by one product, which reads the unembedding once."""
    room = space.flatten(0, 1)
    made = readout.logits(readout.states(torch.cat(states)), room)
    return list(made.split(len(states[0])))


def _settle(y: Tensor, z: Tensor, same: Tensor) -> None:
    """Rows of equal states get equal logits, wherever the product rounded them differently."""
    if bool(same.any()):
        y[same] = z[same]


def workspace(
    readout: Readout, positions: int, device: torch.device, candidates: int = 1
) -> Tensor:
    """Room for a block of logits of the dense model and of one or two candidates at a time.

    `(2 or 3, row, vocab)`, at most 80 MB each.
    """
    rows = max(16, ROW_BLOCK_ELEMENTS // len(readout.weight))
    shape = (1 + min(2, max(1, candidates)), min(rows, positions), len(readout.weight))
    return torch.empty(shape, dtype=torch.float32, device=device)


def _rows(z: Tensor, y: Tensor, settings: Settings) -> Tensor:
    return reduce_rows(z, y, settings, leaders(z, settings.top_k))


# --- masks and errors --------------------------------------------------------------------------


def _masked_rows(z: Tensor, y: Tensor, settings: Settings) -> Tensor:
    """Rows that hold -inf, one at a time: tokens masked in both leave the vocabulary."""
    rows = [_masked_row(a, b, settings) for a, b in zip(z, y, strict=True)]
    return torch.stack(rows)


def _masked_row(z: Tensor, y: Tensor, settings: Settings) -> Tensor:
    hidden, hidden_candidate = torch.isneginf(z), torch.isneginf(y)
    keep = ~(hidden & hidden_candidate)
    lost, gained = hidden_candidate & ~hidden, hidden & ~hidden_candidate
    floor = -1e4 * settings.temperature  # exp of it is 0
    z, y = z.masked_fill(hidden, floor)[keep], y.masked_fill(hidden_candidate, floor)[keep]
    row = _rows(z[None], y[None], settings)[0]
    if bool(lost.any()) or bool(gained.any()):
        unknown = [i for i, n in enumerate(FIGURES) if n.endswith(("_z", "_paper", "_corrected"))]
        unknown += [FIGURES.index(n) for n in ("var_p", "var_r", "var_uniform", "third_cumulant")]
        unknown += [FIGURES.index(n) for n in ("validity", "angular_p_estimate", "kl_estimate")]
        row[unknown] = math.nan
        row[FIGURES.index("kl")] = math.inf if bool(lost.any()) else row[FIGURES.index("kl")]
        reverse = FIGURES.index("kl_reverse")
        row[reverse] = math.inf if bool(gained.any()) else row[reverse]
    return row


def _check(dense: Tensor, candidate: Tensor, temperature: float, top_k: int) -> None:
    if dense.shape != candidate.shape:
        raise ValueError(
            f"dense logits are {tuple(dense.shape)}, candidate logits {tuple(candidate.shape)}: "
            "the same positions over the same vocabulary are needed"
        )
    if dense.ndim < 1 or dense.shape[-1] <= top_k:
        raise ValueError(f"a vocabulary of more than top_k={top_k} tokens is needed")
    _check_temperature(temperature)
    for name, logits in (("dense", dense), ("candidate", candidate)):
        if logits.numel() and not bool(logits.amax() < math.inf):  # NaN compares false
            raise ValueError(f"{name} logits hold NaN or +inf; -inf (a masked token) is allowed")


def _check_temperature(temperature: float) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}; it must be finite and above 0")


def _check_states(
    dense: Tensor,
    candidates: Sequence[Tensor],
    readout: Readout,
    candidate_readout: Readout,
    temperature: float,
    top_k: int,
) -> None:
    _check_temperature(temperature)
    if len(readout.weight) != len(candidate_readout.weight):
        raise ValueError(
            f"vocabularies of {len(readout.weight)} and {len(candidate_readout.weight)} tokens: "
            "logits of different vocabularies are not comparable"
        )
    if len(readout.weight) <= top_k:
        raise ValueError(f"a vocabulary of more than top_k={top_k} tokens is needed")
    for name, states in (("dense", dense), *(("candidate", c) for c in candidates)):
        if states.shape != dense.shape or states.ndim != 2:
            raise ValueError(
                f"{name} states are {tuple(states.shape)}; (position, d_model) as the dense "
                f"{tuple(dense.shape)} is needed"
            )
        if not bool(torch.isfinite(states).all()):
            raise ValueError(f"{name} states hold NaN or infinite values")
