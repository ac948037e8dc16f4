"""Where the parts of a language model are: one table of roles for every architecture.

A decoder layer adds two contributions to the residual stream, attention and MLP. Each contribution
is `post(body(norm(x)))`; norms that an architecture lacks are None. The table is checked against
the forward pass of every model that is loaded (`trace.verify`), so a wrong row cannot go unnoticed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor, nn

Sublayer = Literal["attn", "mlp"]
SUBLAYERS: tuple[Sublayer, Sublayer] = ("attn", "mlp")


class AnatomyError(ValueError):
    """A model whose parts we do not know, or whose parts are not where the table says."""


@dataclass(frozen=True)
class Part:
    """One sublayer, as paths inside a decoder layer: `post(body[-1](… body[0](norm(x))))`."""

    body: tuple[str, ...]
    norm: str | None = None
    post: str | None = None


@dataclass(frozen=True)
class Neurons:
    """The neurons of an MLP, as paths inside a decoder layer.

    `into` are the matrices whose outputs are neurons (each holding them `fused` times over, one
    run after the other), `out` the matrix that reads them; `width` is what configurations call
    their number.
    """

    into: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    out: str = "mlp.down_proj"
    fused: int = 1
    width: str = "intermediate_size"


@dataclass(frozen=True)
class Anatomy:
    """Paths of the roles inside the model, and how a layer puts its two contributions together.

    `parallel` is true where attention and MLP both read the layer's input (GPT-NeoX); then the
    state "after attention" is input + attention, as if the MLP came second. `attn_out` is the matrix
    that writes what attention adds, inside a decoder layer; `norm_adds` is what norms add to their weight
    before they multiply by it (Gemma: 1).
    """

    layers: str
    embed: str
    final_norm: str
    unembed: str
    attn: Part
    mlp: Part
    parallel: bool = False
    neurons: Neurons = Neurons()
    attn_out: str = "self_attn.o_proj"
    norm_adds: float = 0.0

    def part(self, sublayer: Sublayer) -> Part:
        """The attention or the MLP part."""
        return self.attn if sublayer == "attn" else self.mlp

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        """The decoder layers of `module`, in order."""
        layers = module.get_submodule(self.layers)
        return list(layers.children())

    def sublayer(self, block: nn.Module, sublayer: Sublayer) -> list[nn.Module]:
        """The modules of a sublayer's body, in the order in which they run."""
        return [block.get_submodule(path) for path in self.part(sublayer).body]


_LLAMA = Anatomy(
    layers="model.layers",
    embed="model.embed_tokens",
    final_norm="model.norm",
    unembed="lm_head",
    attn=Part(("self_attn",), norm="input_layernorm"),
    mlp=Part(("mlp",), norm="post_attention_layernorm"),
)
_GEMMA2 = replace(
    _LLAMA,
    attn=Part(("self_attn",), norm="input_layernorm", post="post_attention_layernorm"),
    mlp=Part(("mlp",), norm="pre_feedforward_layernorm", post="post_feedforward_layernorm"),
    norm_adds=1.0,
)
_OLMO2 = replace(
    _LLAMA,
    attn=Part(("self_attn",), post="post_attention_layernorm"),
    mlp=Part(("mlp",), post="post_feedforward_layernorm"),
)
_GPT2 = Anatomy(
    layers="transformer.h",
    embed="transformer.wte",
    final_norm="transformer.ln_f",
    unembed="lm_head",
    attn=Part(("attn",), norm="ln_1"),
    mlp=Part(("mlp",), norm="ln_2"),
    neurons=Neurons(("mlp.c_fc",), "mlp.c_proj", width="n_inner"),
    attn_out="attn.c_proj",
)
_NEOX = Anatomy(
    layers="gpt_neox.layers",
    embed="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    unembed="lm_head",
    attn=Part(("attention",), norm="input_layernorm"),
    mlp=Part(("mlp",), norm="post_attention_layernorm"),
    neurons=Neurons(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    attn_out="attention.dense",
)
_OPT = Anatomy(
    layers="model.decoder.layers",
    embed="model.decoder.embed_tokens",
    final_norm="model.decoder.final_layer_norm",
    unembed="lm_head",
    attn=Part(("self_attn",), norm="self_attn_layer_norm"),
    mlp=Part(("fc1", "activation_fn", "fc2"), norm="final_layer_norm"),
    neurons=Neurons(("fc1",), "fc2", width="ffn_dim"),
    attn_out="self_attn.out_proj",
)
_PHI3 = replace(_LLAMA, neurons=Neurons(("mlp.gate_up_proj",), fused=2))

ANATOMIES: dict[str, Anatomy] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": replace(_LLAMA, norm_adds=1.0),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "phi3": _PHI3,
    "olmo2": _OLMO2,
    "smollm3": _LLAMA,
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "opt": _OPT,
}
"""Hugging Face `model_type` -> anatomy. A new architecture is one row here and one in its test."""


def anatomy_of(config: Any) -> Anatomy:
    """The table's row for a model configuration.

    Raises:
        AnatomyError: an architecture outside the table; the message says what to add.
    """
    kind = str(config.model_type)
    if kind not in ANATOMIES:
        near = get_close_matches(kind, ANATOMIES, n=3)
        raise AnatomyError(
            f"architecture {kind!r} is not in the table of anatomies"
            + (f" (nearest: {', '.join(near)})" if near else "")
            + f". Known: {', '.join(ANATOMIES)}. To add it, write one row of paths (layers, embed, "
            "final norm, unembedding, attention, MLP, norms) in probes/anatomy.py and one in its test"
        )
    if kind == "opt" and not (
        config.do_layer_norm_before and config.word_embed_proj_dim == config.hidden_size
    ):
        raise AnatomyError(
            "this OPT model normalises after its sublayers or projects its embeddings (the 350m "
            "variant does both); its residual stream is not a sum of contributions. Use another size"
        )
    anatomy = ANATOMIES[kind]
    return replace(anatomy, parallel=bool(getattr(config, "use_parallel_residual", False)))


def first(output: Any) -> Tensor:
    """The hidden state of a module that may return a tuple with it."""
    return output[0] if isinstance(output, tuple) else output


def contribution(
    anatomy: Anatomy,
    block: nn.Module,
    sublayer: Sublayer,
    hidden: Tensor,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """What a sublayer adds to the residual stream when it reads `hidden`.

    `args` and `kwargs` are what the attention got beside its hidden state in a whole forward pass
    (mask, positions, rotary embeddings, cache); an MLP needs none.
    """
    part = anatomy.part(sublayer)
    x = block.get_submodule(part.norm)(hidden) if part.norm else hidden
    shape = x.shape
    if sublayer == "attn":
        x = _call_attention(block.get_submodule(part.body[0]), x, args, kwargs or {})
    else:
        for module in anatomy.sublayer(block, "mlp"):
            x = first(module(x))
        x = x.view(shape)
    return block.get_submodule(part.post)(x) if part.post else x


def _call_attention(
    attention: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    if "hidden_states" in kwargs:
        return first(attention(*args, **{**kwargs, "hidden_states": x}))
    return first(attention(x, *args[1:], **kwargs))


# --- what stands in for a sublayer that was removed ----------------------------------------------


class DroppedAttention(nn.Module):
    """Adds nothing. Still counts tokens in a key-value cache, one number each.

    transformers reads the length of a cache from its first layer, so an attention that wrote
    nothing at all would silently shift the positions of every later token.
    """

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer_idx = layer

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Zeros of the shape of the hidden states."""
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if cache is not None:
            mark = hidden.new_zeros((hidden.shape[0], 1, hidden.shape[1], 1))
            cache.update(mark, mark, self.layer_idx)
        return torch.zeros_like(hidden), None


class Nothing(nn.Module):
    """Adds nothing: zeros of the shape that it reads."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros like `x`."""
        return torch.zeros_like(x)


def paths(anatomy: Anatomy, sublayer: Sublayer) -> list[str]:
    """Everything that belongs to a sublayer, as paths inside a decoder layer."""
    part = anatomy.part(sublayer)
    return [p for p in (part.norm, *part.body, part.post) if p is not None]


def drop(anatomy: Anatomy, block: nn.Module, sublayer: Sublayer, layer: int) -> None:
    """Take a sublayer with its norms out of a decoder layer, in place."""
    part = anatomy.part(sublayer)
    for path in (part.norm, part.post):
        if path is not None:
            block.set_submodule(path, nn.Identity())
    *head, last = part.body
    for path in head:
        block.set_submodule(path, nn.Identity())
    block.set_submodule(last, DroppedAttention(layer) if sublayer == "attn" else Nothing())


def dropped(anatomy: Anatomy, block: nn.Module, sublayer: Sublayer) -> bool:
    """Whether `drop` has been here."""
    return isinstance(anatomy.sublayer(block, sublayer)[-1], DroppedAttention | Nothing)


def linears(anatomy: Anatomy, module: nn.Module) -> dict[str, nn.Module]:
    """Name -> every weight matrix inside the decoder layers; never embeddings or unembedding."""
    layers = module.get_submodule(anatomy.layers)
    return {
        f"{anatomy.layers}.{name}": m
        for name, m in layers.named_modules()
        if isinstance(m, _kinds())
    }


def matrices_of(block: nn.Module) -> list[nn.Module]:
    """The modules of one decoder layer that hold a weight matrix."""
    return [m for m in block.modules() if isinstance(m, _kinds())]


def _kinds() -> tuple[type[nn.Module], ...]:
    return nn.Linear, _conv1d()


def _conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return Conv1D
