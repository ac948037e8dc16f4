"""Compression: a dense model and a recipe in, a candidate out, the dense model untouched.

The candidate shares every weight that the recipe leaves alone. Embeddings and unembedding are
never touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, neurons, prune, rank
from .anatomy import SUBLAYERS, Sublayer, drop, dropped, linears, matrices_of
from .layerwise import Layer, sequences, walk
from .model import Model
from .prune import Moments, Share
from .rank import calibration_texts
from .recipe import (
    METHODS,
    Amount,
    Count,
    Integer,
    Layers,
    Neurons,
    Pattern,
    Place,
    Ratio,
    Recipe,
    RecipeError,
    Scheme,
    Step,
)
from .width import cut, widths

SEED = 24652


@dataclass(frozen=True)
class Job:
    """One step of a recipe being carried out."""

    candidate: Model
    method: str
    amount: Amount
    texts: list[str]
    seed: int
    progress: Callable[[float], None]
    keep: tuple[Place, ...] = ()
    ranking: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])

    def kept(self) -> list[str]:
        """Paths, inside the decoder layers, of what stays as it is."""
        part = self.candidate.anatomy.part
        return [f"{n}.{path}" for site, n in self.keep for path in part(_sublayers(site)[0]).body]

    def weights(self) -> dict[str, nn.Module]:
        """Name -> every module whose weight is to change."""
        anatomy = self.candidate.anatomy
        kept = tuple(f"{anatomy.layers}.{path}" for path in self.kept())
        return {
            name: module
            for name, module in linears(anatomy, self.candidate.module).items()
            if not any(name == path or name.startswith(f"{path}.") for path in kept)
        }


def compress(
    dense: Model,
    recipe: Recipe,
    *,
    calibration: Sequence[str] | None = None,
    ranking: Mapping[str, Sequence[str]] | None = None,
    seed: int = SEED,
    progress: Callable[[float], None] = lambda _: None,
) -> Model:
    """Carry out a recipe.

    Args:
        dense: the model to compress; it stays as it is.
        recipe: what to do, step by step, left to right.
        calibration: texts for ranking and calibration (default: those that ship with us).
        ranking: name of a task -> texts that may rank neurons for it (default: `neurons.pools`).
        seed: of the lots that are drawn.
        progress: called with the share of the work that is done.

    Returns:
        The candidate; `achieved` holds what came of it (layers dropped, share of zeros, bits).

    Raises:
        RecipeError: an amount that this model does not allow, or a recipe that changes no weight.
    """
    check(dense, recipe)
    candidate = dense.clone(recipe=recipe, achieved={}, measured={})
    named = ranking if ranking is not None else neurons.pools(ranked_by(recipe))
    texts = list(calibration) if calibration is not None else calibration_texts()
    steps = len(recipe.steps)
    for i, step in enumerate(recipe.steps):
        before = {name: id(p) for name, p in candidate.module.named_parameters()}

        def tick(done: float, i: int = i) -> None:
            progress((i + done) / steps)

        job = Job(candidate, step.method, step.amount, texts, seed, tick, step.keep, named)
        _APPLY[step.method](job)
        after = {name: id(p) for name, p in candidate.module.named_parameters()}
        if before == after:
            raise RecipeError(f"recipe '{step}' changed no weight of {dense.label}")
        progress((i + 1) / steps)
    candidate.achieved["recipe"] = str(recipe)
    candidate.achieved["calibration"] = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    return candidate


def ranked_by(recipe: Recipe) -> list[str]:
    """The tasks whose items rank neurons."""
    amounts = [step.amount for step in recipe.steps if isinstance(step.amount, Neurons)]
    return [name for amount in amounts for name in (amount.target, *amount.control)]


def check(dense: Model, recipe: Recipe) -> None:
    """Whether the model allows the recipe's amounts, before any work.

    Raises:
        RecipeError: more layers than there are, a group that does not divide a width, weights
            changed after a library has packed them.
        BackendError: a library that is not installed or cannot quantize this model.
    """
    _check_packing(dense, recipe)
    multiple = 0  # of the widths that are left, once neurons were cut
    for step in recipe.steps:
        if step.keep and max(layer for _, layer in step.keep) >= dense.layer_count:
            raise RecipeError(
                f"recipe '{step}': {dense.name} has layers 0 to {dense.layer_count - 1}"
            )
        joint = step.method == "joint-drop"
        match step.amount:
            case Count(n) if n >= (there := dense.layer_count * (1 + joint)):
                raise RecipeError(
                    f"recipe '{step}': {dense.name} has {there} {'sub' if joint else ''}layers; "
                    f"1 to {there - 1} can be dropped"
                )
            case Neurons() as amount:
                _check_multiple(dense, str(step), amount.multiple)
                multiple = amount.multiple
            case Pattern(_, of, _):
                _check_group(dense, str(step), of, multiple)
            case Layers(layers) if max(layers) >= dense.layer_count:
                raise RecipeError(
                    f"recipe '{step}': {dense.name} has layers 0 to {dense.layer_count - 1}"
                )
            case Integer() as amount if group := _group(step.method, amount):
                _check_group(dense, str(step), group, multiple)
            case _:
                pass


def _check_packing(dense: Model, recipe: Recipe) -> None:
    packer: Step | None = None
    for step in recipe.steps:
        if packer is not None and not step.method.endswith("-drop"):
            raise RecipeError(
                f"recipe '{recipe}': '{packer}' packs the weights, so that after it only sublayers "
                f"can be dropped; put '{step}' before it"
            )
        if step.method in backends.LIBRARIES:
            packer = step
            backends.check(step.method, linears(dense.anatomy, dense.module).values())


def _group(method: str, amount: Integer) -> int:
    """Weights per scale, 0: a row. torchao has groups at 4 bits without being asked."""
    return amount.group or (backends.GROUP if method == "torchao" and amount.bits == 4 else 0)


def _check_multiple(dense: Model, step: str, multiple: int) -> None:
    narrowest = min(n for n in widths(dense.anatomy, dense.module) if n)
    if multiple >= narrowest:
        raise RecipeError(
            f"recipe '{step}': an MLP of {dense.name} has {narrowest} neurons, so multiple={multiple} "
            "leaves nothing to cut; choose a smaller one"
        )


def _check_group(dense: Model, step: str, group: int, multiple: int = 0) -> None:
    if multiple and multiple % group:
        raise RecipeError(
            f"recipe '{step}': neurons are cut to widths that {multiple} divides and {group} may not; cut "
            f"with multiple={group}"
        )
    for name, module in linears(dense.anatomy, dense.module).items():
        width = _matrix(module).shape[1]
        if width % group:
            raise RecipeError(
                f"recipe '{step}': {name} reads {width} inputs, which {group} does not divide; "
                "choose another group, or none (one scale per row)"
            )


# --- dropping ----------------------------------------------------------------------------------


def _dropper(*kinds: str) -> Callable[[Job], None]:
    def apply(job: Job) -> None:
        if isinstance(job.amount, Layers):
            for layer in job.amount.layers:
                _remove(job.candidate, kinds[0], layer)
            return
        assert isinstance(job.amount, Count)
        if job.amount.by == "angular":
            distances = rank.angular(job.candidate, job.texts, job.amount.n)
            start = int(distances.argmin())
            for layer in range(start, start + job.amount.n):
                _remove(job.candidate, "block", layer)
            return
        _drop_ranked(job, kinds, job.amount)

    return apply


def _drop_ranked(job: Job, kinds: tuple[str, ...], amount: Count) -> None:
    left = [place for place in _order(job, kinds, amount) if not _gone(job.candidate, *place)]
    if amount.n >= len(left):
        raise RecipeError(f"{job.method}@{amount}: only {len(left)} are left to drop")
    for done in range(amount.n):
        _remove(job.candidate, *left.pop(0))
        job.progress((done + 1) / amount.n)
        if amount.iterative and done + 1 < amount.n:
            left = [p for p in _order(job, kinds, amount) if not _gone(job.candidate, *p)]


def _order(job: Job, kinds: tuple[str, ...], amount: Count) -> list[tuple[str, int]]:
    return rank.order(job.candidate, kinds, job.texts, amount.by)


def _sublayers(kind: str) -> tuple[Sublayer, ...]:
    return SUBLAYERS if kind == "block" else (kind,)  # type: ignore[return-value]


def _gone(model: Model, kind: str, layer: int) -> bool:
    block = model.anatomy.blocks(model.module)[layer]
    return all(dropped(model.anatomy, block, s) for s in _sublayers(kind))


def _remove(candidate: Model, kind: str, layer: int) -> None:
    block = candidate.anatomy.blocks(candidate.module)[layer]
    for sublayer in _sublayers(kind):
        if not dropped(candidate.anatomy, block, sublayer):
            drop(candidate.anatomy, block, sublayer, layer)
            lists = candidate.achieved.setdefault("dropped", {})
            lists.setdefault(sublayer, []).append(layer)


# --- cutting neurons -----------------------------------------------------------------------------


def _cut_neurons(job: Job) -> None:
    assert isinstance(job.amount, Neurons)
    candidate, amount = job.candidate, job.amount
    anatomy, blocks = candidate.anatomy, candidate.anatomy.blocks(candidate.module)
    seed = job.seed if amount.seed is None else amount.seed
    texts = [neurons.drawn(job.ranking[amount.target], seed)]
    texts.append([t for name in amount.control for t in neurons.drawn(job.ranking[name], seed)])
    sides = [
        neurons.remembered_activity(
            candidate, side or job.texts, lambda done, i=i: job.progress((i + done) / 2)
        )
        for i, side in enumerate(texts)
    ]
    before = widths(anatomy, candidate.module)
    whole = [layer for site, layer in job.keep if site == "mlp"]
    stay = neurons.kept(candidate, job.method, amount, sides[0], sides[1], seed, whole)
    data = neurons.dataset(candidate, sides[0], sides[1], stay)
    for block, there, chosen in zip(blocks, before, stay, strict=True):
        if len(chosen) < there:
            cut(anatomy, block, chosen)
    after = [len(chosen) for chosen in stay]
    candidate.measured["neurons"] = data
    candidate.achieved["neurons"] = {
        "order": job.method.removeprefix("neurons-"), "asked": amount.share,
        "cut": 1 - sum(after) / sum(before), "target": amount.target, "control": list(amount.control),
        "metric": amount.metric, "scope": amount.scope, "seed": seed, "widths": after,
        "items": [len(side) for side in texts],
        "ranked": neurons.marks([t for side in texts for t in side]),
    }  # fmt: skip


# --- zeroing and rounding ------------------------------------------------------------------------


def _matrix(module: nn.Module) -> Tensor:
    """The weight as `(output, input)`, whichever way the module keeps it."""
    if backends.packed(module):
        return backends.unpacked(module)
    weight = module.get_parameter("weight").detach()
    return weight if isinstance(module, nn.Linear) else weight.T


def _replace(module: nn.Module, matrix: Tensor) -> None:
    """Give a module a new weight; nothing changes where the values are the same."""
    old = module.get_parameter("weight")
    new = matrix if isinstance(module, nn.Linear) else matrix.T
    if not torch.equal(new, old):
        module.register_parameter("weight", nn.Parameter(new.contiguous(), requires_grad=False))


def _share(amount: Amount) -> Share:
    if isinstance(amount, Pattern):
        return Share(1 - amount.keep / amount.of, amount.keep, amount.of)
    assert isinstance(amount, Ratio)
    return Share(amount.share)


def _each(job: Job, change: Callable[[Tensor], Tensor]) -> None:
    """Give every weight matrix of the layers what `change` makes of it."""
    modules = job.weights()
    for done, module in enumerate(modules.values()):
        _replace(module, change(_matrix(module)))
        job.progress((done + 1) / len(modules))


def _magnitude(job: Job) -> None:
    share = _share(job.amount)
    _each(job, lambda matrix: prune.magnitude(matrix, share))
    job.candidate.achieved["sparsity"] = sparsity(job.candidate)


def _random(job: Job) -> None:
    own = getattr(job.amount, "seed", None)
    generator = torch.Generator().manual_seed(job.seed if own is None else own)
    share = _share(job.amount)
    _each(job, lambda matrix: prune.at_random(matrix, share, generator))
    job.candidate.achieved["sparsity"] = sparsity(job.candidate)


def _calibrated(job: Job) -> None:
    """Methods that need what each matrix reads, layer by layer on the compressed prefix."""
    candidate, products = job.candidate, job.method != "wanda"
    tokens, changing = sequences(candidate, job.texts), set(job.weights().values())
    for layer in walk(candidate, tokens):
        modules = [m for m in matrices_of(layer.block) if m in changing]
        if modules:
            for group in _watched(layer, modules, products):
                for module, matrix in zip(group[0], _compressed(job, *group), strict=True):
                    _replace(module, matrix)
        job.progress((layer.index + 1) / candidate.layer_count)
    candidate.achieved["calibration_tokens"] = tokens.numel()
    if isinstance(job.amount, Integer):
        _note_bits(candidate, job.amount)
    else:
        candidate.achieved["sparsity"] = sparsity(candidate)


Group = tuple[list[nn.Module], Moments]


def _watched(layer: Layer, modules: list[nn.Module], products: bool) -> list[Group]:
    """What the matrices of a layer read; those that read the same tensor share their moments."""
    groups: list[Group] = []
    held: list[Tensor] = []  # of the first sequence, so that no two inputs share an address
    leaders: dict[nn.Module, Group] = {}

    def hook(module: nn.Module) -> Callable[[Tensor], None]:
        def read(x: Tensor) -> None:
            if module not in leaders:
                _join(module, x)
            if leaders[module][0][0] is module:
                leaders[module][1].add(x)

        return read

    def _join(module: nn.Module, x: Tensor) -> None:
        for group, seen in zip(groups, held, strict=True):
            if seen.data_ptr() == x.data_ptr() and seen.shape == x.shape:
                group[0].append(module)
                leaders[module] = group
                return
        groups.append(([module], Moments.of(x.shape[1], x.device, products)))
        held.append(x)
        leaders[module] = groups[-1]

    layer.watch({module: hook(module) for module in modules})
    return groups


def _compressed(job: Job, modules: list[nn.Module], moments: Moments) -> list[Tensor]:
    matrices, amount = [_matrix(module) for module in modules], job.amount
    if isinstance(amount, Integer):
        if job.method == "awq":
            return prune.awq(matrices, moments, amount.bits, amount.group)
        return [prune.gptq(m, moments, amount.bits, amount.group) for m in matrices]
    method = prune.wanda if job.method == "wanda" else prune.sparsegpt
    return [method(m, moments, _share(amount)) for m in matrices]


def sparsity(model: Model) -> float:
    """Share of zeros among the weight matrices of the decoder layers."""
    matrices = [_matrix(m) for m in linears(model.anatomy, model.module).values()]
    zeros = sum(int((m == 0).sum()) for m in matrices)
    return zeros / max(1, sum(m.numel() for m in matrices))


def _rtn(job: Job) -> None:
    assert isinstance(job.amount, Integer)
    bits, group = job.amount.bits, job.amount.group
    _each(job, lambda matrix: prune.round_to_nearest(matrix, bits, group))
    _note_bits(job.candidate, job.amount)


def _note_bits(candidate: Model, amount: Integer) -> None:
    overhead = 32 / amount.group if amount.group else 0.0  # a 16-bit scale and zero point per group
    candidate.achieved["bits"] = amount.bits
    candidate.achieved["bits_stored"] = amount.bits + overhead


def _backend(job: Job) -> None:
    """Hand the decoder layers to a library, which packs their weights."""
    module, anatomy, amount = job.candidate.module, job.candidate.anatomy, job.amount
    layers, changing = module.get_submodule(anatomy.layers), set(job.weights().values())
    keep = [anatomy.unembed, *(f"{anatomy.layers}.{path}" for path in job.kept())]
    if isinstance(amount, Scheme):
        backends.bitsandbytes(module, layers, keep, amount.name, changing)
        bits = stored = backends.BITS[amount.name]
    else:
        assert isinstance(amount, Integer)
        bits, group = amount.bits, _group(job.method, amount)
        backends.torchao(module, layers, keep, bits, group, changing)
        stored = bits + (32 / group if group else 0.0)
    job.candidate.achieved.update(bits=int(bits), bits_stored=stored)


_APPLY: dict[str, Callable[[Job], None]] = {
    "attn-drop": _dropper("attn"),
    "mlp-drop": _dropper("mlp"),
    "block-drop": _dropper("block"),
    "joint-drop": _dropper("attn", "mlp"),
    **{name: _cut_neurons for name in METHODS if name.startswith("neurons-")},
    "magnitude": _magnitude,
    "random": _random,
    "wanda": _calibrated,
    "sparsegpt": _calibrated,
    "gptq": _calibrated,
    "awq": _calibrated,
    "rtn": _rtn,
    "torchao": _backend,
    "bitsandbytes": _backend,
}


# --- what it costs -------------------------------------------------------------------------------


def cost(model: Model) -> dict[str, float]:
    """Parameters, non-zero parameters, bytes in memory and bytes that a packed format would take."""
    whole = linears(model.anatomy, model.module)
    matrices = {id(m.get_parameter("weight")): m for m in whole.values()}
    packable = {id(m.get_parameter("weight")) for m in _rounded(model, whole)}
    bits: Any = model.achieved.get("bits_stored")
    total = nonzero = packed = 0.0
    for p in {id(p): p for p in model.module.parameters()}.values():
        plain = _matrix(matrices[id(p)]) if id(p) in matrices else p
        total += plain.numel()
        nonzero += int(torch.count_nonzero(plain))
        small = bits and id(p) in packable
        packed += plain.numel() * (bits / 8 if small else p.element_size())
    held = backends.held(model.module)
    return {"parameters": total, "nonzero": nonzero, "bytes": held, "bytes_packed": packed}


def _rounded(model: Model, whole: dict[str, nn.Module]) -> list[nn.Module]:
    """The modules among `whole` that the recipe's rounding step, if any, did not leave alone."""
    steps = model.recipe.steps if model.recipe else ()
    kept = [
        f"{model.anatomy.layers}.{layer}.{path}"
        for step in steps
        if isinstance(step.amount, Integer | Scheme)
        for site, layer in step.keep
        for path in model.anatomy.part(_sublayers(site)[0]).body
    ]
    return [m for n, m in whole.items() if not any(n == k or n.startswith(f"{k}.") for k in kept)]
