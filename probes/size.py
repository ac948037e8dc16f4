"""How many parameters a model has, without loading its weights."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import safe_open

from .load import DEFAULT, exists, packaged


def parameters(source: str) -> float:
    """Parameters of a hub id, a folder, a `.gguf` file or `smollm2`; of a hub id only its
    configuration is fetched.

    Raises:
        LoadError: no such model.
    """
    exists(source)
    path = packaged() if source == DEFAULT else Path(source)
    if path.is_file():
        return _of_gguf(path)
    files = sorted(path.glob("*.safetensors"))
    return sum(map(_of_safetensors, files)) if files else _of_configuration(source)


def _of_gguf(file: Path) -> float:
    import gguf

    return float(sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(file).tensors))


def _of_safetensors(file: Path) -> float:
    """From the header alone."""
    with safe_open(file, framework="pt") as weights:
        return float(sum(math.prod(weights.get_slice(n).get_shape()) for n in weights.keys()))  # noqa: SIM118


def _of_configuration(source: str) -> float:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    return float(sum(p.numel() for p in model.parameters()))
