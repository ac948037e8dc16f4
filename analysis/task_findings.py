"""What benchmarks, letters, running text and vectors say of a cell."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from scipy import stats

from . import collapse, perplexity
from .finding import Finding, claimed, group
from .statistics import Interval, bootstrap


def tell(name: str, cell: xr.DataTree) -> list[Finding]:
    """The findings of one cell's tasks, beyond its twins."""
    found: list[Finding] = []
    scores = group(cell, "scores")
    gap = collapse.kinds_apart(scores) if scores is not None else None
    if gap is not None:
        found.append(_benchmarks(name, gap))
    for about, tells in (
        ("subspace", _subspace), ("perplexity", _perplexity), ("retrieval", _retrieval),
        ("similarity", _similarity),
    ):  # fmt: skip
        data = group(cell, about)
        if data is not None:
            found += [tells(name, data, t) for t in dict.fromkeys(data.task.values.tolist())]
    return found


def _benchmarks(name: str, gap: collapse.Discrepancy) -> Finding:
    apart = gap.difference.low > 0 or gap.difference.high < 0
    claim = (
        f"Over benchmarks, {name} retains {gap.choice} of multiple choice and {gap.generation} of what is "
        f"written; they {'differ' if apart else 'do not differ measurably'} (by {gap.difference}). These are "
        "different items: difficulty differs as well as format."
    )
    evidence = "/scores, benchmarks: " + ", ".join(gap.tasks)
    return claimed(claim, gap.difference, gap.n, name, evidence)


def _subspace(name: str, data: xr.Dataset, task: str) -> Finding:
    part = data.isel(item=data.task.values == task)
    kl, n = part.kl.values.astype(float), part.sizes["item"]
    means = [bootstrap(lambda pick, k=k: kl[pick, k].mean(-1), n) for k in range(3)]
    ratio = bootstrap(
        lambda pick: kl[pick, 2].mean(-1) / np.maximum(kl[pick, 0].mean(-1), 1e-12), n
    )
    agree, stable = (100 * float(part[v].mean()) for v in ("agree", "stable"))
    mass = part.mass.values.astype(float).mean(0)
    reading = "less" if ratio.low > 1 else "more" if ratio.high < 1 else "no measurably other"
    claim = (
        f"{task}, {name}: where the letter is predicted the options alone move by a KL of {means[0].value:.3g} "
        f"nat ({means[0].low:.3g} to {means[0].high:.3g}), the whole vocabulary by {means[2].value:.3g} "
        f"({means[2].low:.3g} to {means[2].high:.3g}): multiple choice sees {reading} change. The answer stays in "
        f"{agree:.0f} % of items, in {stable:.0f} % because no option gains the dense margin; the options hold "
        f"{mass[0]:.3f} of the dense probability and {mass[1]:.3f} of the candidate's."
    )
    return claimed(
        claim, ratio, n, name, "/subspace/kl", task=task, options=list(means[0]),
        top=list(means[1]), whole=list(means[2]), agree=agree / 100, stable=stable / 100,
    )  # fmt: skip


def _perplexity(name: str, data: xr.Dataset, task: str) -> Finding:
    found = perplexity.figures(data, task)
    ratio, kl, same = found["Mean PPL(Q)/PPL(base)"], found["Mean KLD"], found["Same top p"]
    claim = (
        f"{task}: perplexity {found['Mean PPL(base)'].value:.2f} to {found['Mean PPL(Q)'].value:.2f} under {name} "
        f"(×{ratio.value:.3f}, {ratio.low:.3f} to {ratio.high:.3f}); mean KLD {kl.value:.3g} "
        f"({kl.low:.3g} to {kl.high:.3g}), same top p {100 * same.value:.1f} %."
    )
    tokens = int((data.task.values == task).sum())
    plain = {k: list(v) for k, v in found.items()}
    return claimed(
        claim, ratio, len(np.unique(data.window.values[data.task.values == task])), name,
        "/perplexity/log_p", task=task, tokens=tokens, figures=plain,
        percentiles=perplexity.percentiles(data, task), correlation=perplexity.correlation(data, task),
    )  # fmt: skip


def _retrieval(name: str, data: xr.Dataset, task: str) -> Finding:
    part = data.isel(query=data.task.values == task)
    ndcg, recall = (part[v].values.astype(float) for v in ("ndcg", "recall"))
    n = len(ndcg)
    change = bootstrap(lambda pick: (ndcg[pick, 1] - ndcg[pick, 0]).mean(-1), n)
    claim = (
        f"{task}: nDCG@10 {ndcg[:, 0].mean():.3f} to {ndcg[:, 1].mean():.3f} under {name} (change {change.value:+.3f}, "
        f"{change.low:+.3f} to {change.high:+.3f}), recall@10 {recall[:, 0].mean():.3f} to {recall[:, 1].mean():.3f}."
    )
    return claimed(claim, change, n, name, "/retrieval/ndcg", task=task)


def _similarity(name: str, data: xr.Dataset, task: str) -> Finding:
    part = data.isel(pair=data.task.values == task)
    gold, cosine = part.gold.values.astype(float), part.cosine.values.astype(float)
    sides = [spearman(gold, cosine[:, k]) for k in range(2)]
    change = _paired(gold, cosine)
    claim = (
        f"{task}: Spearman with people's scores {sides[0]:.3f} to {sides[1]:.3f} under {name} (change "
        f"{change.value:+.3f}, {change.low:+.3f} to {change.high:+.3f})."
    )
    return claimed(claim, change, len(gold), name, "/similarity/cosine", task=task)


def spearman(gold: np.ndarray, values: np.ndarray) -> float:
    """Rank correlation; NaN where one side does not vary."""
    if np.ptp(gold) == 0 or np.ptp(values) == 0:
        return float("nan")
    found: Any = stats.spearmanr(gold, values)
    return float(found.statistic)


def _paired(gold: np.ndarray, cosine: np.ndarray) -> Interval:
    def change(pick: np.ndarray) -> np.ndarray:
        rows = np.atleast_2d(pick)
        ranked = [stats.rankdata(x[rows], axis=-1) for x in (gold, cosine[:, 0], cosine[:, 1])]
        centred = [r - r.mean(-1, keepdims=True) for r in ranked]
        size = [np.sqrt((c**2).sum(-1)) for c in centred]
        with np.errstate(divide="ignore", invalid="ignore"):
            both = [(centred[0] * centred[k]).sum(-1) / (size[0] * size[k]) for k in (1, 2)]
        result = both[1] - both[0]
        return result if pick.ndim > 1 else result[0]

    return bootstrap(change, len(gold))
