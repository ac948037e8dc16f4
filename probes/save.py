"""Saving a candidate so that it loads back, here always and in transformers where it can.

Zeroed or rounded weights and whole-layer drops are plain models. A model that lost single
sublayers has no form in transformers, which would fill the gaps with random weights without a
word; it is saved under a model type of its own, so that only `prunescope.load` reads it.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from torch import nn

from .anatomy import SUBLAYERS, Anatomy, dropped
from .load import DEPTH, MANIFEST, PER_LAYER, depth_of, set_layers
from .model import Model
from .width import widths

OWN_TYPE = "prunescope-candidate"


class SaveError(ValueError):
    """A folder that cannot take a model."""


def check_target(folder: Path) -> None:
    """Raises SaveError where `folder` holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SaveError(f"{folder} exists and is not empty; name a new folder")


def save(candidate: Model, folder: Path | str) -> Path:
    """Write safetensors, config, tokenizer, `prunescope.json` and a README into a new folder.

    Raises:
        SaveError: the folder holds something already.
    """
    folder = Path(folder)
    check_target(folder)
    module = candidate.clone().module
    module.config = copy.deepcopy(module.config)
    manifest: dict[str, Any] = {"recipe": str(candidate.recipe)} if candidate.recipe else {}
    manifest |= {
        "achieved": candidate.achieved,
        "from": candidate.name,
        "weights": candidate.weights,
    }
    gone = _dropped(candidate.anatomy, module)
    depth = depth_of(module.config)
    kept = manifest["kept"] = _remove_whole_layers(candidate.anatomy, module)
    if len(kept) < candidate.layer_count:
        manifest["depth"] = depth
    gone = {s: [i for i in layers if i in kept] for s, layers in gone.items()}
    sizes = widths(candidate.anatomy, module)
    uneven = _set_width(candidate.anatomy, module.config, sizes)
    own = uneven or any(gone.values())
    if any(gone.values()):
        _leave_plain(candidate.anatomy, module.config, gone, kept)
        manifest["dropped"] = gone
    if uneven:
        manifest["widths"] = sizes
    if own:
        manifest["config"] = module.config.to_dict()  # numbers of the full model
    folder.mkdir(parents=True, exist_ok=True)
    module.save_pretrained(folder)
    candidate.tokenizer.save_pretrained(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
    for name, data in candidate.measured.items():
        data.to_netcdf(folder / f"{name}.nc", engine="h5netcdf")
    if own:
        _hide_from_transformers(folder)
    (folder / "README.md").write_text(_readme(candidate, manifest, own), "utf-8")
    return folder


def _set_width(anatomy: Anatomy, config: Any, sizes: list[int]) -> bool:
    """Write the width of the MLPs into the configuration; whether they differ, so that it cannot be."""
    there = {n for n in sizes if n}
    if len(there) != 1:
        return len(there) > 1
    if hasattr(config, anatomy.neurons.width):
        setattr(config, anatomy.neurons.width, there.pop())
    return False


def _dropped(anatomy: Anatomy, module: nn.Module) -> dict[str, list[int]]:
    blocks = anatomy.blocks(module)
    return {s: [i for i, b in enumerate(blocks) if dropped(anatomy, b, s)] for s in SUBLAYERS}


def _leave_plain(
    anatomy: Anatomy, config: Any, gone: dict[str, list[int]], kept: list[int]
) -> None:
    """Tell a library that packs weights which ones are gone: there is nothing to unpack."""
    packing = getattr(config, "quantization_config", None)
    if packing is None:
        return
    paths = [
        f"{anatomy.layers}.{kept.index(layer)}.{path}"
        for sublayer, layers in gone.items()
        for layer in layers
        for path in anatomy.part("attn" if sublayer == "attn" else "mlp").body
    ]
    name = next(
        n for n in ("llm_int8_skip_modules", "modules_to_not_convert") if hasattr(packing, n)
    )
    setattr(packing, name, [*getattr(packing, name), *paths])


def _remove_whole_layers(anatomy: Anatomy, module: Any) -> list[int]:
    """Delete layers that add nothing; the numbers of the layers that stay."""
    gone = _dropped(anatomy, module)
    kept = [
        i
        for i in range(len(anatomy.blocks(module)))
        if not (i in gone["attn"] and i in gone["mlp"])
    ]
    blocks = anatomy.blocks(module)
    if len(kept) < len(blocks):
        depth = {name: len(kept) for name in DEPTH if name in module.config.to_dict()}
        lists = {n: v for n, v in depth_of(module.config).items() if n in PER_LAYER}
        depth |= {name: [values[i] for i in kept] for name, values in lists.items()}
        set_layers(module, anatomy, [blocks[i] for i in kept], depth)
    return kept


def _hide_from_transformers(folder: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8"))
    file.write_text(
        json.dumps({**config, "model_type": OWN_TYPE, "architectures": []}, indent=1), "utf-8"
    )


def _readme(candidate: Model, manifest: dict[str, Any], own: bool) -> str:
    plain = (
        "Single sublayers were removed, or layers differ in width, which transformers cannot\nexpress: load it with\n"
        "`prunescope.probes.load(folder)`. transformers refuses the folder by its model type,\n"
        "since it would fill the gaps with random weights."
        if own
        else "An ordinary model: `AutoModelForCausalLM.from_pretrained(folder)` or\n`prunescope.probes.load(folder)`."
    )
    return (
        f"# {candidate.label}\n\nMade by prunescope with the recipe `{candidate.recipe}`; "
        f"layers kept: {len(manifest['kept'])} of {candidate.layer_count}.\n\n{plain}\n"
    )
