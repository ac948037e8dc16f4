"""Quantizers of other libraries, on every architecture, saved and loaded again."""

import json
from dataclasses import replace

import architectures
import pytest
import torch
from prunescope.probes import backends, prune
from prunescope.probes.anatomy import linears
from prunescope.probes.backends import BackendError
from prunescope.probes.compress import check, compress, cost
from prunescope.probes.decode import decode
from prunescope.probes.load import LoadError, load
from prunescope.probes.measure import measure
from prunescope.probes.model import encode
from prunescope.probes.recipe import Recipe, RecipeError
from prunescope.probes.save import save

TEXTS = ["The cat sat on the mat.", "The dog ran to the red house", "1 2 3 4 5 birds sang!"]
RECIPES = ["torchao@int8", "torchao@int4-g16", "bitsandbytes@nf4", "bitsandbytes@int8"]


def packed(tiny, recipe):
    if tiny.name == "tiny-gpt2" and recipe.startswith("torchao"):
        pytest.skip("torchao does not know Conv1D; refused below")
    return compress(tiny, Recipe.parse(recipe), calibration=TEXTS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_library_on_every_architecture(tiny, recipe, tmp_path):
    batch = encode(tiny, TEXTS)
    before = tiny.module(**batch).logits
    candidate = packed(tiny, recipe)
    assert torch.equal(tiny.module(**batch).logits, before), "the dense model is untouched"
    after = candidate.module(**batch).logits
    for role in (tiny.anatomy.embed, tiny.anatomy.unembed):
        assert candidate.module.get_submodule(role).weight is tiny.module.get_submodule(role).weight
    dense, other = cost(tiny), cost(candidate)
    assert other["parameters"] == dense["parameters"]
    assert other["bytes"] < dense["bytes"]
    assert other["bytes_packed"] < dense["bytes_packed"]
    cell = measure(tiny, candidate, prompts=TEXTS)
    assert 0 < float(cell["output"].kl.mean()) < 20
    kl = decode(tiny, candidate, prompts=TEXTS, steps=4)["steps"].kl
    assert float(kl.sel(history="step").max()) > 0
    back = load(save(candidate, tmp_path / "candidate"))
    torch.testing.assert_close(back.module(**batch).logits, after, rtol=1e-5, atol=1e-5)
    assert (back.recipe, back.achieved) == (candidate.recipe, candidate.achieved)
    assert cost(back) == other
    ids = {k: batch[k] for k in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = [m.module.generate(**ids, **options) for m in (back, candidate)]
    assert torch.equal(*written)


@pytest.mark.parametrize(
    "recipe",
    ["attn-drop@1+bitsandbytes@nf4", "torchao@int8+block-drop@1", "wanda@0.5+torchao@int8"],
)
def test_they_compose_and_load_back(recipe, tmp_path):
    llama = architectures.build("llama")
    candidate = compress(llama, Recipe.parse(recipe), calibration=TEXTS)
    back = load(save(candidate, tmp_path / "candidate"))
    batch = encode(llama, TEXTS)
    torch.testing.assert_close(
        back.module(**batch).logits, candidate.module(**batch).logits, rtol=1e-5, atol=1e-5
    )
    if recipe.startswith("wanda"):
        zeros = cost(llama)["parameters"] - cost(candidate)["nonzero"]
        inside = sum(m.weight.numel() for m in linears(llama.anatomy, llama.module).values())
        assert zeros >= inside / 2, "what was zero stays zero"


def test_transformers_loads_what_a_library_packed(tmp_path):
    from transformers import AutoModelForCausalLM

    llama = architectures.build("llama")
    for recipe in ("torchao@int8", "bitsandbytes@nf4"):
        candidate = compress(llama, Recipe.parse(recipe))
        folder = save(candidate, tmp_path / recipe)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        backends.settle(again)  # else it depends on the processor
        batch = encode(llama, TEXTS)
        torch.testing.assert_close(again(**batch).logits, candidate.module(**batch).logits)


def test_what_is_packed_is_what_it_stands_for():
    llama = architectures.build("llama")
    name, module = linears(llama.anatomy, llama.module).popitem()
    for recipe, worst in (("torchao@int8", 0.01), ("torchao@int4-g16", 0.15), ("bitsandbytes@int8", 0.01),
                          ("bitsandbytes@nf4", 0.2)):  # fmt: skip
        candidate = compress(llama, Recipe.parse(recipe))
        plain = backends.unpacked(candidate.module.get_submodule(name))
        error = (plain - module.weight).abs().max() / module.weight.abs().max()
        assert 0 < float(error) < worst, recipe
    grid = prune.round_to_nearest(module.weight, 4, 16)
    ours = (grid - module.weight).square().mean()
    candidate = compress(llama, Recipe.parse("torchao@int4-g16"))
    theirs = backends.unpacked(candidate.module.get_submodule(name)) - module.weight
    assert 1 < float(theirs.square().mean() / ours) < 2, "theirs is symmetric about zero"


def test_what_does_not_work_is_refused_before_any_work(monkeypatch):
    llama, gpt2 = architectures.build("llama"), architectures.build("gpt2")
    with pytest.raises(BackendError, match=r"Conv1D; use bitsandbytes or rtn"):
        check(gpt2, Recipe.parse("torchao@int8"))
    with pytest.raises(RecipeError, match="reads 32 inputs, which 64 does not divide"):
        check(llama, Recipe.parse("torchao@int4"))
    with pytest.raises(RecipeError, match=r"only sublayers can be dropped; put 'wanda@0.5' before"):
        check(llama, Recipe.parse("bitsandbytes@nf4+wanda@0.5"))
    with pytest.raises(RecipeError, match="'int3' is not int8 or int4"):
        Recipe.parse("torchao@int3")
    with pytest.raises(RecipeError, match="'fp4' is not nf4 or int8"):
        Recipe.parse("bitsandbytes@fp4")
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BackendError, match=r"pip install prunescope\[bitsandbytes\]"):
        check(llama, Recipe.parse("bitsandbytes@nf4"))


def test_a_checkpoint_whose_library_is_missing_says_so(llama, tmp_path):
    folder = save(replace(llama), tmp_path / "gptq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match="gptq"):
        load(folder)
