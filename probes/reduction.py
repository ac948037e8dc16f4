"""The reduction of two blocks of logits to figures, row by row, while they are in cache.

What is summed, and why float32 is enough for it, is in `passes`. Here rows are divided, compiled
or shared among threads, the sums become figures, and the largest tokens are found.
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
from typing import Any

import torch
from torch import Tensor

from ..analysis import formulas
from .cancelled import refine
from .passes import (
    Ends,
    Rows,
    Sums,
    both_passes,
    constants_of,
    corrected,
    describe,
    distribution,
    first_pass,
    normalised,
    one_plus,
    plain_sums,
    second_pass,
)

BLOCK_ELEMENTS = 4_000_000  # elements whose rows are reduced together: the second pass finds them
PLAIN_ELEMENTS = 20_000_000  # the same unfused, where they are divided among threads
CACHE_ELEMENTS = 300_000  # elements that one thread takes at a time: temporaries stay in cache
ACCELERATOR_ELEMENTS = 256_000_000  # all three, where memory is not a cache
TILE = 1024  # tokens that a fused pass sums in float32, in registers, before float64 takes over
GROUP = 64  # tokens whose maximum stands for them while the top k are searched
FUSED_FROM = 1_000_000_000  # pairs of logits: from here on compiling takes less time than it saves

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
    ends = Ends(top[:, :1], best[:, :1], shift, torch.full_like(shift, 1 / T))
    if settings.compiled:
        rows, sums = _fused_passes(z, y, ends, T)
    else:
        rows, sums = _plain_passes(z, y, ends, (top_index[:, :1], best_index[:, :1]), T)
    heads = {
        "flip": (top_index[:, 0] != best_index[:, 0]).double(),
        "margin": (top[:, 0] - top[:, 1]).double(),
        "overlap": (top_index[:, :, None] == best_index[:, None, :]).any(-1).double().mean(-1),
    }
    refine(z, y, rows, sums, T, max(1, CACHE_ELEMENTS // z.shape[-1]))
    figures = _assemble(rows, sums, z.shape[-1], T) | heads
    return torch.stack([figures[name] for name in FIGURES], dim=-1)


def _unshifted(z: Tensor, settings: Settings, first: Leaders) -> Tensor:
    """`reduce_rows(z, z)`: every shift is exactly zero, only the entropy and the margin need the row."""
    top, index = first
    _, rest, e_lz = distribution(z, top[:, :1], index[:, :1], settings.temperature)
    rest, e_lz = rest.double(), e_lz.double()
    row = torch.zeros((len(z), len(FIGURES)), dtype=torch.float64, device=z.device)
    entropy = torch.log1p(rest) - e_lz / (1 + rest)
    for name in ("entropy", "entropy_candidate"):
        row[:, FIGURES.index(name)] = entropy
    for name in ("cosine_z", "cosine_p", "overlap"):
        row[:, FIGURES.index(name)] = 1.0
    row[:, FIGURES.index("margin")] = (top[:, 0] - top[:, 1]).double()
    return row


# --- the passes, compiled or shared among threads ----------------------------------------------


def _fused_passes(z: Tensor, y: Tensor, ends: Ends, T: float) -> tuple[Rows, Tensor]:
    """What the first pass says of each row and the sums `(sum, row)` of the second, both compiled."""
    first, second = partial(_fused_sums, first_pass), partial(_fused_sums, second_pass)
    vocab = z.shape[-1]
    rows = describe(ends, normalised(first(z, y, ends), vocab), vocab, T)
    sums = second(z, y, constants_of(ends, rows))
    return rows, corrected(second, z, y, ends, rows, sums, len(z))


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
        parts.append(plain_sums(kernel, z[:, whole:], y[:, whole:], constants))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _plain_passes(
    z: Tensor, y: Tensor, ends: Ends, places: tuple[Tensor, Tensor], T: float
) -> tuple[Rows, Tensor]:
    """`_fused_passes` without a compiler, so many rows at a time as the cache takes.

    `places` are those of the largest tokens. On several threads each takes rows of its own: an
    operation that is split over all of them waits for the slowest every time, and there are a hundred.
    """
    elements = CACHE_ELEMENTS if z.device.type == "cpu" else ACCELERATOR_ELEMENTS
    step = max(1, elements // z.shape[-1])

    @torch.no_grad()
    def part(z: Tensor, y: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        *some, place, best_place = rest
        return both_passes(z, y, Ends(*some), (place, best_place), T)

    parts = [x.split(step) for x in (z, y, *ends, *places)]
    threads = torch.get_num_threads() if z.device.type == "cpu" else 1
    alone = threads == 1 or len(parts[0]) == 1
    done = list(map(part, *parts) if alone else _crew(threads).map(part, *parts))
    first, sums = (torch.cat(found, dim=1) for found in zip(*done, strict=True))
    rows = describe(ends, first, z.shape[-1], T)
    return rows, corrected(partial(plain_sums, second_pass), z, y, ends, rows, sums, step)


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
    k_p = one_plus(p_signed, pp, pq)
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
        "js": (js / 4).clamp(max=math.log(2)),  # beyond its bound is nothing but rounding
        "tv": (gap / 2).clamp(max=1.0),
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
