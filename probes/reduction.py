"""The reduction of two blocks of logits to figures, row by row, while they are in cache.

Three things make float32 enough:

* the log-normaliser ratio c = log E_p[exp(dz/T)] is corrected until E_p[p'/p] = 1 holds, so that
  u = log p'/p = dz/T - c is right to its own scale and not only to that of the logits;
* every divergence is a sum of non-negative terms in a = |u|, weighted by the larger of p and p':
  nothing cancels and nothing overflows;
* moments are centred before they are squared, each under its own weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..analysis import formulas

CACHE_ELEMENTS = 320_000  # elements reduced at a time, so that temporaries stay in cache
ACCELERATOR_ELEMENTS = 256_000_000  # the same where memory is not a cache
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


def keep_freed_memory() -> None:
    """Let glibc recycle temporaries.

    Until it has seen one large block freed it hands every temporary back to the system, and the
    page faults of getting it again cost several times the arithmetic.
    """
    block = torch.empty(31 * 2**18)
    del block


# --- the reduction -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How rows are reduced."""

    temperature: float
    top_k: int
    compiled: bool

    def rows(self, logits: Tensor) -> int:
        """Rows that are reduced together."""
        elements = CACHE_ELEMENTS if logits.device.type == "cpu" else ACCELERATOR_ELEMENTS
        return max(1, elements // max(1, logits.shape[-1]))


def reduce_block(z: Tensor, y: Tensor, settings: Settings) -> Tensor:
    """`(row, figure)` in float64 of a block of logits, a few rows at a time."""
    step = settings.rows(z)
    if z is y:
        return torch.cat([_unshifted(z[i : i + step], settings) for i in range(0, len(z), step)])
    return torch.cat(
        [reduce_rows(z[i : i + step], y[i : i + step], settings) for i in range(0, len(z), step)]
    )


def reduce_rows(z: Tensor, y: Tensor, settings: Settings) -> Tensor:
    """`(row, figure)` in float64 of finite float32 logits `(row, vocab)`."""
    T = settings.temperature
    first, second = _passes(settings.compiled)
    top, top_index = leaders(z, settings.top_k)
    best, best_index = leaders(y, settings.top_k)
    rows = _rows(top, best, first(z, y, top_index[:, :1], best_index[:, :1], T), T)
    sums = second(z, y, _constants(rows, T), T)
    for _ in range(CORRECTIONS):
        gap, drift = sums[0].double(), sums[1].double()
        if bool((drift.abs() <= TOLERANCE * gap).all()):
            break
        rows["c"] = rows["c"] + torch.log1p(drift)
        sums = second(z, y, _constants(rows, T), T)
    heads = {
        "flip": (top_index[:, 0] != best_index[:, 0]).double(),
        "margin": (top[:, 0] - top[:, 1]).double(),
        "overlap": (top_index[:, :, None] == best_index[:, None, :]).any(-1).double().mean(-1),
    }
    figures = _assemble(rows, [s.double() for s in sums], T) | heads
    return torch.stack([figures[name] for name in FIGURES], dim=-1)


def _unshifted(z: Tensor, settings: Settings) -> Tensor:
    """`reduce_rows(z, z)`: every shift is exactly zero, only the entropy and the margin need the row."""
    top, index = leaders(z, settings.top_k)
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
    """Normalisers, entropies and means of dz: eleven sums over the vocabulary, per row."""
    d = y - z
    lz = (z - z.gather(1, top_index)).div_(T)
    e = torch.exp(lz)
    e_lz, e_d = _dot(e, lz), _dot(e, d)
    zd, zy = _dot(z, d), _dot(z, y)
    ee = torch.mul(e, e, out=lz)
    ee_, ee_d = ee.sum(-1), _dot(ee, d)
    ly = torch.sub(y, y.gather(1, best_index), out=lz).div_(T)
    # The largest token is left out: its weight is exactly 1, and a saturated distribution keeps
    # all the digits of what is not on that token.
    rest_w = e.scatter_(1, top_index, 0.0).sum(-1)
    v = torch.exp(ly, out=e)
    v_ly = _dot(v, ly)
    rest_v = v.scatter_(1, best_index, 0.0).sum(-1)
    return rest_w, rest_v, e_lz, v_ly, e_d, ee_, ee_d, d.mean(-1), _dot(z, z), zd, zy


def _rows(top: Tensor, best: Tensor, sums: tuple[Tensor, ...], T: float) -> dict[str, Tensor]:
    """What the first pass says of each row, in float64."""
    rest_w, rest_v, e_lz, v_ly, e_d, ee, ee_d, mean_u, zz, zd, zy = (s.double() for s in sums)
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
        # 1 + alpha, from whichever sum does not cancel in it
        "k": torch.where(zd.abs() < zz / 2, 1 + zd / zz, zy / zz),
        "entropy": log_w - e_lz / (1 + rest_w),
        "entropy_candidate": log_v - v_ly / (1 + rest_v),
    }


class _Constants(NamedTuple):
    """Row constants of the second pass, `(row, 1)` float32, relative to the common shift of dz."""

    top: Tensor
    best: Tensor
    log_w: Tensor
    log_v: Tensor
    shift: Tensor
    c: Tensor
    mean_p: Tensor
    mean_r: Tensor
    mean_u: Tensor
    alpha: Tensor
    shrink_p: Tensor  # with shrink_q brings exp(u - E_r[u]) under 1 from either side
    shrink_q: Tensor


def _constants(rows: dict[str, Tensor], T: float) -> _Constants:
    shift = rows["shift"]
    mean_x = rows["mean_r"] / T - rows["c"]  # E_r[u]
    values = [
        *(rows[k] for k in ("top", "best", "log_w", "log_v")),
        shift, rows["c"] * T - shift,
        *(rows[k] - shift for k in ("mean_p", "mean_r", "mean_u")), rows["alpha"],
        mean_x.clamp(max=0).exp(), (-mean_x.clamp(min=0)).exp(),
    ]  # fmt: skip
    return _Constants(*(value.float()[:, None] for value in values))


def _second_pass(z: Tensor, y: Tensor, k: _Constants, T: float) -> tuple[Tensor, ...]:
    """Everything that needs the normalisers: sums over the vocabulary, per row.

    Here and below branches are written as arithmetic, since a select costs as much as an
    exponential, and temporaries are overwritten, since memory does too.
    """
    d = y - z
    back = d - y
    lost = (d - back).neg_().add_(y).sub_(back.add_(z))  # what y - z rounded away, exactly
    d.sub_(k.shift).add_(lost)
    across = torch.addcmul(d + k.shift, k.alpha.neg(), z).square_().sum(-1)
    del back, lost
    p = ((z - k.top) / T).sub_(k.log_w).exp_()
    q = ((y - k.best) / T).sub_(k.log_v).exp_()
    masses = p.sum(-1), _dot(p, p), _dot(q, q), _dot(p, q)
    return (*_divergences((d - k.c).div_(T), p, q), *masses, *_moments(d, p, q, k, T), across)


def _divergences(u: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    """Sums of |p' - p|, p' - p, p (p' - p), and KL, reverse KL, JS, from u = log p'/p.

    With a = |u| each is a sum of max(p, p') f(a), f >= 0; `rises` (1 where p' is the larger, else
    0) says whose share is whose.
    """
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
    other = (a * w).sub_(share)
    gap = high * w
    up = rises.mul_(high)
    down = high - up
    kl = _dot(down, share) + _dot(up, other)
    kl_reverse = _dot(down, other) + _dot(up, share)
    gaps = gap.sum(-1), _dot(gap, sign), _dot(gap.mul_(sign), p)
    e = a.clamp_(max=80.0)  # where exp(-a) still squares within float32; js is flat beyond
    log_cosh = (w * w).div_(torch.exp(-e)).div_(4).log1p_()  # twice log cosh(a/2)
    js = _dot(high, e.mul_(w).sub_(log_cosh.mul_(w.neg_().add_(2)))) / 4
    return (*gaps, kl, kl_reverse, js)


def _moments(d: Tensor, p: Tensor, q: Tensor, k: _Constants, T: float) -> tuple[Tensor, ...]:
    """Centred moments of dz under p, r and uniform weights, and the angle of p' across p.

    Overwrites `d` and `q`.
    """
    x = d - k.mean_p
    px = p * x
    pxx = px * x
    moments = px.sum(-1), pxx.sum(-1), _dot(pxx, x)
    xr = torch.sub(d, k.mean_r, out=x)
    ppx = torch.mul(p, p, out=px).mul_(xr)
    collision = ppx.sum(-1), _dot(ppx, xr)
    turn = torch.sign(xr)
    weight = torch.maximum(p * k.shrink_p, q.mul_(k.shrink_q)).mul_(turn)
    residual = torch.expm1(xr.abs_().div_(-T)).neg_().mul_(weight)
    angle = _dot(p, residual), _dot(residual, residual)
    xu = d.sub_(k.mean_u)
    return (*moments, *collision, *angle, xu.mean(-1), _dot(xu, xu) / xu.shape[-1])


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
    angular_z = formulas.angular_exact(rows["k"], orthogonal_z)
    angular_p = formulas.angular_exact(pq / pp, orthogonal_p)
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


def leaders(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
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
    bits = values.add(0.0).view(torch.int32)  # -0 and 0 are equal
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # orders as the floats do
    places = torch.arange(values.shape[-1], device=values.device)
    key = (rising << 32) - places
    found = key.topk(k, dim=-1).indices
    return values.gather(1, found), index.gather(1, found)
