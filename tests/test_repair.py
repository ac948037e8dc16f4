"""Giving sublayers back: the restored model is the dense one there, and its recipe makes it again."""

from __future__ import annotations

import architectures
import numpy as np
import pytest
import torch
from prunescope.analysis import schema
from prunescope.probes import compress
from prunescope.probes.compress import cost
from prunescope.probes.items import Item, Task
from prunescope.probes.model import encode
from prunescope.probes.patch import changes
from prunescope.probes.recipe import Recipe, RecipeError
from prunescope.probes.repair import arms, repair, restored

TEXTS = ["The cat sat on the mat.", "The dog ran to the red house"]
MADE_AGAIN = {
    "mlp-drop@2": None,
    "block-drop@2": None,
    "joint-drop@3": None,
    "magnitude@0.5": "magnitude@0.5-keep=attn.0,mlp.1",
    "rtn@int4-g16": "rtn@int4-g16-keep=attn.0,mlp.1",
    "bitsandbytes@nf4": "bitsandbytes@nf4-keep=attn.0,mlp.1",
    "attn-drop@layers=0,2+rtn@int8": "attn-drop@layers=2+rtn@int8-keep=attn.0,mlp.1",
}


@pytest.mark.parametrize("recipe", list(MADE_AGAIN))
def test_what_is_given_back_is_dense_and_its_recipe_makes_it_again(tiny, recipe):
    candidate = compress(tiny, Recipe.parse(recipe), calibration=TEXTS)
    before = changes(tiny, candidate)
    places = [("attn", 0), ("mlp", 1)]
    if MADE_AGAIN[recipe] is None:
        layer, site = np.argwhere(before)[0]
        places = [(("attn", "mlp")[site], int(layer))]
    made = restored(tiny, candidate, places)
    after = changes(tiny, made)
    for site, layer in places:
        before[layer, ("attn", "mlp").index(site)] = False
    np.testing.assert_array_equal(after, before)
    assert changes(tiny, candidate).sum() > after.sum(), "the candidate stays as it was"
    if MADE_AGAIN[recipe]:
        assert str(made.recipe) == MADE_AGAIN[recipe]
    again = compress(tiny, made.recipe, calibration=TEXTS)
    batch = encode(tiny, TEXTS)
    torch.testing.assert_close(
        again.module(**batch).logits, made.module(**batch).logits, rtol=1e-5, atol=1e-5
    )
    assert cost(made) == cost(again)


def test_kept_sublayers_count_at_full_size(llama):
    whole, part = (
        cost(compress(llama, Recipe.parse(f"rtn@int4-g16{keep}")))["bytes_packed"]
        for keep in ("", "-keep=mlp.1")
    )
    inside = sum(p.numel() for p in llama.anatomy.blocks(llama.module)[1].mlp.parameters())
    assert part - whole == inside * (4 - (4 + 32 / 16) / 8)
    with pytest.raises(RecipeError, match="has layers 0 to 2"):
        compress(llama, Recipe.parse("rtn@int8-keep=mlp.3"))


@pytest.mark.parametrize("method", ["wanda@0.5", "gptq@int4-g16"])
def test_calibrated_methods_leave_what_is_kept_alone(llama, method):
    candidate = compress(llama, Recipe.parse(f"{method}-keep=attn.1,mlp.2"), calibration=TEXTS)
    assert np.argwhere(~changes(llama, candidate)).tolist() == [[1, 0], [2, 1]]


def test_choices_are_of_equal_bytes():
    blamed = [("mlp", 3), ("attn", 1), ("mlp", 0), ("attn", 4), ("mlp", 2)]
    cosine = [("attn", 4), ("attn", 1), ("mlp", 2), ("mlp", 0), ("mlp", 3)]
    found = arms(blamed, cosine, 3, seed=1)
    assert found["blamed"] == blamed[:3]
    assert found["cosine"] == [("attn", 4), ("mlp", 2), ("mlp", 0)]
    for chosen in found.values():
        assert sorted(site for site, _ in chosen) == ["attn", "mlp", "mlp"]
    assert arms(blamed, cosine, 3, seed=1) == found


def test_repairs_are_scored_on_the_same_items(llama, tmp_path):
    items = tuple(Item(f"i{n}", text, (), 0, ("x",)) for n, text in enumerate(TEXTS))
    tasks = [Task("free", "generation", items, max_new_tokens=3), Task("pick", "choice", ())]
    candidate = compress(llama, Recipe.parse("mlp-drop@2"), calibration=TEXTS)
    blamed = [("mlp", n) for n in candidate.achieved["dropped"]["mlp"]]
    cell = repair(llama, candidate, places=arms(blamed, blamed[::-1], 1), tasks=tasks)
    data = cell["repairs"].to_dataset()
    assert data.arm.values.tolist() == ["none", "blamed", "random", "cosine", "all"]
    assert data.item_id.values.tolist() == ["free/i0", "free/i1"]
    schema.write(cell, tmp_path / "a.nc")
    assert schema.read(tmp_path / "a.nc")["repairs"].attrs == data.attrs


def test_nothing_left_to_do_is_no_recipe():
    llama = architectures.build("llama")
    candidate = compress(llama, Recipe.parse("mlp-drop@layers=1"))
    assert restored(llama, candidate, [("mlp", 1)]).recipe is None
