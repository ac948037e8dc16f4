"""Task-specific neurons: how much more does a task excite them than other texts do?

For neuron j of a layer's MLP, a = |act(gate) * up|_j, what the down projection reads (arXiv
2604.27115): averaged over an item's tokens, padding and BOS left out, then over items.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from ..analysis import schema
from .anatomy import dropped
from .items import SEED, Item, Task, TaskError
from .model import Model, batches, pad
from .recipe import SELECTIVITIES, Neurons
from .remembered import remembered
from .tasks import load_tasks

RANKED = 128  # items of a task that rank
FEWEST = 8
TOKENS = 512  # of an item, at most


@dataclass(frozen=True)
class Activity:
    """Mean over items, and their variance, of each neuron's activation; one `(neuron,)` a layer."""

    mean: list[Tensor]
    variance: list[Tensor]


@torch.no_grad()
def activity(
    model: Model, texts: Sequence[str], progress: Callable[[float], None] = lambda _: None
) -> Activity:
    """One pass over the texts; layers without an MLP have no neurons.

    Raises:
        ValueError: no text holds a token that counts.
    """
    rows = [r for r in (_row(model, text) for text in texts) if len(r) > _begins(model, r)]
    if not rows:
        raise ValueError("the texts that rank neurons hold no token")
    sums: dict[int, list[Tensor]] = {}
    with contextlib.ExitStack() as stack:
        weights = Tensor()

        def hook(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0].abs().view(*weights.shape, -1)
                item = torch.bmm(weights[:, None].to(x.dtype), x)[:, 0].double()
                add = [item.sum(0), (item**2).sum(0)]
                sums[layer] = (
                    [a + b for a, b in zip(sums[layer], add, strict=True)] if layer in sums else add
                )

            return read

        for layer, block in enumerate(model.anatomy.blocks(model.module)):
            if not dropped(model.anatomy, block, "mlp"):
                out = block.get_submodule(model.anatomy.neurons.out)
                stack.callback(out.register_forward_pre_hook(hook(layer)).remove)
        done = 0
        for batch in batches([len(r) for r in rows]):
            inputs = pad(model, [rows[i] for i in batch])
            weights = inputs["attention_mask"].float()
            weights[:, 0] *= torch.tensor([not _begins(model, rows[i]) for i in batch]).to(weights)
            weights /= weights.sum(-1, keepdim=True)
            model.module(**inputs, use_cache=False, logits_to_keep=1)
            done += len(batch)
            progress(done / len(rows))
    return _moments(model, sums, len(rows))


def remembered_activity(
    model: Model, texts: Sequence[str], progress: Callable[[float], None] = lambda _: None
) -> Activity:
    """`activity`, kept: all orders and ratios of a study rank by the same passes."""

    told = [model.tokenizer.bos_token_id, *(_row(model, text) for text in texts)]

    def read() -> dict[str, Tensor]:
        found = activity(model, texts, progress)
        sides = {"mean": found.mean, "variance": found.variance}
        return {f"{side}.{i}": t for side, all_ in sides.items() for i, t in enumerate(all_)}

    found = remembered(model, "activity", told, read)
    sides = [
        [found[f"{side}.{i}"] for i in range(model.layer_count)] for side in ("mean", "variance")
    ]
    return Activity(*([t.to(model.device) for t in side] for side in sides))


def _row(model: Model, text: str) -> list[int]:
    return model.tokenizer(text)["input_ids"][: min(TOKENS, model.context)]


def _begins(model: Model, row: list[int]) -> bool:
    """Whether a row begins with a token that only says so."""
    return bool(row) and row[0] == model.tokenizer.bos_token_id


def _moments(model: Model, sums: Mapping[int, list[Tensor]], n: int) -> Activity:
    none = torch.zeros(0, dtype=torch.float64, device=model.device)
    both = [sums.get(layer, [none, none]) for layer in range(model.layer_count)]
    mean = [first / n for first, _ in both]
    spread = [
        ((second / n - m**2).clamp(min=0)) * n / max(1, n - 1)
        for (_, second), m in zip(both, mean, strict=True)
    ]
    return Activity(mean, spread)


# --- how specific --------------------------------------------------------------------------------


def specific(target: Activity, control: Activity, metric: str) -> list[Tensor]:
    """Selectivity of every neuron by one of `SELECTIVITIES`; neutral where neither text excites it."""
    sides = zip(target.mean, control.mean, target.variance, control.variance, strict=True)
    return list(starmap(_METRICS[metric], sides))


def _normalised(t: Tensor, c: Tensor, _t: Tensor, _c: Tensor) -> Tensor:
    return torch.where(t + c > 0, (t - c) / (t + c), 0.0)


def _ratio(t: Tensor, c: Tensor, _t: Tensor, _c: Tensor) -> Tensor:
    return torch.where((t == 0) & (c == 0), 1.0, t / c)


def _standardised(t: Tensor, c: Tensor, var_t: Tensor, var_c: Tensor) -> Tensor:
    return torch.where(t == c, 0.0, (t - c) / ((var_t + var_c) / 2).sqrt())


_METRICS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "difference": lambda t, c, _t, _c: t - c,
    "normalised": _normalised,
    "ratio": _ratio,
    "standardised": _standardised,
}
assert set(_METRICS) == set(SELECTIVITIES)


def salience(model: Model, target: Activity) -> list[Tensor]:
    """Target activation times the norm of what the neuron writes: importance, without a control."""
    blocks, roles = model.anatomy.blocks(model.module), model.anatomy.neurons
    result: list[Tensor] = []
    for block, mean in zip(blocks, target.mean, strict=True):
        if not len(mean):
            result.append(mean)
            continue
        out = block.get_submodule(roles.out)
        weight = out.get_parameter("weight").detach().double()
        result.append(mean * weight.norm(dim=0 if isinstance(out, nn.Linear) else 1))
    return result


# --- which to keep -------------------------------------------------------------------------------


def kept(
    model: Model, method: str, amount: Neurons, target: Activity, control: Activity, seed: int,
    whole: Sequence[int] = (),
) -> list[Tensor]:  # fmt: skip
    """Neurons that stay, ascending, layer by layer; layers in `whole` keep all of theirs."""
    scores = specific(target, control, amount.metric)
    if method.startswith("neurons-salience"):
        scores = salience(model, target)
    if method.endswith("-reverse"):
        scores = [-s for s in scores]
    counts = _counts(scores, amount, whole)
    if method == "neurons-random":
        generator = torch.Generator().manual_seed(seed)
        scores = [torch.rand(len(s), generator=generator, dtype=torch.float64) for s in scores]
    return [
        s.argsort(stable=True)[len(s) - n :].sort().values
        for s, n in zip(scores, counts, strict=True)
    ]


def _counts(scores: list[Tensor], amount: Neurons, whole: Sequence[int]) -> list[int]:
    """How many stay in each layer: rounded to the multiple that was asked for."""
    open_ = [s for i, s in enumerate(scores) if i not in whole]
    total = sum(map(len, open_))
    gone = torch.cat(open_).argsort(stable=True)[: round(amount.share * total)]
    lost = torch.zeros(total).index_fill_(0, gone.cpu(), 1.0).split([len(s) for s in open_])
    globally = iter(lost)
    result: list[int] = []
    for i, s in enumerate(scores):
        if i in whole:
            result.append(len(s))
            continue
        mine = float(next(globally).sum()) if amount.scope == "global" else amount.share * len(s)
        result.append(_rounded(len(s) - mine, len(s), amount.multiple))
    return result


def _rounded(wanted: float, there: int, multiple: int) -> int:
    if there <= multiple:
        return there
    return min(there, max(multiple, multiple * round(wanted / multiple)))


# --- the texts that rank -------------------------------------------------------------------------


def pools(
    names: Sequence[str], data: Path | None = None, scored: Sequence[Task] = ()
) -> dict[str, list[str]]:
    """For each task, the texts of the items that may rank neurons: those that are not scored.

    Raises:
        TaskError: no such task, or fewer than 8 of its items are left.
    """
    asked = {i.prompt for task in scored for i in task.items}
    result: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        items = load_tasks([name], data)[-1].items
        free = [i for i in items if i.prompt not in asked]
        if len(free) < FEWEST:
            raise TaskError(
                f"{name}: {len(items) - len(free)} of its {len(items)} items are scored, which leaves "
                f"{len(free)} to rank neurons by, and {FEWEST} are needed: score fewer (--limit), or rank by "
                "another task (target=, control=)"
            )
        result[name] = [_text(i) for i in free]
    return result


def _text(item: Item) -> str:
    return item.prompt + item.right if item.choices or item.accepted else item.prompt


def drawn(pool: Sequence[str], seed: int = SEED) -> list[str]:
    """`RANKED` of the texts, at most three quarters of them, drawn with a seed: another seed is another
    draw."""
    size = min(RANKED, max(FEWEST, 3 * len(pool) // 4), len(pool))
    return random.Random(seed).sample(list(pool), size)


def marks(texts: Sequence[str]) -> list[str]:
    """Short hashes of texts, to tell whether an item that is scored has ranked."""
    return sorted({_mark(text) for text in texts})


def check_apart(name: str, told: Mapping[str, Any], tasks: Sequence[Task]) -> None:
    """Whether no item that is scored has ranked a candidate's neurons, or trained it.

    Args:
        name: of the candidate.
        told: what its compression achieved.
        tasks: what is to be scored.

    Raises:
        TaskError: some have.
    """
    ranked = {
        *told.get("neurons", {}).get("ranked", ()),
        *told.get("recovered", {}).get("texts", ()),
    }
    for task in tasks:
        both = sum(_mark(_text(item)) in ranked for item in task.items)
        if both:
            raise TaskError(
                f"{task.name}: {both} of the items to score have ranked the neurons of {name}, or trained "
                "it, which says nothing fair of it; score others, or cut and train by others"
            )


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- as data -------------------------------------------------------------------------------------


def selectivity(
    model: Model,
    target: Sequence[str],
    control: Sequence[str],
    progress: Callable[[float], None] = lambda _: None,
) -> xr.Dataset:
    """Activations of every neuron on both kinds of texts, and every variant of selectivity.

    Returns:
        The group `/neurons`; layers with fewer neurons than the widest are filled with NaN.
    """
    sides = (
        activity(model, target, lambda done: progress(done / 2)),
        activity(model, control, lambda done: progress(0.5 + done / 2)),
    )
    return dataset(model, *sides)


def dataset(
    model: Model, target: Activity, control: Activity, stay: Sequence[Tensor] | None = None
) -> xr.Dataset:
    """The group `/neurons` of two activities and, where some were cut, the neurons that stay."""
    size = max(map(len, target.mean))

    def table(values: Sequence[Tensor]) -> np.ndarray:
        result = np.full((len(values), size), np.nan)
        for row, value in zip(result, values, strict=True):
            row[: len(value)] = value.cpu().numpy()
        return result

    variants = [table(specific(target, control, m)) for m in SELECTIVITIES]
    variables = {
        "activation": np.stack([table(target.mean), table(control.mean)], -1),
        "spread": np.sqrt(np.stack([table(target.variance), table(control.variance)], -1)),
        "selectivity": np.stack(variants, -1),
        "salience": table(salience(model, target)),
    }
    if stay is not None:
        marked = [
            torch.zeros(len(m)).index_fill_(0, kept.cpu(), 1.0)
            for m, kept in zip(target.mean, stay, strict=True)
        ]
        variables["kept"] = table(marked)
    coords = {
        "layer": np.arange(model.layer_count), "neuron": np.arange(size),
        "texts": list(schema.TEXTS), "metric": list(SELECTIVITIES),
    }  # fmt: skip
    return schema.dataset("neurons", variables, coords)
