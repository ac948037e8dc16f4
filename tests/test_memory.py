"""Whose memory does the damage: every cut against a candidate with a cache put together by hand."""

from __future__ import annotations

import copy

import architectures
import numpy as np
import pytest
import test_decode
from prunescope.analysis import schema
from prunescope.probes import compress, decode
from prunescope.probes.measure import MeasureError
from prunescope.probes.memory import remember
from prunescope.probes.recipe import Recipe
from prunescope.probes.writing import write

PROMPTS, STEPS = ["The cat sat on the mat.", "The dog", "T"], 6


def reference(dense, candidate, prompt, text, cut):
    """KL at every step, by a single cached step on the dense keys of the first `cut` layers."""
    ids, kls = dense.tokenizer(prompt)["input_ids"], []
    for t in range(len(text)):
        mine = [*ids, *text[:t]]
        p, _ = test_decode.log_p(dense, mine)
        if len(mine) > 1:
            theirs = test_decode.readable(test_decode.log_p(dense, mine[:-1])[1], candidate)
            cache = copy.deepcopy(test_decode.log_p(candidate, mine[:-1])[1])
            cache.layers[:cut] = theirs.layers[:cut]
        else:
            cache = None
        q, _ = test_decode.log_p(candidate, mine[-1:], cache)
        kls.append(float((p.exp() * (p - q)).sum()))
    return kls


@pytest.mark.parametrize("recipe", ["magnitude@0.3", "attn-drop@layers=1", "mlp-drop@layers=0"])
def test_every_cut_equals_a_cache_put_together_by_hand(tiny, recipe):
    candidate = compress(tiny, Recipe.parse(recipe))
    found = remember(tiny, candidate, prompts=PROMPTS, steps=STEPS)["memory"].to_dataset()
    texts = write(tiny, PROMPTS, STEPS)
    for i, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        expected = [np.mean(reference(tiny, candidate, prompt, text, cut)) for cut in range(4)]
        np.testing.assert_allclose(found.kl[i], expected, rtol=2e-3, atol=2e-5)


def test_the_ends_are_forced_and_step(llama, tmp_path):
    candidate = compress(llama, Recipe.parse("magnitude@0.3"))
    cell = remember(llama, candidate, prompts=PROMPTS, steps=STEPS)
    kl = decode(llama, candidate, prompts=PROMPTS, steps=STEPS)["steps"].kl.mean("step")
    np.testing.assert_allclose(cell["memory"].kl.isel(cut=0), kl.sel(history="forced"), rtol=1e-3)
    np.testing.assert_allclose(cell["memory"].kl.isel(cut=-1), kl.sel(history="step"), rtol=1e-3)
    schema.write(cell, tmp_path / "a.nc")
    assert schema.read(tmp_path / "a.nc")["memory"].kl.dims == ("prompt", "cut")
    late = compress(llama, Recipe.parse("mlp-drop@layers=2"))  # behind the last attention
    flat = remember(llama, late, prompts=PROMPTS, steps=STEPS)["memory"].kl
    assert float((flat.max("cut") - flat.min("cut")).max()) == 0


def test_models_that_cannot_read_each_other_are_refused(llama):
    with pytest.raises(MeasureError, match="cannot read the keys and values"):
        remember(llama, architectures.build("qwen2"), prompts=PROMPTS)
