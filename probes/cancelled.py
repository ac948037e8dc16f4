"""Sums that all but cancel, made again in float64 in the rare rows where that happens.

The passes sum in float32. A sum of terms of both signs that is small beside them has no digits
left there, and its size tells so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .passes import Rows

CANCELLED = 0.02  # share of its terms, times the root of sum p^2, under which a sum is not trusted
ACROSS = 0.02  # cosine of y and z under which their product is not trusted
ALONG = 0.0003  # the same of dz and z
MOMENTS = slice(7, 10)  # of the second sums: first to third moment under p


def refine(z: Tensor, y: Tensor, rows: Rows, sums: Tensor, T: float, step: int) -> None:
    """Put exact values in `rows` and `sums` of the second pass where they cancel; `step` rows at a time."""
    _realigned(z, y, rows, sums[-1], step)
    _recentred(z, y, rows, sums, T, step)
    _rebalanced(z, y, rows, sums, T, step)


def _few(off: Tensor, step: int) -> tuple[Tensor, ...]:
    return torch.nonzero(off)[:, 0].split(step)


def _realigned(z: Tensor, y: Tensor, rows: Rows, across: Tensor, step: int) -> None:
    """The component of dz along z, where dz, or y, all but stands across z."""
    zz, k, alpha = rows["zz"], rows["k"], rows["alpha"]
    square = across / zz
    off = (k.abs() < ACROSS * (k**2 + square).sqrt()) | (alpha.abs() < ALONG * square.sqrt())
    for few in _few(off, step):
        there = z[few].double()
        exact = torch.linalg.vecdot(there, y[few] - there) / torch.linalg.vecdot(there, there)
        k[few], alpha[few] = 1 + exact, exact


def _recentred(z: Tensor, y: Tensor, rows: Rows, sums: Tensor, T: float, step: int) -> None:
    """The moments of dz/T under p, where the third all but cancels.

    p is known to some 1e-7 a token, errors that average out where many tokens share it; a third moment
    that is smaller yet against its terms has no digits left. Such rows are rare.
    """
    px, pxx, pxxx = sums[MOMENTS]
    third = pxxx - 3 * px * pxx + 2 * px**3
    terms = (pxx - px**2).clamp(min=0) ** 1.5
    off = third.abs() < CANCELLED * rows["pp"].sqrt() * terms
    for few in _few(off, step):
        p, d = (z[few].double() / T).softmax(-1), (y[few].double() - z[few].double()) / T
        x = d.sub_((p * d).sum(-1, keepdim=True))
        square = p * x * x
        sums[MOMENTS, few] = torch.stack(((p * x).sum(-1), square.sum(-1), (square * x).sum(-1)))


def _rebalanced(z: Tensor, y: Tensor, rows: Rows, sums: Tensor, T: float, step: int) -> None:
    """The sum of p (p' - p), where its terms all but cancel."""
    gap, drift, p_signed = sums[:3]
    pp = rows["pp"]
    off = (p_signed / pp - drift).abs() < CANCELLED * pp.sqrt() * gap
    for few in _few(off, step):
        p, q = ((x[few].double() / T).softmax(-1) for x in (z, y))
        parallel = torch.linalg.vecdot(p, q - p) / torch.linalg.vecdot(p, p)
        drift[few], p_signed[few] = 0.0, parallel * pp[few]
