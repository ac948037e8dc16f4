"""The two passes over the vocabulary that sum everything the figures need.

The first gives normalisers and means, the second what is centred by them. Compiled, each is one
loop (`reduction`); as they stand, both are made of a few rows in cache (`both_passes`), with the
same second sums. Three things make float32 enough:

* the log-normaliser ratio c = log E_p[exp(dz/T)] is corrected until E_p[p'/p] = 1 holds, so that
  u = log p'/p = dz/T - c is right to its own scale and not only to that of the logits;
* every divergence is a sum of terms that are not negative, each from a series where u is small:
  nothing cancels and nothing overflows;
* moments are centred before they are squared, each under its own weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

NEAR = 0.25  # a series up to here, differences and logarithms beyond
CORRECTIONS = 4  # at most so many corrections of c; one is rarely needed
TOLERANCE = 1e-5  # of c, against the scale of u
LOG2_E = 1.4426950408889634

Sums = tuple[Tensor, ...]
Rows = dict[str, Tensor]


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


class Ends(NamedTuple):
    """Row constants of the first pass, `(row, 1)` float32."""

    top: Tensor
    best: Tensor
    shift: Tensor  # dz of the largest token, from which dz is counted
    inverse: Tensor


def first_pass(z: Tensor, y: Tensor, k: Ends) -> Sums:
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


def normalised(sums: Tensor, vocab: int) -> Tensor:
    """The float64 `(sum, row)` of `first_pass` with p in place of e = exp((z - top)/T), as `centres` wants them."""
    below, weighted = sums[0:4:2], sums[1:4:2]
    rests = vocab - 1 + below - weighted
    e_lz, v_ly, e_d, ee, ee_d, *rest = sums[4:]
    w = 1 + rests[0]
    return torch.stack((*rests, e_lz, v_ly, e_d / w, ee / w**2, ee_d / w**2, *rest))


def centres(ends: Ends, first: Tensor, vocab: int, T: float) -> Rows:
    """What the second pass is centred by, in float64; `rest` is a normaliser but for its largest term."""
    _, _, _, _, mean_p, pp, pp_d, sum_d, zz, zd, _ = first
    top, best, shift, _ = (value[:, 0].double() for value in ends)
    log_w, log_v = first[:2].log1p()
    return {
        "log_w": log_w,
        "log_v": log_v,
        "c": (best - top - shift) / T + (log_v - log_w),
        "mean_p": mean_p,
        "mean_r": pp_d / pp,
        "mean_u": sum_d / vocab,
        "alpha": zd / zz,
    }


def describe(ends: Ends, first: Tensor, vocab: int, T: float) -> Rows:
    """Everything that the first pass says of each row, in float64."""
    rest_w, rest_v, e_lz, v_ly, _, pp, _, _, zz, zd, zy = first
    rows = centres(ends, first, vocab, T)
    return rows | {
        "zz": zz,
        "k": one_plus(zd, zz, zy),
        "pp": pp,
        "entropy": rows["log_w"] - e_lz / (1 + rest_w),
        "entropy_candidate": rows["log_v"] - v_ly / (1 + rest_v),
    }


def one_plus(part: Tensor, whole: Tensor, both: Tensor) -> Tensor:
    """1 + part/whole, where both = whole + part: from whichever does not cancel."""
    return torch.where(part.abs() < whole / 2, 1 + part / whole, both / whole)


class Constants(NamedTuple):
    """Row constants of the second pass, `(row, 1)` float32, relative to the shift of the largest token."""

    top: Tensor
    best: Tensor
    shift: Tensor
    inverse: Tensor
    log_w: Tensor
    log_v: Tensor
    c: Tensor
    c_rest: Tensor  # what float32 drops of c: u of most tokens can be as small
    mean_p: Tensor
    mean_r: Tensor
    mean_u: Tensor
    alpha: Tensor
    shrink_p: Tensor  # with shrink_q brings exp(u - E_r[u]) under 1 from either side
    shrink_q: Tensor


def constants_of(ends: Ends, rows: Rows) -> Constants:
    """The constants of the second pass from what the first says of each row."""
    c = rows["c"]
    mean_x = rows["mean_r"] - c  # E_r[u]
    centred = (rows[k] for k in ("mean_p", "mean_r", "mean_u", "alpha"))
    shrink = torch.stack((mean_x, -mean_x)).clamp_(max=0).exp_()
    values = (rows["log_w"], rows["log_v"], c, c - c.float(), *centred, *shrink)
    return Constants(*ends, *torch.stack(values).float()[:, :, None].unbind())


def second_pass(z: Tensor, y: Tensor, k: Constants) -> Sums:
    """Everything that needs the normalisers."""
    d, lost = _shift(z, y)
    across = _across(z, d, k.alpha)
    d.sub_(k.shift).add_(lost).mul_(k.inverse)
    p = _exp((z - k.top).mul_(k.inverse).sub_(k.log_w))
    q = _exp((y - k.best).mul_(k.inverse).sub_(k.log_v))
    return (*_second_sums(d, p, q, p * p, k), across)


def _second_sums(d: Tensor, p: Tensor, q: Tensor, square: Tensor, k: Constants) -> Sums:
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


def both_passes(
    z: Tensor, y: Tensor, k: Ends, places: tuple[Tensor, Tensor], T: float
) -> tuple[Tensor, Tensor]:
    """Sums of both passes over rows in cache: the second finds dz and the exponentials of the first there.

    What rows say is computed only as far as the second pass needs it: threads wait for each other
    where operations are short.
    """
    d, lost = _shift(z, y)
    dz = _dot(z, z), _dot(z, d), _dot(z, y)
    across = _across(z, d, (dz[1] / dz[0])[:, None])
    d.sub_(k.shift).add_(lost)
    if T != 1:
        d.mul_(k.inverse)
    p, rest_w, e_lz = distribution(z, k.top, places[0], T)
    q, rest_v, v_ly = distribution(y, k.best, places[1], T)
    square = p * p
    means = _dot(p, d), square.sum(-1), _dot(square, d), d.sum(-1)
    first = torch.stack((rest_w, rest_v, e_lz, v_ly, *means, *dz)).double()
    constants = constants_of(k, centres(k, first, z.shape[-1], T))
    second = (*_second_sums(d, p, q, square, constants), across)
    return first, torch.stack(second).double()


def distribution(z: Tensor, top: Tensor, index: Tensor, T: float) -> tuple[Tensor, Tensor, Tensor]:
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


def _moments(d: Tensor, p: Tensor, q: Tensor, square: Tensor, k: Constants) -> Sums:
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


def plain_sums(kernel: Callable[..., Sums], z: Tensor, y: Tensor, constants: Any) -> Tensor:
    """The sums of a pass over each row as it stands, float64 `(sum, row)`."""
    return torch.stack(kernel(z, y, constants)).double()


def corrected(
    second: Callable[..., Tensor],
    z: Tensor,
    y: Tensor,
    ends: Ends,
    rows: Rows,
    sums: Tensor,
    step: int,
) -> Tensor:
    """The sums of the `second` pass with c corrected, in `rows` too, until p' sums to 1; `step` rows at a time."""
    for _ in range(CORRECTIONS):
        gap, drift = sums[0], sums[1]
        off = torch.nonzero(drift.abs() > TOLERANCE * gap)[:, 0]
        if not len(off):
            break
        rows["c"][off] += torch.log1p(drift[off])
        for few in off.split(step):
            told = {name: value[few] for name, value in rows.items()}
            some = constants_of(Ends(*(value[few] for value in ends)), told)
            sums[:, few] = second(z[few], y[few], some)
    return sums
