"""Every per-position figure of a pair of logit rows, exactly, without storing the logits.

Logits are made in row blocks of bounded size and reduced at once; each row is read a few times
while it is in cache. Three things make float32 enough:

* the log-normaliser ratio c = log E_p[exp(dz/T)] is corrected until E_p[p'/p] = 1 holds, so that
  u = log p'/p = dz/T - c is right to its own scale and not only to that of the logits;
* every divergence is a sum of non-negative terms in a = |u|, weighted by the larger of p and p'.
  Nothing cancels, nothing overflows: two exponentials per element, exp(max(log p, log p')) and
  expm1(-a), carry all of them;
* moments are centred before they are squared, each under its own weights.

The names and formulas are those of the README's table (z: logits, p = softmax(z/T), dense first).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..analysis import formulas

TOP_K = 10
ROW_BLOCK_ELEMENTS = 16_000_000  # one block of logits of one model: 64 MB in float32
CACHE_ELEMENTS = 320_000  # elements reduced at a time, so that temporaries stay in cache
GROUP = 64  # tokens whose maximum stands for them while the top k are searched
CORRECTIONS = 4  # at most so many corrections of c; one is rarely needed
TOLERANCE = 1e-5  # of c, against the scale of u

FIGURES = (
    "cosine_z", "angular_z", "parallel_z", "orthogonal_z",
    "cosine_p", "angular_p", "parallel_p", "orthogonal_p",
    "kl", "kl_reverse", "js", "tv",
    "var_p", "var_r", "var_uniform", "third_cumulant", "validity",
    "flip", "margin", "overlap", "entropy", "entropy_candidate",
    "angular_z_paper", "angular_z_corrected", "angular_p_estimate", "kl_estimate",
)  # fmt: skip
"""Names of the figures, in the order in which they are returned."""

Figures = dict[str, Tensor]


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
    _keep_freed_memory()
    settings = _Settings(float(temperature), top_k, compiled)
    blocks: list[Tensor] = []
    for z, y in zip(rows.split(settings.rows(rows)), other.split(settings.rows(rows)), strict=True):
        z, y = z.float(), y.float()
        masked = bool(torch.minimum(z.amin(), y.amin()) == -math.inf)
        blocks.append(_masked_rows(z, y, settings) if masked else _reduce(z, y, settings))
    stacked = (
        torch.cat(blocks) if blocks else rows.new_zeros((0, len(FIGURES)), dtype=torch.float64)
    )
    return {name: column.reshape(shape) for name, column in zip(FIGURES, stacked.T, strict=True)}


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
        block: positions whose logits are held at a time (default: 64 MB of them for each model).
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


@torch.no_grad()
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
) -> list[Figures]:
    """As `compare_states` for several candidate states, making the dense logits only once.

    A candidate whose states and readout equal the dense ones costs no product: its shifts are
    exactly zero.
    """
    _check_states(dense, candidates, readout, candidate_readout, temperature, top_k)
    _keep_freed_memory()
    settings = _Settings(float(temperature), top_k, compiled)
    vocab, same_readout = len(readout.weight), readout.same(candidate_readout)
    block = block or max(16, ROW_BLOCK_ELEMENTS // vocab)
    space = dense.new_empty((2, min(block, len(dense)), vocab), dtype=torch.float32)
    done: list[list[Tensor]] = [[] for _ in candidates]
    for start in range(0, len(dense), block):
        here = slice(start, start + block)
        z = readout.logits(readout.states(dense[here]), space[0])
        for columns, states in zip(done, candidates, strict=True):
            if same_readout and torch.equal(states[here], dense[here]):
                y = z
            else:
                y = candidate_readout.logits(candidate_readout.states(states[here]), space[1])
            columns.append(_reduce_block(z, y, settings))
    return [dict(zip(FIGURES, torch.cat(columns).T, strict=True)) for columns in done]


def _keep_freed_memory() -> None:
    """Let glibc recycle temporaries.

    Until it has seen one large block freed it hands every temporary back to the system, and the
    page faults of getting it again cost several times the arithmetic.
    """
    block = torch.empty(31 * 2**18)
    del block


# --- the reduction -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    temperature: float
    top_k: int
    compiled: bool

    def rows(self, logits: Tensor) -> int:
        """Rows that are reduced together."""
        elements = CACHE_ELEMENTS if logits.device.type == "cpu" else 16 * ROW_BLOCK_ELEMENTS
        return max(1, elements // max(1, logits.shape[-1]))


def _reduce_block(z: Tensor, y: Tensor, settings: _Settings) -> Tensor:
    step = settings.rows(z)
    if z is y:
        return torch.cat([_unshifted(z[i : i + step], settings) for i in range(0, len(z), step)])
    return torch.cat(
        [_reduce(z[i : i + step], y[i : i + step], settings) for i in range(0, len(z), step)]
    )


def _reduce(z: Tensor, y: Tensor, settings: _Settings) -> Tensor:
    """`(row, figure)` in float64 of finite float32 logits `(row, vocab)`."""
    T = settings.temperature
    first, second = _passes(settings.compiled)
    top, top_index = _leaders(z, settings.top_k)
    best, best_index = _leaders(y, settings.top_k)
    rows = _rows(top, best, first(z, y, top_index[:, :1], best_index[:, :1], T), T)
    sums = second(z, y, *_arguments(rows, T), T)
    for _ in range(CORRECTIONS):
        gap, drift = sums[0].double(), sums[1].double()
        if bool((drift.abs() <= TOLERANCE * gap).all()):
            break
        rows["c"] = rows["c"] + torch.log1p(drift)
        sums = second(z, y, *_arguments(rows, T), T)
    heads = {
        "flip": (top_index[:, 0] != best_index[:, 0]).double(),
        "margin": (top[:, 0] - top[:, 1]).double(),
        "overlap": (top_index[:, :, None] == best_index[:, None, :]).any(-1).double().mean(-1),
    }
    figures = _assemble(rows, [s.double() for s in sums], T) | heads
    return torch.stack([figures[name] for name in FIGURES], dim=-1)


def _unshifted(z: Tensor, settings: _Settings) -> Tensor:
    """`_reduce(z, z)`: every shift is exactly zero, only the entropy and the margin need the row."""
    top, index = _leaders(z, settings.top_k)
    lz = (z - top[:, :1]).div_(settings.temperature)
    e = torch.exp(lz)
    e_lz = _dot(e, lz).double()
    rest = e.scatter_(1, index[:, :1], 0.0).sum(-1).double()
    row = torch.zeros((len(z), len(FIGURES)), dtype=torch.float64, device=z.device)
    entropy = torch.log1p(rest) - e_lz / (1 + rest)
    for name in ("entropy", "entropy_candidate"):
        row[:, FIGURES.index(name)] = entropy
    for name in ("cosine_z", "cosine_p", "overlap"):
        row[:, FIGURES.index(name)] = 1.0
    row[:, FIGURES.index("margin")] = (top[:, 0] - top[:, 1]).double()
    return row


def _first_pass(
    z: Tensor, y: Tensor, top_index: Tensor, best_index: Tensor, T: float
) -> tuple[Tensor, ...]:
    """Normalisers, entropies and means of dz: ten sums over the vocabulary, per row."""
    d = y - z
    lz = (z - z.gather(1, top_index)).div_(T)
    e = torch.exp(lz)
    e_lz, e_d = _dot(e, lz), _dot(e, d)
    zd = _dot(z, d)
    ee = torch.mul(e, e, out=lz)
    ee_, ee_d = ee.sum(-1), _dot(ee, d)
    ly = torch.sub(y, y.gather(1, best_index), out=lz).div_(T)
    # The largest token is left out: its weight is exactly 1, and a saturated distribution keeps
    # all the digits of what is not on that token.
    rest_w = e.scatter_(1, top_index, 0.0).sum(-1)
    v = torch.exp(ly, out=e)
    v_ly = _dot(v, ly)
    rest_v = v.scatter_(1, best_index, 0.0).sum(-1)
    return rest_w, rest_v, e_lz, v_ly, e_d, ee_, ee_d, d.mean(-1), _dot(z, z), zd


def _rows(top: Tensor, best: Tensor, sums: tuple[Tensor, ...], T: float) -> dict[str, Tensor]:
    """What the first pass says of each row, in float64."""
    rest_w, rest_v, e_lz, v_ly, e_d, ee, ee_d, mean_u, zz, zd = (s.double() for s in sums)
    log_w, log_v = torch.log1p(rest_w), torch.log1p(rest_v)
    return {
        "top": top[:, 0].double(),
        "best": best[:, 0].double(),
        "log_w": log_w,
        "log_v": log_v,
        "c": (best[:, 0].double() - top[:, 0].double()) / T + (log_v - log_w),
        "shift": (e_d / (1 + rest_w)).float().double(),
        "mean_p": e_d / (1 + rest_w),
        "mean_r": ee_d / ee,
        "mean_u": mean_u,
        "zz": zz,
        "alpha": zd / zz,
        "entropy": log_w - e_lz / (1 + rest_w),
        "entropy_candidate": log_v - v_ly / (1 + rest_v),
    }


def _arguments(rows: dict[str, Tensor], T: float) -> list[Tensor]:
    """Row constants of the second pass, `(row, 1)` float32, relative to the shift of dz."""
    shift = rows["shift"]
    mean_x = rows["mean_r"] / T - rows["c"]  # E_r[u]
    constants = [
        *(rows[k] for k in ("top", "best", "log_w", "log_v")),
        shift, rows["c"] * T - shift,
        *(rows[k] - shift for k in ("mean_p", "mean_r", "mean_u")), rows["alpha"],
        mean_x.clamp(max=0).exp(), (-mean_x.clamp(min=0)).exp(),
    ]  # fmt: skip
    return [constant.float()[:, None] for constant in constants]


def _second_pass(
    z: Tensor,
    y: Tensor,
    top: Tensor,
    best: Tensor,
    log_w: Tensor,
    log_v: Tensor,
    shift: Tensor,
    c: Tensor,
    mean_p: Tensor,
    mean_r: Tensor,
    mean_u: Tensor,
    alpha: Tensor,
    shrink_p: Tensor,
    shrink_q: Tensor,
    T: float,
) -> tuple[Tensor, ...]:
    """Everything that needs the normalisers: sums over the vocabulary, per row.

    With a = |log p'/p| each divergence is a sum of max(p, p') f(a) with f >= 0, and `rises` (1 where
    p' is the larger, else 0) says whose share is whose. Branches are written as arithmetic, since
    a select costs as much as an exponential, and temporaries are overwritten, since memory does too.
    """
    d = y - z
    back = d - y
    lost = (d - back).neg_().add_(y).sub_(back.add_(z))  # what y - z rounded away, exactly
    d.sub_(shift).add_(lost)
    across = torch.addcmul(d + shift, alpha.neg(), z).square_().sum(-1)
    del back, lost
    p = ((z - top) / T).sub_(log_w).exp_()
    q = ((y - best) / T).sub_(log_v).exp_()
    masses = p.sum(-1), _dot(p, p), _dot(q, q), _dot(p, q)

    u = (d - c).div_(T)
    sign = torch.sign(u)
    rises = sign.add(1).div_(2)
    a = u.abs_()
    high = torch.maximum(p, q)
    # share = exp(-a) - 1 + a without cancellation: its series up to b = min(a, 1/4), then on from b
    b = a.clamp(max=0.25)
    share = b.mul(1 / 720).sub_(1 / 120).mul_(b).add_(1 / 24).mul_(b).sub_(1 / 6).mul_(b).add_(0.5)
    share.mul_(b).mul_(b)
    w = b - share  # 1 - exp(-b), and from here to 1 - exp(-a)
    beyond = a - b
    step = torch.expm1(beyond.neg()).mul_(w - 1)
    w.add_(step)
    share.add_(beyond.sub_(step))
    aw = a * w
    gap = high * w
    up = rises.mul_(high)
    down = high - up
    other = aw - share
    kl = _dot(down, share) + _dot(up, other)
    kl_reverse = _dot(down, other) + _dot(up, share)
    gaps = gap.sum(-1), _dot(gap, sign), _dot(gap.mul_(sign), p)
    e = a.clamp_(max=80.0)  # where exp(-a) still squares within float32; js is flat beyond
    log_cosh = (w * w).div_(torch.exp(-e)).div_(4).log1p_()
    js = _dot(high, e.mul_(w).sub_(log_cosh.mul_(w.neg_().add_(2)))) / 4
    del u, sign, rises, a, high, b, share, w, beyond, step, aw, gap, up, down, other, e, log_cosh

    x = d - mean_p
    px = p * x
    pxx = px * x
    moments = px.sum(-1), pxx.sum(-1), _dot(pxx, x)
    xr = torch.sub(d, mean_r, out=x)
    ppx = torch.mul(p, p, out=px).mul_(xr)
    collision = ppx.sum(-1), _dot(ppx, xr)
    turn = torch.sign(xr)
    weight = torch.maximum(p * shrink_p, q.mul_(shrink_q)).mul_(turn)
    residual = torch.expm1(xr.abs_().div_(-T)).neg_().mul_(weight)
    angle = _dot(p, residual), _dot(residual, residual)
    xu = d.sub_(mean_u)
    uniform = xu.mean(-1), _dot(xu, xu) / xu.shape[-1]
    return (*gaps, kl, kl_reverse, js, *masses, *moments, *collision, *angle, *uniform, across)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1)


def _assemble(rows: dict[str, Tensor], sums: list[Tensor], T: float) -> Figures:
    """The figures of each row from its sums, in float64."""
    (gap, drift, p_signed, kl, kl_reverse, js, p, pp, qq, pq, px, pxx, pxxx,
     ppx, ppxx, p_residual, residual2, mean_u, uniform, across) = sums  # fmt: skip
    mean, second = px / p, pxx / p
    var_p = second - mean**2
    third = pxxx / p - 3 * mean * second + 2 * mean**3
    var_r = ppxx / pp - (ppx / pp) ** 2
    mean_x = rows["mean_r"] / T - rows["c"]
    orthogonal_p = ((residual2 / pp - (p_residual / pp) ** 2).clamp(min=0)).sqrt()
    orthogonal_p = orthogonal_p * mean_x.clamp(min=0).exp()
    alpha, alpha_p = rows["alpha"], (p_signed / pp - drift) / (1 + drift)
    orthogonal_z = (across / rows["zz"]).sqrt()
    angular_z = formulas.angular_exact(alpha, orthogonal_z)
    angular_p = formulas.angular_exact(pq / pp - 1, orthogonal_p)
    return {
        "cosine_z": 1 - angular_z,
        "angular_z": angular_z,
        "parallel_z": alpha.abs(),
        "orthogonal_z": orthogonal_z,
        "cosine_p": pq / (pp * qq).sqrt(),
        "angular_p": angular_p,
        "parallel_p": alpha_p.abs(),
        "orthogonal_p": orthogonal_p,
        "kl": kl,
        "kl_reverse": kl_reverse,
        "js": js,
        "tv": gap / 2,
        "var_p": var_p,
        "var_r": var_r,
        "var_uniform": uniform - mean_u**2,
        "third_cumulant": third,
        "validity": formulas.validity(var_p, third, T),
        "entropy": rows["entropy"],
        "entropy_candidate": rows["entropy_candidate"],
        "angular_z_paper": formulas.angular_paper(orthogonal_z),
        "angular_z_corrected": formulas.angular_corrected(alpha, orthogonal_z),
        "angular_p_estimate": formulas.angular_p_estimate(var_r, T),
        "kl_estimate": formulas.kl_estimate(var_p, T),
    }


@cache
def _passes(compiled: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if not compiled:
        return _first_pass, _second_pass
    return torch.compile(_first_pass, dynamic=True), torch.compile(_second_pass, dynamic=True)


# --- the largest tokens ------------------------------------------------------------------------


def _leaders(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and where they stand, the lower index first among equals.

    A group of tokens whose maximum is not among the k largest maxima holds none of the k largest
    tokens, so only k groups are searched.
    """
    rows, vocab = logits.shape
    if vocab <= 2 * GROUP * k:
        return _ordered(logits, torch.arange(vocab, device=logits.device).expand(rows, -1), k)
    whole = vocab // GROUP * GROUP
    maxima = logits[:, :whole].unflatten(-1, (-1, GROUP)).amax(-1)
    _, groups = _ordered(
        maxima, torch.arange(maxima.shape[1], device=logits.device).expand(rows, -1), k
    )
    inside = torch.arange(GROUP, device=logits.device)
    index = (groups.sort(-1).values[:, :, None] * GROUP + inside).flatten(1)
    tail = torch.arange(whole, vocab, device=logits.device).expand(rows, -1)
    index = torch.cat([index, tail], dim=-1)
    return _ordered(logits.gather(1, index), index, k)


def _ordered(values: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top k of `(row, n)` values; `index` must rise along each row. Ties go to the lower place."""
    bits = values.contiguous().view(torch.int32)
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # orders as the floats do
    places = torch.arange(values.shape[-1], device=values.device)
    key = (rising << 32) - places
    found = key.topk(k, dim=-1).indices
    return values.gather(1, found), index.gather(1, found)


# --- masks and errors --------------------------------------------------------------------------


def _masked_rows(z: Tensor, y: Tensor, settings: _Settings) -> Tensor:
    """Rows that hold -inf, one at a time: tokens masked in both leave the vocabulary."""
    rows = [_masked_row(a, b, settings) for a, b in zip(z, y, strict=True)]
    return torch.stack(rows)


def _masked_row(z: Tensor, y: Tensor, settings: _Settings) -> Tensor:
    hidden, hidden_candidate = torch.isneginf(z), torch.isneginf(y)
    keep = ~(hidden & hidden_candidate)
    lost, gained = hidden_candidate & ~hidden, hidden & ~hidden_candidate
    floor = -1e4 * settings.temperature  # exp of it is 0
    z, y = z.masked_fill(hidden, floor)[keep], y.masked_fill(hidden_candidate, floor)[keep]
    row = _reduce(z[None], y[None], settings)[0]
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
