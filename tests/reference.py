"""The plainest float64 version of everything that a kernel computes fast; used by tests only."""

from __future__ import annotations

import torch
from torch import Tensor

F64 = torch.float64


def angle(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """cosine, angular, parallel, orthogonal of two float64 tensors along the last axis."""
    d, norm2 = y - x, (x * x).sum(-1)
    alpha = (d * x).sum(-1) / norm2
    orthogonal = ((d - alpha[..., None] * x) ** 2).sum(-1).sqrt() / norm2.sqrt()
    k = 1 + alpha
    s = (k**2 + orthogonal**2).sqrt()
    angular = torch.where(k > 0, orthogonal**2 / (s * (s + k)), 1 - k / s)
    return {
        "cosine": k / s,
        "angular": angular,
        "parallel": alpha.abs(),
        "orthogonal": orthogonal,
        "alpha": alpha,
    }


def variance(d: Tensor, w: Tensor) -> Tensor:
    mean = (w * d).sum(-1, keepdim=True)
    return (w * (d - mean) ** 2).sum(-1)


def figures(dense: Tensor, candidate: Tensor, T: float = 1.0, k: int = 10) -> dict[str, Tensor]:
    z, y = dense.to(F64), candidate.to(F64)
    d = y - z
    logp, logq = (z / T).log_softmax(-1), (y / T).log_softmax(-1)
    # log q/p without the cancellation of two normalisers, which float64 would show at |dz| ~ 1e-4
    mean = (logp.exp() * d).sum(-1, keepdim=True)
    centred = (d - mean) / T
    u = centred - torch.log1p((logp.exp() * torch.expm1(centred)).sum(-1, keepdim=True))
    p, v = logp.exp(), torch.expm1(u)
    q = logq.exp()
    big = u > 500  # where exp(u) leaves float64's comfortable range, p is 0 and q carries the term

    def total(on_p, on_q):
        return torch.where(big, on_q, torch.where(p > 0, p * on_p, 0.0)).sum(-1)

    v = torch.where(big, 0.0, v)
    g = torch.where(
        u.abs() < 1e-2, u**2 / 2 + u**3 / 6 + u**4 / 24 + u**5 / 120 + u**6 / 720, v - u
    )
    gr = torch.where(
        u.abs() < 1e-2, u**2 / 2 + u**3 / 3 + u**4 / 8 + u**5 / 30 + u**6 / 144, u * (1 + v) - v
    )
    lc = u.abs() / 2 + torch.log1p(torch.exp(-u.abs())) - torch.log(torch.tensor(2.0, dtype=F64))
    y2 = (u / 2) ** 2
    lc = torch.where(u.abs() < 1e-2, y2 / 2 - y2**2 / 12 + y2**3 / 45, lc)
    js = 0.5 * (v * u / 2 - (2 + v) * lc)
    js_q = 0.5 * (torch.log(torch.tensor(2.0, dtype=F64)))  # per unit of q where p = 0
    r = torch.softmax(2 * z / T, -1)
    third = (p * (d - mean) ** 3).sum(-1)
    var_p, var_r = variance(d, p), variance(d, r)
    # p-space angle: residual of q along p, through ratios centred under r
    ur = (r * u).sum(-1, keepdim=True)
    ratio = torch.expm1((u - ur).clamp(max=600))
    m1 = (r * ratio).sum(-1, keepdim=True)
    ortho_p = (r * (ratio - m1) ** 2).sum(-1).sqrt() * ur[..., 0].exp()
    pp = (p * p).sum(-1)
    k1 = (p * q).sum(-1) / pp
    whole = ((q - k1[..., None] * p) ** 2).sum(-1).sqrt() / pp.sqrt()  # cancels when small only
    ortho_p = torch.where(whole > 1e-3, whole, ortho_p)
    s = (k1**2 + ortho_p**2).sqrt()
    az, H = angle(z, y), lambda lp: -torch.where(lp.exp() > 0, lp.exp() * lp, 0.0).sum(-1)
    order = z.sort(dim=-1, descending=True, stable=True)
    order_y = y.sort(dim=-1, descending=True, stable=True)
    overlap = (
        (order.indices[..., :k, None] == order_y.indices[..., None, :k]).any(-1).to(F64).mean(-1)
    )
    return {
        **{f"{n}_z": az[n] for n in ("cosine", "angular", "parallel", "orthogonal")},
        "cosine_p": (p * q).sum(-1) / (pp * (q * q).sum(-1)).sqrt(),
        "angular_p": ortho_p**2 / (s * (s + k1)),
        "parallel_p": ((p * total_v(p, q, v, big)).sum(-1) / pp).abs(),
        "orthogonal_p": ortho_p,
        "kl": total(g, torch.zeros_like(q)),
        "kl_reverse": total(gr, q * u),
        "js": total(js, q * js_q),
        "tv": 0.5 * total(v.abs(), q),
        "var_p": var_p, "var_r": var_r,
        "var_uniform": ((d - d.mean(-1, keepdim=True)) ** 2).mean(-1),
        "third_cumulant": third,
        "validity": third.abs() / (3 * torch.where(var_p > 0, var_p, 1.0) * T),
        "flip": (order.indices[..., 0] != order_y.indices[..., 0]).to(F64),
        "margin": order.values[..., 0] - order.values[..., 1],
        "overlap": overlap,
        "entropy": H(logp), "entropy_candidate": H(logq),
        "angular_z_paper": az["orthogonal"] ** 2 / 2,
        "angular_z_corrected": az["orthogonal"] ** 2 / 2 / (1 + az["alpha"]) ** 2,
        "angular_p_estimate": var_r / (2 * T * T),
        "kl_estimate": var_p / (2 * T * T),
    }  # fmt: skip


def total_v(p: Tensor, q: Tensor, v: Tensor, big: Tensor) -> Tensor:
    return torch.where(big, q, p * v)
