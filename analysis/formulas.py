"""The formulas that need nothing but other figures: plain arithmetic on arrays of any library.

Every function works alike on floats, numpy and torch arrays and xarray objects. Symbols are those
of the README's table: alpha is the relative change along x, rho = `orthogonal` the relative change
across it, T the softmax temperature. [H] is arXiv 2603.24652.
"""

from __future__ import annotations

from typing import Any


def angular_paper(orthogonal: Any) -> Any:
    """Theorem 1 of [H]: 1 - cos(x, x') ~ rho²/2. Dimensionless, >= 0."""
    return 0.5 * orthogonal**2


def angular_corrected(alpha: Any, orthogonal: Any) -> Any:
    """Theorem 1 to second order without dropping the norm change: rho² / (2 (1 + alpha)²)."""
    return 0.5 * orthogonal**2 / (1 + alpha) ** 2


def angular_exact(k: Any, orthogonal: Any) -> Any:
    """1 - cos(x, x') = 1 - k/sqrt(k² + rho²), k = <x', x>/|x|² = 1 + alpha, without cancellation.

    For k > 0 this is rho² / (s (s + k)) with s = sqrt(k² + rho²), exact to rounding however small
    the angle is.
    """
    size = abs(k)
    s = (k**2 + orthogonal**2) ** 0.5
    # For k <= 0, where 1 - cos >= 1, the second term completes 1 + |k|/s.
    return orthogonal**2 / (s * (s + size)) + (size - k) / s


def angular_p_estimate(var_r: Any, temperature: float = 1.0) -> Any:
    """Theorem 2 of [H]: 1 - cos(p, p') ~ Var_r[dz] / (2 T²), r = p²/sum p²."""
    return var_r / (2 * temperature**2)


def kl_estimate(var_p: Any, temperature: float = 1.0) -> Any:
    """Theorem 3 of [H]: KL(p || p') ~ Var_p[dz] / (2 T²). In nat."""
    return var_p / (2 * temperature**2)


def validity(var_p: Any, third_cumulant: Any, temperature: float = 1.0) -> Any:
    """|k3| / (3 k2 T): size of the third-order term of KL beside the second. 0 where dz is uniform.

    Well below 1 the second order describes the shift; near and above 1 it does not.
    """
    safe = var_p + (var_p == 0)
    return abs(third_cumulant) / (3 * safe * temperature)
