"""Quantizers of other libraries: torchao and bitsandbytes, each an extra, imported when asked for.

They pack the weights of the decoder layers and compute on them packed; embeddings and unembedding
stay as they are. What they made is described in the model's configuration as transformers
describes it, so that a saved candidate loads there too.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

GROUP = 64  # of torchao@int4 where none is given
LIBRARIES = ("torchao", "bitsandbytes")
BITS = {"nf4": 4 + 32 / 64, "int8": 8.0}  # of bitsandbytes; one 32-bit scale for 64 weights of nf4


class BackendError(ValueError):
    """A library that is not installed, or a model that it cannot quantize."""


def available(library: str) -> None:
    """Raises BackendError, with the command that mends it, where a library is not installed."""
    if importlib.util.find_spec(library) is None:
        raise BackendError(
            f"{library} is not installed: `pip install prunescope[{library}]` brings it; "
            "rtn@int8 and rtn@int4-g64 round without it"
        )


def check(library: str, modules: Iterable[nn.Module]) -> None:
    """Whether a library can quantize these modules, before any work.

    Raises:
        BackendError: not installed, or weights that are no `nn.Linear`.
    """
    available(library)
    other = next((m for m in modules if not isinstance(m, nn.Linear)), None)
    if library == "torchao" and other is not None:
        raise BackendError(
            f"torchao quantizes nn.Linear, and this model keeps its weights in "
            f"{type(other).__name__}; use bitsandbytes or rtn"
        )


def torchao(
    module: Any,
    layers: nn.Module,
    keep: list[str],
    bits: int,
    group: int,
    changing: set[nn.Module],
) -> None:
    """Weight-only integers: 8 bits with a scale per row, or 4 bits with one per `group` weights.

    Args:
        module: the whole model; its configuration takes note.
        layers: the decoder layers, changed in place.
        keep: names of the modules that stay as they are.
        bits: 8 or 4. On a CPU torchao holds 4-bit integers in 8 bits each.
        group: weights per scale (0: a row).
        changing: the modules to pack.
    """
    quantization = _quietly("torchao.quantization")
    from transformers import TorchAoConfig

    kind: Any = (
        quantization.Int8WeightOnlyConfig()
        if bits == 8 and not group
        else quantization.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=quantization.PerGroup(group),
        )
    )
    quantization.quantize_(layers, kind, filter_fn=lambda part, _: part in changing)
    _note(module, TorchAoConfig(quant_type=kind, modules_to_not_convert=keep))


def bitsandbytes(
    module: Any, layers: nn.Module, keep: list[str], scheme: str, changing: set[nn.Module]
) -> None:
    """`nf4` (4-bit normal floats, 64 weights a scale) or `int8` (LLM.int8: activations too).

    Args: as `torchao`; `scheme` is the name.
    """
    library = _quietly("bitsandbytes").nn
    from transformers import BitsAndBytesConfig

    make = _four_bit if scheme == "nf4" else _eight_bit
    for name, part in list(layers.named_modules()):
        if part in changing:
            layers.set_submodule(name, make(library, part).eval())
    settle(layers)
    dtype = module.dtype
    _note(module, BitsAndBytesConfig(
        load_in_4bit=scheme == "nf4", load_in_8bit=scheme == "int8", bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=keep,
    ))  # fmt: skip


def _quietly(name: str) -> Any:
    """Import a library whose notes on missing GPU code say nothing here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    finally:
        logging.disable(before)
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for every product


def _plain(part: Any) -> tuple[Tensor, Any]:
    """Weight `(output, input)` and bias of a linear layer, whichever way it keeps them."""
    weight: Tensor = part.weight.detach()
    return (weight if isinstance(part, nn.Linear) else weight.T).contiguous(), part.bias


def _four_bit(library: Any, part: nn.Module) -> nn.Module:
    weight, bias = _plain(part)
    made = library.Linear4bit(
        *reversed(weight.shape), bias=False, compute_dtype=weight.dtype, quant_type="nf4"
    )
    packed = library.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    made.weight, made.bias = packed.to(weight.device), bias
    return made


def _eight_bit(library: Any, part: nn.Module) -> nn.Module:
    weight, bias = _plain(part)
    made = library.Linear8bitLt(
        *reversed(weight.shape), bias=False, has_fp16_weights=False, threshold=6.0
    )
    packed = library.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    made.weight, made.bias = packed.to(weight.device), bias
    return made


def settle(module: nn.Module) -> None:
    """Have packed weights computed alike on every machine.

    On some processors bitsandbytes repacks 4-bit weights at the first pass, rounds their scales to
    16 bits, and fails on narrow matrices; elsewhere it does not.
    """
    for part in module.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False  # pyright: ignore


def _note(module: Any, config: Any) -> None:
    """Describe what was done as transformers does, so that saving and loading know it."""
    from transformers.quantizers import AutoHfQuantizer

    module.config.quantization_config = config
    module.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    module.is_quantized = True


def packed(module: nn.Module) -> bool:
    """Whether one of the libraries holds this module's weight."""
    weight = getattr(module, "weight", None)
    theirs = type(weight).__module__.startswith("torchao")
    return theirs or hasattr(weight, "quant_state") or hasattr(weight, "SCB")


def unpacked(module: Any) -> Tensor:
    """The weight that a packed module stands for, `(output, input)`, in float32."""
    weight = module.weight
    if hasattr(weight, "quant_state"):
        functional = importlib.import_module("bitsandbytes").functional
        return functional.dequantize_4bit(weight.data, weight.quant_state).float()
    if hasattr(weight, "SCB"):  # the first pass moves the scales into the module's state
        scale = weight.SCB if weight.SCB is not None else module.state.SCB
        return weight.data.float() * (scale.float() / 127)[:, None]
    return weight.dequantize().float()


def held(module: nn.Module) -> float:
    """Bytes of all weights and of what is kept with them (scales, codes), shared ones once."""
    seen: dict[int, float] = {}
    for tensor in module.state_dict().values():
        if isinstance(tensor, Tensor):
            for part in _parts(tensor):
                seen[part.data_ptr()] = part.numel() * part.element_size()
    return sum(seen.values())


def _parts(tensor: Tensor) -> list[Tensor]:
    """The tensors that a tensor subclass consists of, or itself."""
    if type(tensor) in (Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names: list[str] = tensor.__tensor_flatten__()[0]  # pyright: ignore
    return [part for name in names for part in _parts(getattr(tensor, name))]
