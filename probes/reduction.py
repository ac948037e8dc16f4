"""The reduction of two blocks of logits to figures, row by row, while they are in cache.

Three things make float32 enough:

* the log-normaliser ratio c = log E_p[exp(dz/T)] is corrected until E_p[p'/p] = 1 holds, so that
  u = log p'/p = dz/T - c is right to its own scale and not only to that of the logits;
* every divergence is a sum of terms that are not negative, each from a series where u is small:
  nothing cancels and nothing overflows;
* moments are centred before they are squared, each under its own weights.
"""

from __future__ import annotations

import ctypes
import logging
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from threading import Barrier
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..analysis import formulas

BLOCK_ELEMENTS = 4_000_000  # elements whose rows are reduced together: the second pass finds them
PLAIN_ELEMENTS = 20_000_000  # the same unfused, where they are divided among threads
CACHE_ELEMENTS = 200_000  # elements that one thread takes at a time: temporaries stay in cache
ACCELERATOR_ELEMENTS = 256_000_000  # all three, where memory is not a cache
TILE = 1024  # tokens that a fused pass sums in float32, in registers, before float64 takes over
NEAR = 0.25  # a series up to here, differences and logarithms beyond
GROUP = 64  # tokens whose maximum stands for them while the top k are searched
FUSED_FROM = 1_000_000_000  # pairs of logits: from here on compiling takes less time than it saves
CORRECTIONS = 4  # at most so many corrections of c; one is rarely needed
LOG2_E = 1.4426950408889634
TOLERANCE = 1e-5  # of c, against the scale of u

LOGGER = logging.getLogger(__name__)

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


@cache
def keep_freed_memory() -> None:
    """Let glibc recycle temporaries.

    By itself it hands many of them back to the system, and the page faults of getting them again
    cost as much as the arithmetic. Blocks of 32 MB and more are handed back as before.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # as in malloc.h
        mallopt(trim_threshold, 2**30)
        mallopt(mmap_threshold, 2**25)


# --- the reduction -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How rows are reduced."""

    temperature: float
    top_k: int
    compiled: bool

    def rows(self, logits: Tensor) -> int:
        """Rows that are reduced together."""
        most = BLOCK_ELEMENTS if self.compiled else PLAIN_ELEMENTS
        most = most if logits.device.type == "cpu" else ACCELERATOR_ELEMENTS
        return even(len(logits), most // max(1, logits.shape[-1]))


def even(positions: int, most: int) -> int:
    """Rows of a block so that all blocks are about as long: a short one wastes what a block costs."""
    blocks = max(1, math.ceil(positions / max(1, most)))
    return max(1, math.ceil(positions / blocks))


Leaders = tuple[Tensor, Tensor]


def reduce_block(z: Tensor, y: Tensor, settings: Settings, first: Leaders) -> Tensor:
    """`(row, figure)` in float64 of a block of logits and the `leaders` of `z`, a few rows at a time."""
    step, parts = settings.rows(z), []
    for start in range(0, len(z), step):
        here = slice(start, start + step)
        top = first[0][here], first[1][here]
        parts.append(
            _unshifted(z[here], settings, top) if z is y
            else reduce_rows(z[here], y[here], settings, top)
        )  # fmt: skip
    return torch.cat(parts)


def reduce_rows(z: Tensor, y: Tensor, settings: Settings, first: Leaders) -> Tensor:
    """`(row, figure)` in float64 of finite float32 logits `(row, vocab)`."""
    T = settings.temperature
    top, top_index = first
    best, best_index = leaders(y, settings.top_k)
    shift = y.gather(1, top_index[:, :1]) - top[:, :1]
    ends = _Ends(top[:, :1], best[:, :1], shift, torch.full_like(shift, 1 / T))
    if settings.compiled:
        rows, sums = _fused_passes(z, y, ends, T)
    else:
        rows, sums = _plain_passes(z, y, ends, (top_index[:, :1], best_index[:, :1]), T)
    heads = {
        "flip": (top_index[:, 0] != best_index[:, 0]).double(),
        "margin": (top[:, 0] - top[:, 1]).double(),
        "overlap": (top_index[:, :, None] == best_index[:, None, :]).any(-1).double().mean(-1),
    }
    figures = _assemble(rows, sums, z.shape[-1], T) | heads
    return torch.stack([figures[name] for name in FIGURES], dim=-1)


def _unshifted(z: Tensor, settings: Settings, first: Leaders) -> Tensor:
    """`reduce_rows(z, z)`: every shift is exactly zero, only the entropy and the margin need the row."""
    top, index = first
    _, rest, e_lz = _distribution(z, top[:, :1], index[:, :1], settings.temperature)
    rest, e_lz = rest.double(), e_lz.double()
    row = torch.zeros((len(z), len(FIGURES)), dtype=torch.float64, device=z.device)
    entropy = torch.log1p(rest) - e_lz / (1 + rest)
    for name in ("entropy", "entropy_candidate"):
        row[:, FIGURES.index(name)] = entropy
    for name in ("cosine_z", "cosine_p", "overlap"):
        row[:, FIGURES.index(name)] = 1.0
    row[:, FIGURES.index("margin")] = (top[:, 0] - top[:, 1]).double()
    return row


# --- the two passes over the vocabulary --------------------------------------------------------

Sums = tuple[Tensor, ...]
Rows = dict[str, Tensor]


def _fused_passes(z: Tensor, y: Tensor, ends: _Ends, T: float) -> tuple[Rows, Tensor]:
    """What the first pass says of each row and the sums `(sum, row)` of the second, both compiled."""
    first, second = partial(_fused_sums, _first_pass), partial(_fused_sums, _second_pass)
    sums = first(z, y, ends)
    below, weighted = sums[0:4:2], sums[1:4:2]
    rests = z.shape[-1] - 1 + below - weighted
    rows = _rows(ends, torch.cat([rests, sums[4:]]), z.shape[-1], T)
    return rows, _corrected(second, z, y, rows, second(z, y, _constants(rows, T)), T)


def _fused_sums(kernel: Callable[..., Sums], z: Tensor, y: Tensor, constants: Any) -> Tensor:
    """The sums of a compiled pass over each row, float64 `(sum, row)`; unfused past the last whole tile."""
    alone = len(z) == 1  # a single row would be compiled for itself
    whole = 0 if alone else z.shape[-1] // TILE * TILE
    parts: list[Tensor] = []
    if whole:
        wide = type(constants)(*(value[:, :, None] for value in constants))
        tiles = (x[:, :whole].unflatten(-1, (-1, TILE)) for x in (z, y))
        parts.append(torch.stack(_fused(kernel)(*tiles, wide)).sum(-1, dtype=torch.float64))
    if whole < z.shape[-1]:
        parts.append(_plain_sums(kernel, z[:, whole:], y[:, whole:], constants))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _plain_sums(kernel: Callable[..., Sums], z: Tensor, y: Tensor, constants: Any) -> Tensor:
    """The sums of a pass over each row as it stands, float64 `(sum, row)`."""
    return torch.stack(kernel(z, y, constants)).double()


def _corrected(
    second: Callable[..., Tensor], z: Tensor, y: Tensor, rows: Rows, sums: Tensor, T: float
) -> Tensor:
    """The sums of the `second` pass with c corrected, in `rows` too, until p' sums to 1."""
    for _ in range(CORRECTIONS):
        gap, drift = sums[0], sums[1]
        off = torch.nonzero(drift.abs() > TOLERANCE * gap)[:, 0]
        if not len(off):
            break
        rows["c"][off] += torch.log1p(drift[off])
        some = _constants({name: value[off] for name, value in rows.items()}, T)
        sums[:, off] = second(z[off], y[off], some)
    return sums


def _plain_passes(
    z: Tensor, y: Tensor, ends: _Ends, places: tuple[Tensor, Tensor], T: float
) -> tuple[Rows, Tensor]:
    """`_fused_passes` without a compiler, so many rows at a time as the cache takes.

    `places` are those of the largest tokens. On several threads each takes rows of its own: an
    operation that is split over all of them waits for the slowest every time, and there are a hundred.
    """
    elements = CACHE_ELEMENTS if z.device.type == "cpu" else ACCELERATOR_ELEMENTS
    step = max(1, elements // z.shape[-1])

    @torch.no_grad()
    def part(start: int) -> tuple[Rows, Tensor]:
        here = slice(start, start + step)
        some = _Ends(*(value[here] for value in ends))
        rows, sums = _both_passes(z[here], y[here], some, (places[0][here], places[1][here]), T)
        return rows, _corrected(partial(_plain_sums, _second_pass), z[here], y[here], rows, sums, T)

    starts = range(0, len(z), step)
    threads = torch.get_num_threads() if z.device.type == "cpu" else 1
    alone = threads == 1 or len(starts) == 1
    done = list(map(part, starts) if alone else _crew(threads).map(part, starts))
    rows = {name: torch.cat([found[name] for found, _ in done]) for name in done[0][0]}
    return rows, torch.cat([sums for _, sums in done], dim=1)


@cache
def _crew(threads: int) -> ThreadPoolExecutor:
    """Threads that run operations undivided; those of other threads are divided as before."""
    ready = Barrier(threads + 1)

    def begin() -> None:
        torch.get_num_threads()  # else the first operation would set this thread's number anew
        torch.set_num_threads(1)
        ready.wait()

    crew = ThreadPoolExecutor(threads, "reduction", begin)
    for _ in range(threads):
        crew.submit(int)
    ready.wait()
    torch.set_num_threads(threads)  # for threads that begin later
    return crew


@cache
def fusible() -> bool:
    """Whether `torch.compile` works here (it needs a C++ compiler); tried once, on a few rows."""
    z = torch.zeros(2, 2 * TILE)
    z[:, 0], y = 1.0, torch.ones(2, 2 * TILE)
    try:
        reduce_rows(z, y, Settings(1.0, 2, True), leaders(z, 2))
    except Exception as error:  # whatever a compiler or its absence raises
        LOGGER.warning("torch.compile does not work here, measuring unfused: %s", error)
        return False
    return True


def worth_fusing(pairs: int) -> bool:
    """Whether so many pairs of logits are reduced faster by compiling first, where that works."""
    there = fusible.cache_info().currsize > 0
    return (there or pairs > FUSED_FROM) and fusible()


@cache
def _fused(kernel: Callable[..., Sums]) -> Callable[..., Sums]:
    """The pass as one loop over the vocabulary: nothing but its sums is stored."""
    options: dict[str, Any] = {
        "max_fusion_size": 10**6,
        "realize_opcount_threshold": 10**6,
        "realize_reads_threshold": 10**6,
        "realize_acc_reads_threshold": 10**6,
        "cpp.enable_floating_point_contract_flag": "fast",
    }
    return torch.compile(kernel, dynamic=True, options=options)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return (x * y).sum(-1)
    return torch.linalg.vecdot(x, y)


def _last_dot(x: Tensor, y: Tensor) -> Tensor:
    """`_dot` where `x` is not needed any more: it is overwritten."""
    return (x.mul_(y)).sum(-1)


def _polynomial(x: Tensor, *coefficients: float) -> Tensor:
    """A polynomial by Horner's rule, the highest power first."""
    highest, *rest = coefficients
    if torch.compiler.is_compiling():
        fused = x * highest + rest[0]
        for c in rest[1:]:
            fused = fused * x + c
        return fused
    first, *others = _scalars(tuple(rest), x.device)
    series = torch.add(first, x, alpha=highest)
    for c in others:
        torch.addcmul(c, series, x, out=series)
    return series


@cache
def _scalars(values: tuple[float, ...], device: torch.device) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float32, device=device) for value in values]


def _exp(x: Tensor) -> Tensor:
    """exp(x) for x <= 0, overwriting `x`.

    Fused, it is written out, since a call in the loop would send every sum to memory and back:
    2^n exp(f) with n whole and |f| <= log(2)/2.
    """
    if not torch.compiler.is_compiling():
        return x.exp_()
    n = torch.round(x.clamp(min=-87.0) * LOG2_E)
    f = (x.clamp(min=-87.0) - n * 0.693359375) + n * 2.12194440e-4
    series = 1 / 120 + f * (1 / 720 + f * (1 / 5040))
    series = 1 + f * (1 + f * (0.5 + f * (1 / 6 + f * (1 / 24 + f * series))))
    return series * ((n.to(torch.int32) + 127) << 23).view(torch.float32)


def _same(x: Tensor, y: Tensor) -> Tensor:
    """1 where x = y, else 0."""
    if torch.compiler.is_compiling():
        return x == y
    return torch.eq(x, y, out=torch.empty_like(x))  # floats: to make booleans takes longer


def _select(mask: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`x` where the mask of `_same` holds, else `y`, exactly. A plain select costs an exponential."""
    if torch.compiler.is_compiling():
        return torch.where(mask, x, y)
    return torch.lerp(y, x, mask, out=y)


class _Ends(NamedTuple):
    """Row constants of the first pass, `(row, 1)` float32."""

    top: Tensor
    best: Tensor
    shift: Tensor  # dz of the largest token, from which dz is counted
    inverse: Tensor


def _first_pass(z: Tensor, y: Tensor, k: _Ends) -> Sums:
    """Normalisers, entropies and means of dz/T.

    The largest token is left out of the normaliser (by its sign, 0, and those that equal it by
    their count): its weight is exactly 1, and a saturated distribution keeps all the digits of
    what is not on that token.
    """
    d = y - z
    dz = _dot(z, z), _dot(z, d), _dot(z, y)
    d.sub_(k.shift).mul_(k.inverse)
    lz = (z - k.top).mul_(k.inverse)
    e = _exp(lz.clone())
    e_lz, e_d = _dot(e, lz), _dot(e, d)
    below = torch.sign(lz)
    rest_w = below.sum(-1), _dot(e, below)
    e.mul_(e)
    collision = e.sum(-1), _dot(e, d)
    ly = (y - k.best).mul_(k.inverse)
    v = _exp(ly.clone())
    v_ly = _dot(v, ly)
    below = torch.sign(ly)
    return (*rest_w, below.sum(-1), _dot(v, below), e_lz, v_ly, e_d, *collision, d.sum(-1), *dz)


def _rows(ends: _Ends, sums: Tensor, vocab: int, T: float) -> Rows:
    """What the first pass says of each row, in float64; `rest` is a normaliser but for its largest term."""
    rest_w, rest_v, e_lz, v_ly, e_d, ee, ee_d, sum_d, zz, zd, zy = sums
    top, best, shift, _ = (value[:, 0].double() for value in ends)
    log_w, log_v = torch.log1p(rest_w), torch.log1p(rest_v)
    return {
        "top": top,
        "best": best,
        "log_w": log_w,
        "log_v": log_v,
        "shift": shift,
        "c": (best - top) / T + (log_v - log_w) - shift / T,
        "mean_p": e_d / (1 + rest_w),
        "mean_r": ee_d / ee,
        "mean_u": sum_d / vocab,
        "zz": zz,
        "alpha": zd / zz,
        "k": _one_plus(zd, zz, zy),
        "pp": ee / (1 + rest_w) ** 2,
        "entropy": log_w - e_lz / (1 + rest_w),
        "entropy_candidate": log_v - v_ly / (1 + rest_v),
    }


def _one_plus(part: Tensor, whole: Tensor, both: Tensor) -> Tensor:
    """1 + part/whole, where both = whole + part: from whichever does not cancel."""
    return torch.where(part.abs() < whole / 2, 1 + part / whole, both / whole)


class _Constants(NamedTuple):
    """Row constants of the second pass, `(row, 1)` float32, relative to the shift of the largest token."""

    inverse: Tensor
    top: Tensor
    best: Tensor
    log_w: Tensor
    log_v: Tensor
    shift: Tensor
    c: Tensor
    c_rest: Tensor  # what float32 drops of c: u of most tokens can be as small
    mean_p: Tensor
    mean_r: Tensor
    mean_u: Tensor
    alpha: Tensor
    shrink_p: Tensor  # with shrink_q brings exp(u - E_r[u]) under 1 from either side
    shrink_q: Tensor


def _constants(rows: Rows, T: float) -> _Constants:
    mean_x = rows["mean_r"] - rows["c"]  # E_r[u]
    values = [
        torch.full_like(mean_x, 1 / T),
        *(rows[k] for k in ("top", "best", "log_w", "log_v", "shift", "c")),
        rows["c"] - rows["c"].float(),
        *(rows[k] for k in ("mean_p", "mean_r", "mean_u", "alpha")),
        mean_x.clamp(max=0).exp(), (-mean_x.clamp(min=0)).exp(),
    ]  # fmt: skip
    return _Constants(*torch.stack(values).float()[:, :, None].unbind())


def _second_pass(z: Tensor, y: Tensor, k: _Constants) -> Sums:
    """Everything that needs the normalisers."""
    d, lost = _shift(z, y)
    across = _across(z, d, k.alpha)
    d.sub_(k.shift).add_(lost).mul_(k.inverse)
    p = _exp((z - k.top).mul_(k.inverse).sub_(k.log_w))
    q = _exp((y - k.best).mul_(k.inverse).sub_(k.log_v))
    return (*_second_sums(d, p, q, p * p, k), across)


def _second_sums(d: Tensor, p: Tensor, q: Tensor, square: Tensor, k: _Constants) -> Sums:
    """The second pass from dz/T, relative to the largest token's, both distributions, and p^2.

    Overwrites `d`, `q` and `square`. Unfused, every line here is a trip through the cache:
    temporaries are overwritten.
    """
    u = (d - k.c).sub_(k.c_rest)
    return (*_divergences(u, p, q), _dot(p, q), *_moments(d, p, q, square, k))


def _across(z: Tensor, d: Tensor, alpha: Tensor) -> Tensor:
    """|dz|^2 across z, where dz goes alpha z along it."""
    side = torch.addcmul(d, alpha.neg(), z)
    return _last_dot(side, side)


def _shift(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """y - z and what it rounded away, exactly."""
    d = y - z
    back = d - y
    lost = d - back
    lost.neg_().add_(y)
    return d, lost.sub_(back.add_(z))


def _both_passes(
    z: Tensor, y: Tensor, k: _Ends, places: tuple[Tensor, Tensor], T: float
) -> tuple[Rows, Tensor]:
    """Both passes over rows in cache: the second finds dz and the exponentials of the first there."""
    d, lost = _shift(z, y)
    dz = _dot(z, z), _dot(z, d), _dot(z, y)
    across = _across(z, d, (dz[1] / dz[0])[:, None])
    d.sub_(k.shift).add_(lost)
    if T != 1:
        d.mul_(k.inverse)
    p, rest_w, e_lz = _distribution(z, k.top, places[0], T)
    q, rest_v, v_ly = _distribution(y, k.best, places[1], T)
    square, w = p * p, 1 + rest_w
    means = _dot(p, d) * w, square.sum(-1) * w * w, _dot(square, d) * w * w, d.sum(-1)
    first = torch.stack((rest_w, rest_v, e_lz, v_ly, *means, *dz)).double()
    rows = _rows(k, first, z.shape[-1], T)
    second = (*_second_sums(d, p, q, square, _constants(rows, T)), across)
    return rows, torch.stack(second).double()


def _distribution(z: Tensor, top: Tensor, index: Tensor, T: float) -> tuple[Tensor, Tensor, Tensor]:
    """p, and of e = exp((z - top)/T) the sum without the largest token and the dot with (z - top)/T.

    By powers of two: a library's `exp` takes three times as long.
    """
    bits = (z - top).mul_(LOG2_E / T)
    e = torch.exp2(bits)
    weighted = _last_dot(bits, e) / LOG2_E
    rest = e.scatter_(1, index, 0.0).sum(-1)
    return e.scatter_(1, index, 1.0).mul_(1 / (1 + rest[:, None])), rest, weighted


def _share(b: Tensor) -> Tensor:
    """exp(b) - 1 - b without cancellation, |b| <= NEAR; least relative error, 1.4e-6."""
    return _polynomial(b, 0.00833746, 0.04175351, 0.16666696, 0.49999932).mul_(b).mul_(b)


def _log_cosh(b: Tensor) -> Tensor:
    """2 log cosh(b/2), |b| <= NEAR, overwriting `b`; least relative error, 1.4e-6."""
    b.mul_(b)
    return _polynomial(b, -0.01037344, 0.24999966).mul_(b)


def _short_of_line(gap: Tensor, both: Tensor) -> Tensor:
    """|u| - 2 log cosh(u/2) of u = log p'/p, from |p' - p| and p + p'.

    It is 4 artanh(s) with s in [0, 1/3]; polynomial of least relative error, 1.7e-7.
    """
    s = gap / torch.add(gap, both, alpha=2).clamp_(min=1e-37)
    x = s * s
    return _polynomial(x, 0.68444179, 0.79180484, 1.33351918, 3.99999935).mul_(s)


def _divergences(u: Tensor, p: Tensor, q: Tensor) -> Sums:
    """Sums of |p' - p|, p' - p, p (p' - p), and KL, reverse KL, JS, from u = log p'/p.

    KL is the sum of p (exp(u) - 1 - u), its reverse of p' (exp(-u) - 1 + u): terms that are not
    negative, from a series where u is small and from p' - p where it is not. So is JS, of
    ((p' - p) u - (p + p') L) / 4 with L = 2 log cosh(u/2), flat beyond |u| = 80.
    """
    b = u.clamp(-NEAR, NEAR)
    near = _same(b, u)
    share = _share(b).mul_(p)
    gap = _select(near, torch.addcmul(share, p, b), q - p)
    kl = _select(near, share, gap - p * u)
    some = u.clamp(-80.0, 80.0)
    moved = gap * some
    back = _select(near, moved - kl, (u.mul_(q)).sub_(gap))
    size, both = gap.abs(), p + q
    far = some.abs_().sub_(_short_of_line(size, both))
    js = moved.sub_(both.mul_(_select(near, _log_cosh(b), far)))
    gaps = size.sum(-1), gap.sum(-1), _last_dot(gap, p)
    return (*gaps, kl.sum(-1), back.sum(-1), js.sum(-1))


def _moments(d: Tensor, p: Tensor, q: Tensor, square: Tensor, k: _Constants) -> Sums:
    """Centred moments of dz/T under p, r and uniform weights, and the angle of p' across p.

    Overwrites `d`, `q` and `square`.
    """
    x = d - k.mean_p
    px = p * x
    pxx = px * x
    moments = px.sum(-1), pxx.sum(-1), _last_dot(pxx, x)
    xr = d - k.mean_r
    ppx = square.mul_(xr)
    collision = ppx.sum(-1), _last_dot(ppx, xr)
    b = xr.clamp(-NEAR, NEAR)
    shrunk = p * k.shrink_p
    near = _same(b, xr)
    residual = _select(near, _share(b).add_(b).mul_(shrunk), q.mul_(k.shrink_q).sub_(shrunk))
    angle = _dot(p, residual), _last_dot(residual, residual)
    xu = d.sub_(k.mean_u)
    return (*moments, *collision, *angle, xu.sum(-1), _last_dot(xu, xu))


def _assemble(rows: Rows, sums: Tensor, vocab: int, T: float) -> Figures:
    """The figures of each row from its sums, in float64; moments of dz/T become those of dz."""
    (gap, drift, p_signed, kl, kl_reverse, js, pq, px, pxx, pxxx,
     ppx, ppxx, p_residual, residual2, sum_u, uniform, across) = sums  # fmt: skip
    var_p = T**2 * (pxx - px**2)
    third = T**3 * (pxxx - 3 * px * pxx + 2 * px**3)
    pp = rows["pp"]
    var_r = T**2 * (ppxx / pp - (ppx / pp) ** 2)
    mean_x = rows["mean_r"] - rows["c"]
    orthogonal_p = ((residual2 / pp - (p_residual / pp) ** 2).clamp(min=0)).sqrt()
    orthogonal_p = orthogonal_p * mean_x.clamp(min=0).exp()
    alpha, alpha_p = rows["alpha"], (p_signed / pp - drift) / (1 + drift)
    orthogonal_z = (across / rows["zz"]).sqrt()
    angular_z = formulas.angular_exact(rows["k"], orthogonal_z)
    k_p = _one_plus(p_signed, pp, pq)
    angular_p = formulas.angular_exact(k_p, orthogonal_p)
    return {
        "cosine_z": 1 - angular_z,
        "angular_z": angular_z,
        "parallel_z": alpha.abs(),
        "orthogonal_z": orthogonal_z,
        "cosine_p": k_p / torch.hypot(k_p, orthogonal_p),
        "angular_p": angular_p,
        "parallel_p": alpha_p.abs(),
        "orthogonal_p": orthogonal_p,
        "kl": kl,
        "kl_reverse": kl_reverse,
        "js": js / 4,
        "tv": gap / 2,
        "var_p": var_p,
        "var_r": var_r,
        "var_uniform": T**2 * (uniform / vocab - (sum_u / vocab) ** 2),
        "third_cumulant": third,
        "validity": formulas.validity(var_p, third, T),
        "entropy": rows["entropy"],
        "entropy_candidate": rows["entropy_candidate"],
        "angular_z_paper": formulas.angular_paper(orthogonal_z),
        "angular_z_corrected": formulas.angular_corrected(alpha, orthogonal_z),
        "angular_p_estimate": formulas.angular_p_estimate(var_r, T),
        "kl_estimate": formulas.kl_estimate(var_p, T),
    }


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
