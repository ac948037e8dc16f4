"""What many cells of a study compute alike, kept in the cache folder by the content of the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..analysis.places import beside
from .load import cache_folder
from .model import Model

Tensors = dict[str, Tensor]


def remembered(
    model: Model, kind: str, told: Sequence[object], make: Callable[[], Tensors]
) -> Tensors:
    """What `make` makes of a model, from the cache where the same weights were asked the same before.

    Args:
        model: the same content, on any device, is the same model.
        kind: folder in the cache.
        told: whatever else the result depends on.
        make: named tensors; they come back on the CPU.
    """
    if not all(type(p.data) is Tensor and p.is_floating_point() for p in model.module.parameters()):
        return make()  # packed: part of what its weights are lies elsewhere
    file = cache_folder() / kind / f"{_key(model, told)}.safetensors"
    with suppress(OSError, SafetensorError):
        return load_file(file)
    found = {name: value.cpu().contiguous() for name, value in make().items()}
    # a cache that cannot be written costs time and nothing else
    with suppress(OSError), beside(file) as scratch:
        save_file(found, scratch)
    return found


def _key(model: Model, told: Sequence[object]) -> str:
    asked = (model.module.config.to_json_string(), str(model.module), str(model.dtype), *told)
    key = hashlib.blake2b(json.dumps(asked).encode(), digest_size=32)
    for name, weight in model.module.named_parameters():
        key.update(name.encode())
        key.update(weight.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return key.hexdigest()
