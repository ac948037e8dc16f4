"""Every recipe on every architecture, against references of a few lines."""

import architectures
import numpy as np
import pytest
import torch
from prunescope.probes.anatomy import dropped, linears
from prunescope.probes.compress import compress, cost, importance, round_to_nearest, sparsity
from prunescope.probes.load import load
from prunescope.probes.measure import measure
from prunescope.probes.model import encode
from prunescope.probes.recipe import Recipe, RecipeError
from prunescope.probes.save import SaveError, save

RECIPES = ["attn-drop@1", "mlp-drop@2", "block-drop@1", "attn-drop@layers=0", "magnitude@0.5", "rtn@int8", "rtn@int4-g16", "attn-drop@1+rtn@int4-g16"]  # fmt: skip
TEXTS = ["The cat sat on the mat.", "The dog ran to the red house", "1 2 3 4 5 birds sang!"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_on_every_architecture(tiny, recipe):
    batch = encode(tiny, TEXTS)
    before = tiny.module(**batch).logits
    candidate = compress(tiny, Recipe.parse(recipe), calibration=TEXTS)
    assert torch.equal(tiny.module(**batch).logits, before), "the dense model is untouched"
    after = candidate.module(**batch).logits
    assert not torch.equal(after, before)
    assert bool(torch.isfinite(after).all())
    assert candidate.recipe == Recipe.parse(recipe)
    for role in (tiny.anatomy.embed, tiny.anatomy.unembed):
        assert candidate.module.get_submodule(role).weight is tiny.module.get_submodule(role).weight


def test_magnitude_zeroes_the_smallest(llama):
    candidate = compress(llama, Recipe.parse("magnitude@0.3"))
    for name, module in linears(llama.anatomy, llama.module).items():
        weight, pruned = module.weight, candidate.module.get_submodule(name).weight
        count = int(weight.numel() * 0.3)
        threshold = weight.abs().flatten().sort().values[count - 1]
        assert torch.equal(pruned, torch.where(weight.abs() <= threshold, 0.0, weight))
    assert candidate.achieved["sparsity"] == pytest.approx(sparsity(candidate))
    assert candidate.achieved["sparsity"] == pytest.approx(0.3, abs=1e-3)


def brute_force_rtn(matrix, bits, group):
    """Round to nearest one weight at a time, in float64."""
    out = np.zeros(matrix.shape)
    for i, row in enumerate(matrix.double().numpy()):
        for start in range(0, len(row), group or len(row)):
            part = row[start : start + (group or len(row))]
            low, high = min(part.min(), 0), max(part.max(), 0)
            scale = (high - low) / (2**bits - 1)
            zero = np.round(-low / scale)
            codes = np.clip(np.round(part / scale) + zero, 0, 2**bits - 1)
            out[i, start : start + len(part)] = (codes - zero) * scale
    return torch.tensor(out)


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 16), (3, 32), (2, 8)])
def test_rounding_equals_brute_force(bits, group):
    torch.manual_seed(bits)
    matrix = torch.randn(20, 64)
    found = round_to_nearest(matrix, bits, group)
    expected = brute_force_rtn(matrix, bits, group)
    step = (matrix.amax() - matrix.amin()) / (2**bits - 1)
    close = (found.double() - expected).abs() < 1e-5
    assert close.double().mean() > 0.999, "but for ties that float32 rounds the other way"
    assert float((found - matrix).abs().max()) <= float(step)
    assert bool((round_to_nearest(matrix * 0, bits, group) == 0).all())
    torch.testing.assert_close(round_to_nearest(found, bits, group), found, rtol=1e-4, atol=1e-5)


def test_importance_is_one_minus_the_cosine(tiny):
    from test_trace import hooked

    found = importance(tiny, TEXTS)
    sums = {name: np.zeros(3) for name in found}
    count = 0
    for text in TEXTS:
        seen = hooked(tiny, encode(tiny, [text]))
        count += seen["layer.0.input"].shape[1]
        for i in range(3):
            x, out = seen[f"layer.{i}.input"], seen[f"layer.{i}.output"]
            mid = x + seen[f"layer.{i}.attn"]
            read = x if tiny.anatomy.parallel else mid
            after = read + seen[f"layer.{i}.mlp"].view_as(x)
            for name, a, b in (("attn", x, mid), ("mlp", read, after), ("block", x, out)):
                sums[name][i] += float(
                    torch.cosine_similarity(a.double(), b.double(), dim=-1).sum()
                )
    for name in found:
        np.testing.assert_allclose(found[name], 1 - sums[name] / count, rtol=1e-3, atol=1e-6)


def test_drops_take_the_least_important_first(llama):
    order = np.argsort(importance(llama, TEXTS)["mlp"])
    candidate = compress(llama, Recipe.parse("mlp-drop@2"), calibration=TEXTS)
    assert candidate.achieved["dropped"] == {"mlp": order[:2].tolist()}
    blocks = candidate.anatomy.blocks(candidate.module)
    assert [dropped(candidate.anatomy, b, "mlp") for b in blocks] == [
        i in order[:2] for i in range(3)
    ]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("attn-drop@3", "1 to 2 can be dropped"),
        ("mlp-drop@layers=3", "has layers 0 to 2"),
        ("rtn@int4-g24", "which 24 does not divide"),
        ("attn-drop@layers=1+attn-drop@layers=1", "changed no weight"),
        ("attn-drop@2+attn-drop@2", "only 1 are left"),
        ("magnitude@0.3+magnitude@0.3", "changed no weight"),
    ],
)
def test_amounts_that_do_not_fit_are_errors(llama, recipe, message):
    with pytest.raises(RecipeError, match=message):
        compress(llama, Recipe.parse(recipe), calibration=TEXTS)


def test_cost_counts_what_is_there(llama):
    dense = cost(llama)
    assert dense["parameters"] == sum(p.numel() for p in llama.module.parameters())
    assert dense["bytes"] == dense["bytes_packed"] == 4 * dense["parameters"]
    block = llama.anatomy.blocks(llama.module)[1]
    part = sum(
        p.numel() for p in (*block.mlp.parameters(), *block.post_attention_layernorm.parameters())
    )
    assert (
        cost(compress(llama, Recipe.parse("mlp-drop@layers=1")))["parameters"]
        == dense["parameters"] - part
    )
    packed = cost(compress(llama, Recipe.parse("rtn@int4-g16")))
    inside = sum(m.weight.numel() for m in linears(llama.anatomy, llama.module).values())
    assert packed["bytes"] == dense["bytes"]
    assert packed["bytes_packed"] == dense["bytes"] - inside * (4 - (4 + 32 / 16) / 8)
    zeroed = cost(compress(llama, Recipe.parse("magnitude@0.5")))
    assert zeroed["parameters"] == dense["parameters"]
    assert zeroed["nonzero"] == pytest.approx(dense["nonzero"] - inside / 2, abs=200)


@pytest.mark.parametrize(
    "recipe",
    [
        "magnitude@0.5",
        "rtn@int4-g16",
        "block-drop@1",
        "attn-drop@1",
        "mlp-drop@1",
        "block-drop@1+attn-drop@1",
    ],
)
def test_a_saved_candidate_loads_back(tiny, recipe, tmp_path):
    candidate = compress(tiny, Recipe.parse(recipe), calibration=TEXTS)
    save(candidate, tmp_path / "candidate")
    back = load(tmp_path / "candidate")
    batch = encode(candidate, TEXTS, side="left")
    torch.testing.assert_close(
        back.module(**batch).logits, candidate.module(**batch).logits, rtol=1e-5, atol=1e-5
    )
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = {k: batch[k] for k in ("input_ids", "attention_mask")}
    assert torch.equal(
        back.module.generate(**ids, **options), candidate.module.generate(**ids, **options)
    )
    assert (back.recipe, back.achieved, back.layer_count) == (
        candidate.recipe,
        candidate.achieved,
        3,
    )
    assert float(measure(candidate, back, prompts=TEXTS)["output"].kl.max()) < 1e-9
    with pytest.raises(SaveError, match="not empty"):
        save(candidate, tmp_path / "candidate")


@pytest.mark.parametrize(
    ("recipe", "plain"), [("block-drop@1", True), ("magnitude@0.5", True), ("attn-drop@1", False)]
)
def test_transformers_loads_what_it_can_and_refuses_the_rest(llama, recipe, plain, tmp_path):
    from transformers import AutoModelForCausalLM

    candidate = compress(llama, Recipe.parse(recipe), calibration=TEXTS)
    folder = save(candidate, tmp_path / "candidate")
    batch = encode(candidate, TEXTS)
    if plain:
        again = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(
            again(**batch).logits, candidate.module(**batch).logits, rtol=1e-5, atol=1e-5
        )
        assert "from_pretrained(folder)" in (folder / "README.md").read_text()
    else:
        with pytest.raises(ValueError, match="prunescope-candidate"):
            AutoModelForCausalLM.from_pretrained(folder)
        assert "prunescope.probes.load(folder)" in (folder / "README.md").read_text()


def test_conv1d_is_read_the_right_way_round():
    model = architectures.build("gpt2")
    candidate = compress(model, Recipe.parse("rtn@int4-g16"))
    name = "transformer.h.0.mlp.c_fc"
    weight = model.module.get_submodule(name).weight  # (input, output) in GPT-2
    assert torch.equal(
        candidate.module.get_submodule(name).weight, round_to_nearest(weight.T, 4, 16).T
    )
