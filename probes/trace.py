"""Tracing: the only module that speaks to nnsight. Everything else asks it for states.

Dense and candidate run in lockstep inside one trace of the dense model: at every layer the
candidate's sublayers are called with what the dense model's own forward pass hands to its
attention (mask, positions, rotary embeddings), on the dense input (`local`) and on the candidate's
own stream (`propagated`). Nothing accumulates: each site is handed to `visit` and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from nnsight import NNsight
from nnsight.intervention.interleaver import OutOfOrderError
from torch import Tensor, nn

from .anatomy import Anatomy, AnatomyError, Sublayer, contribution, first

Batch = dict[str, Any]  # tensors; the mask may be one for each kind of attention


class Site(NamedTuple):
    """The residual stream of both models after one sublayer, `(prompt, token, d_model)` each."""

    layer: int
    sublayer: Sublayer
    dense: Tensor
    local: Tensor
    propagated: Tensor


def wrap(module: nn.Module) -> Any:
    """The nnsight envoy of a module, made anew for each trace.

    It takes milliseconds. A kept one would outlive surgery on the module, waiting for parts that
    are gone, and would keep the module itself in memory.
    """
    return NNsight(module)


def roles(
    module: nn.Module, anatomy: Anatomy, batch: Batch, visit: Callable[[str, Tensor], None]
) -> None:
    """Hand every role of one forward pass to `visit(name, tensor)`, in forward order.

    `embed`, `layer.{i}.input`, `.attn`, `.mlp`, `.output` (contributions as they are added to the
    residual stream), `final_norm.input`, `final_norm.output`, `logits`. What `visit` does not keep is
    freed as in a plain pass: keeping all costs more than the trace itself.
    """
    model = wrap(module)
    attn, mlp = _added(anatomy, "attn"), _added(anatomy, "mlp")
    with torch.no_grad(), model.trace(**batch, use_cache=False):
        visit("embed", model.get(anatomy.embed).output)
        for i, block in enumerate(model.get(anatomy.layers)):
            visit(f"layer.{i}.input", block.input)
            visit(f"layer.{i}.attn", first(block.get(attn).output))
            visit(f"layer.{i}.mlp", first(block.get(mlp).output))
            visit(f"layer.{i}.output", first(block.output))
        norm = model.get(anatomy.final_norm)
        visit("final_norm.input", norm.input)
        visit("final_norm.output", norm.output)
        visit("logits", model.output.logits)


def verify(module: nn.Module, anatomy: Anatomy, softcap: float | None) -> None:
    """Check on one forward pass that the roles of the table are what the model computes.

    Raises:
        AnatomyError: a path that does not exist, or a sum that does not hold; names the role.
    """
    _check_paths(module, anatomy)
    device = next(module.parameters()).device
    ids = torch.arange(1, 6, device=device)[None]
    batch, seen = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, dict[str, Tensor]()
    try:
        roles(module, anatomy, batch, seen.__setitem__)
    except OutOfOrderError as error:
        raise AnatomyError(
            f"the table of anatomies does not describe this model: {error} (roles must be reached in "
            "the order input, attention, MLP, output); mend its row in probes/anatomy.py"
        ) from error
    for i in range(len(anatomy.blocks(module))):
        stream = seen[f"layer.{i}.input"]
        added = stream + seen[f"layer.{i}.attn"] + seen[f"layer.{i}.mlp"].view_as(stream)
        _expect(f"layer {i}: input + attention + MLP = output", added, seen[f"layer.{i}.output"])
        after = seen.get(f"layer.{i + 1}.input", seen["final_norm.input"])
        _expect(f"layer {i}: output = what comes next", seen[f"layer.{i}.output"], after)
    with torch.no_grad():
        logits = module.get_submodule(anatomy.unembed)(seen["final_norm.output"])
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    _expect("unembedding of the final norm = logits", logits, seen["logits"])


def final_states(module: nn.Module, anatomy: Anatomy, batch: Batch, cache: Any = None) -> Tensor:
    """Residual stream before the final norm, `(prompt, token, d_model)`; no unembedding runs.

    A key-value `cache` is read and written as in generation.
    """
    model = wrap(module)
    used = {"past_key_values": cache, "use_cache": cache is not None}
    with torch.no_grad(), model.trace(**batch, **used) as tracer:
        states = model.get(anatomy.final_norm).input.save()
        tracer.stop()
    return states


@contextmanager
def newest_states(module: nn.Module, anatomy: Anatomy) -> Generator[list[Tensor]]:
    """Collects, while the model generates, what the final norm reads at the newest token.

    One `(prompt, d_model)` for each forward pass. A hook, since transformers' own generation runs.
    """
    seen: list[Tensor] = []
    norm = module.get_submodule(anatomy.final_norm)
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, -1].clone()))
    try:
        yield seen
    finally:
        handle.remove()


def lockstep(
    dense: nn.Module,
    candidate: nn.Module,
    anatomy: Anatomy,
    batch: Batch,
    visit: Callable[[Site], None],
) -> tuple[Tensor, Tensor]:
    """Run both models through one trace; `visit` every site in forward order.

    Returns the states before the final norm of both, `(prompt, token, d_model)`.
    """
    model = wrap(dense)
    others = anatomy.blocks(candidate)
    attn, mlp = _added(anatomy, "attn"), _added(anatomy, "mlp")
    own = entry(candidate, anatomy, batch)
    ends: Any = {}
    with torch.no_grad(), model.trace(**batch, use_cache=False) as tracer:
        ends.save()
        for i, (block, other) in enumerate(zip(model.get(anatomy.layers), others, strict=True)):
            x = block.input
            args, kwargs = block.get(anatomy.attn.body[0]).inputs
            a = first(block.get(attn).output)
            pair = _Pair(anatomy, other, args, kwargs)
            own_a = pair.attn(own)
            mid, own_mid = x + a, own + own_a
            visit(Site(i, "attn", mid, mid + (pair.attn(x) - a), own_mid))
            m = first(block.get(mlp).output).view_as(x)
            read, own_read = (x, own) if anatomy.parallel else (mid, own_mid)
            out = first(block.output)
            own_m = pair.mlp(own_read)
            own = own_m + own_a + own if anatomy.parallel else own_mid + own_m  # as the model adds
            visit(Site(i, "mlp", out, out + (pair.mlp(read) - m), own))
        ends["dense"] = model.get(anatomy.final_norm).input
        ends["candidate"] = own
        tracer.stop()
    return ends["dense"], ends["candidate"]


def entry(module: nn.Module, anatomy: Anatomy, batch: Batch) -> Tensor:
    """What a model's first layer reads, `(prompt, token, d_model)`: its own embeddings."""
    model = wrap(module)
    with torch.no_grad(), model.trace(**batch, use_cache=False) as tracer:
        states = model.get(anatomy.layers)[0].input.save()
        tracer.stop()
    return states


def surroundings(
    module: nn.Module, anatomy: Anatomy, batch: Batch
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each layer's attention is called with: its arguments, by place and by name."""
    model = wrap(module)
    found: Any = []
    with torch.no_grad(), model.trace(**batch, use_cache=False) as tracer:
        found.save()
        for block in model.get(anatomy.layers):
            found.append(block.get(anatomy.attn.body[0]).inputs)
        tracer.stop()
    return found


def sublayer_cosines(
    module: nn.Module, anatomy: Anatomy, batch: Batch, mask: Tensor
) -> dict[str, list[float]]:
    """Sum over positions of the cosine of what goes into and what comes out of each sublayer.

    Keys `attn`, `mlp` (residual stream before against after the contribution) and `block`.
    """
    model = wrap(module)
    attn, mlp = _added(anatomy, "attn"), _added(anatomy, "mlp")

    def total(x: Tensor, y: Tensor) -> float:
        cosine = torch.cosine_similarity(x[mask].double(), y[mask].double(), dim=-1)
        return float(cosine.sum())

    sums: Any = {"attn": [], "mlp": [], "block": []}
    with torch.no_grad(), model.trace(**batch, use_cache=False) as tracer:
        sums.save()
        for block in model.get(anatomy.layers):
            x = block.input
            mid = x + first(block.get(attn).output)
            m = first(block.get(mlp).output).view_as(x)
            out = first(block.output)
            sums["attn"].append(total(x, mid))
            sums["mlp"].append(
                total(x if anatomy.parallel else mid, (x if anatomy.parallel else mid) + m)
            )
            sums["block"].append(total(x, out))
        tracer.stop()
    return sums


class _Pair:
    """The candidate's sublayers at one layer, with the attention's surroundings from the trace."""

    def __init__(
        self, anatomy: Anatomy, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.anatomy, self.block, self.args, self.kwargs = anatomy, block, args, kwargs

    def attn(self, hidden: Tensor) -> Tensor:
        return contribution(self.anatomy, self.block, "attn", hidden, self.args, self.kwargs)

    def mlp(self, hidden: Tensor) -> Tensor:
        return contribution(self.anatomy, self.block, "mlp", hidden)


def _added(anatomy: Anatomy, sublayer: Sublayer) -> str:
    """Path of the module whose output is added to the residual stream."""
    part = anatomy.part(sublayer)
    return part.post or part.body[-1]


def _check_paths(module: nn.Module, anatomy: Anatomy) -> None:
    paths = {"layers": anatomy.layers, "embed": anatomy.embed}
    paths |= {"final norm": anatomy.final_norm, "unembedding": anatomy.unembed}
    for role, path in paths.items():
        _find(module, role, path)
    for i, block in enumerate(anatomy.blocks(module)):
        for name in ("attn", "mlp"):
            part = anatomy.part(name)
            for path in (part.norm, *part.body, part.post):
                if path is not None:
                    _find(block, f"{name} of layer {i}", path)


def _find(module: nn.Module, role: str, path: str) -> None:
    try:
        module.get_submodule(path)
    except AttributeError as error:
        raise AnatomyError(
            f"{role}: {type(module).__name__} has no {path!r}; mend its row in probes/anatomy.py"
        ) from error


def _expect(role: str, computed: Tensor, seen: Tensor) -> None:
    tolerance = 1e-4 if seen.dtype in (torch.float32, torch.float64) else 3e-2
    scale = float(seen.float().abs().amax()) + 1e-12
    worst = float((computed.float() - seen.float()).abs().amax()) / scale
    if not worst <= tolerance:
        raise AnatomyError(
            f"the table of anatomies does not describe this model: {role} is off by {worst:.2g} of "
            "its scale in the forward pass; mend its row in probes/anatomy.py"
        )
