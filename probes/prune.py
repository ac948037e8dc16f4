"""Pruning and quantizing one weight matrix from statistics of what it reads.

Matrices are `(output, input)`; statistics are sums over calibration tokens, so that nothing of the
size of the calibration set is held. Wanda: arXiv 2306.11695. SparseGPT: arXiv 2301.00774. GPTQ:
arXiv 2210.17323. AWQ: arXiv 2306.00978.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean diagonal of the Hessian, as in the references
COLUMNS = 128  # columns whose error is handed on together
AWQ_STEPS = 20
PARTS = 4  # that a sum of products is made in; of the mirrored parts one is
FEW = 16  # places, up to which a group is ranked by comparing every two


@dataclass
class Moments:
    """Sums over tokens of what a matrix reads: x², |x| and, if asked for, x xᵀ, in float32."""

    tokens: int
    squares: Tensor
    sizes: Tensor
    products: Tensor | None

    @classmethod
    def of(cls, width: int, device: torch.device, products: bool) -> Moments:
        """Nothing seen yet."""
        zeros = torch.zeros(width, dtype=torch.float32, device=device)
        square = torch.zeros(width, width, device=device) if products else None
        return cls(0, zeros, zeros.clone(), square)

    def add(self, x: Tensor) -> None:
        """Take in `(token, input)` activations."""
        x = x.float()
        self.tokens += len(x)
        self.squares += (x * x).sum(0)
        self.sizes += x.abs().sum(0)
        if self.products is not None:
            for rows in _slices(len(self.products)):
                for columns in _slices(len(self.products)):
                    if columns.start >= rows.start:  # the rest is its mirror image
                        self.products[rows, columns].addmm_(x[:, rows].T, x[:, columns])

    def hessian(self) -> Tensor:
        """Σ x xᵀ, whole."""
        assert self.products is not None
        upper = self.products.triu()
        return upper + upper.triu(1).T


def _slices(width: int) -> list[slice]:
    """A few equal parts of the features."""
    step = -(-width // PARTS)
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]


@dataclass(frozen=True)
class Share:
    """How many weights go: a share of them, or all but `keep` of every `of` along the input."""

    share: float
    keep: int = 0
    of: int = 0

    def mask(self, score: Tensor, by_row: bool) -> Tensor:
        """True where a weight goes: the lowest scores, the earlier place first among equals."""
        if self.of:
            grouped = score.unflatten(1, (-1, self.of))
            return _lowest(grouped, self.of - self.keep).flatten(1)
        if by_row:
            return _lowest(score, int(score.shape[1] * self.share))
        return _lowest(score.reshape(1, -1), int(score.numel() * self.share)).view_as(score)


def _lowest(score: Tensor, count: int) -> Tensor:
    """True at the `count` lowest of the last axis, ties to the earlier place."""
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    return (_lowest_few if score.shape[-1] <= FEW else _lowest_many)(score, count)


def _lowest_few(score: Tensor, count: int) -> Tensor:
    """By comparing every two places: for short axes much faster than sorting each of them."""
    columns = score.unbind(-1)
    ranks = torch.zeros(score.shape, dtype=torch.int8, device=score.device)
    for i, mine in enumerate(columns):
        for j, other in enumerate(columns):
            if i != j:
                ranks[..., i] += (other <= mine) if j < i else (other < mine)
    return ranks < count


def _lowest_many(score: Tensor, count: int) -> Tensor:
    """By the `count`-th lowest value, which needs no sorting; only rows with ties look twice."""
    bound = score.kthvalue(count, dim=-1, keepdim=True).values
    mask = score <= bound
    rows = (mask.sum(-1) > count).nonzero()[:, 0]
    if len(rows):
        below, tied = score[rows] < bound[rows], score[rows] == bound[rows]
        missing = count - below.sum(-1, keepdim=True)
        mask[rows] = below | (tied & (tied.cumsum(-1) <= missing))
    return mask


def magnitude(matrix: Tensor, share: Share) -> Tensor:
    """The smallest weights of the whole matrix (or of each group) become zero."""
    return matrix.masked_fill(share.mask(matrix.abs().float(), by_row=False), 0)


def at_random(matrix: Tensor, share: Share, generator: torch.Generator) -> Tensor:
    """Weights chosen by lot become zero: the control that every other method must beat."""
    score = torch.rand(matrix.shape, generator=generator).to(matrix.device)
    return matrix.masked_fill(share.mask(score, by_row=False), 0)


def wanda(matrix: Tensor, moments: Moments, share: Share) -> Tensor:
    """The weights of each output with the smallest |w| · ‖x‖ become zero."""
    score = matrix.abs().float() * moments.squares.sqrt()
    return matrix.masked_fill(share.mask(score, by_row=True), 0)


# --- weights that make up for the error of the weights before them -------------------------------

Settle = Callable[[int, Tensor, Tensor], Callable[[int, Tensor], Tensor]]
"""(column, weights from there, diagonal of the inverse from there) -> what a column becomes."""


def sparsegpt(matrix: Tensor, moments: Moments, share: Share) -> Tensor:
    """Prune column by column; what is left makes up for the error, in the metric of x xᵀ."""

    def settle(_: int, weights: Tensor, diagonal: Tensor) -> Callable[[int, Tensor], Tensor]:
        gone = share.mask((weights / diagonal) ** 2, by_row=False)
        return lambda column, values: values.masked_fill(gone[:, column], 0)

    hessian = moments.hessian() / max(1, moments.tokens)
    return _compensated(matrix, hessian, settle, share.of or COLUMNS)


def gptq(matrix: Tensor, moments: Moments, bits: int, group: int) -> Tensor:
    """Round column by column; what is left makes up for the error, in the metric of x xᵀ.

    Columns that read most come first (`act-order` of the released code), each on the grid of its own
    group of the weights as they were (`static-groups`).
    """
    hessian = moments.hessian() / max(1, moments.tokens)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    grids = grid(matrix.float().unflatten(1, (-1, group or matrix.shape[1])), bits)
    scale, zero = (
        g[..., 0].repeat_interleave(group or matrix.shape[1], 1)[:, order] for g in grids
    )

    def settle(start: int, _: Tensor, __: Tensor) -> Callable[[int, Tensor], Tensor]:
        def change(column: int, values: Tensor) -> Tensor:
            return _on_grid(values, scale[:, start + column], zero[:, start + column], bits)

        return change

    found = _compensated(matrix[:, order], hessian[order][:, order], settle, COLUMNS)
    return found[:, order.argsort()]


def _compensated(matrix: Tensor, hessian: Tensor, settle: Settle, every: int) -> Tensor:
    """The update of optimal brain surgery, columns in order; `settle` is asked every so many."""
    weights = matrix.float().clone()
    inverse, dead = _inverse(hessian)
    weights[:, dead] = 0
    step = max(every, COLUMNS // every * every)
    for start in range(0, weights.shape[1], step):
        end = min(start + step, weights.shape[1])
        block, upper = weights[:, start:end].clone(), inverse[start:end, start:end]
        errors = torch.zeros_like(block)
        change = settle(start, block[:, :every], upper.diagonal()[:every])
        for i in range(end - start):
            if i and i % every == 0:
                part = slice(i, i + every)
                change = settle(start + i, block[:, part], upper.diagonal()[part])
            settled = change(i % every, block[:, i])
            errors[:, i] = (block[:, i] - settled) / upper[i, i]
            block[:, i + 1 :] -= errors[:, i, None] * upper[i, i + 1 :]
            weights[:, start + i] = settled
        weights[:, end:] -= errors @ inverse[start:end, end:]
    return weights.to(matrix.dtype)


def _inverse(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor of the inverse of the damped Hessian; columns that read nothing."""
    hessian = hessian.double()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    lower = torch.linalg.cholesky(hessian)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float(), dead


# --- rounding --------------------------------------------------------------------------------------


def grid(weights: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point along the last axis, from the smallest to the largest weight.

    0 is always on the grid, so that zeros stay zeros.
    """
    low = weights.amin(-1, keepdim=True).clamp(max=0)
    high = weights.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    return scale, (-low / scale).round()


def _on_grid(weights: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    codes = ((weights / scale).round() + zero).clamp(0, 2**bits - 1)
    return (codes - zero) * scale


def round_to_nearest(matrix: Tensor, bits: int, group: int = 0) -> Tensor:
    """Quantize-dequantize `(output, input)` weights to `bits`-bit integers, group by group.

    Each group of `group` inputs (0: the whole row) of each output has its own scale and zero point.
    """
    wide = matrix.float().unflatten(1, (-1, group or matrix.shape[1]))
    return _on_grid(wide, *grid(wide, bits), bits).flatten(1).to(matrix.dtype)


def awq(matrices: list[Tensor], moments: Moments, bits: int, group: int) -> list[Tensor]:
    """Round matrices that read the same input after scaling its channels by mean |x| to a power.

    The power, one of 20 from 0 to 1 for all of them, is the one whose outputs err least over the
    calibration tokens; the error is taken from x xᵀ, so no activation is kept. Weights are not
    clipped.
    """
    products = moments.hessian()
    size = (moments.sizes / max(1, moments.tokens)).clamp(min=1e-4)
    best: tuple[float, list[Tensor]] = (float("inf"), matrices)
    for step in range(AWQ_STEPS):
        scale = size ** (step / AWQ_STEPS)
        scale = (scale / (scale.max() * scale.min()).sqrt()).clamp(min=1e-4)
        rounded = [
            (round_to_nearest(m.float() * scale, bits, group) / scale).to(m.dtype) for m in matrices
        ]
        error = sum(
            float(((r.float() - m.float()) @ products * (r.float() - m.float())).sum())
            for r, m in zip(rounded, matrices, strict=True)
        )
        if error < best[0]:
            best = (error, rounded)
    return best[1]
