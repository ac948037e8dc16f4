"""Decoding: every history against a reference that runs one prompt and one step at a time."""

from __future__ import annotations

import copy
from dataclasses import replace

import architectures
import numpy as np
import pytest
import torch
from prunescope.analysis import decoding, schema
from prunescope.probes import compress, decode
from prunescope.probes.anatomy import dropped
from prunescope.probes.decode import DecodeError
from prunescope.probes.measure import MeasureError
from prunescope.probes.recipe import Recipe
from prunescope.probes.writing import write
from transformers import DynamicCache

PROMPTS = ["The cat sat on the mat.", "The dog", "What is the capital of France? Answer:", "T"]
STEPS = 12


@pytest.fixture(scope="module")
def pair():
    dense = architectures.build("llama")
    return dense, compress(dense, Recipe.parse("magnitude@0.3"))


def plain_write(model, prompt, steps):
    """Greedy text with the whole prefix computed again at every step, one prompt, no cache."""
    ids = model.tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + steps:
        with torch.no_grad():
            z = model.module(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids = [*ids, int(z.argmax())]
        if ids[-1] == model.tokenizer.eos_token_id:
            break
    return ids[start:]


def log_p(model, ids, cache=None):
    with torch.no_grad():
        out = model.module(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
    return out.logits[0, -1].double().log_softmax(-1), out.past_key_values


def readable(cache, candidate):
    """A copy of a cache in which dropped attentions find what they write: counts, no keys."""
    cache = copy.deepcopy(cache)
    blocks = candidate.anatomy.blocks(candidate.module)
    for layer, block in zip(cache.layers, blocks, strict=False):
        if dropped(candidate.anatomy, block, "attn"):
            layer.keys = layer.values = layer.keys[:, :1, :, :1]
    return cache


def reference_kl(dense, candidate, prompt, text, other):
    """KL of all histories, prefix by prefix; `step` by a real cached step on the dense cache."""
    ids = dense.tokenizer(prompt)["input_ids"]
    rows = []
    for t in range(len(text)):
        mine = [*ids, *text[:t]]
        p, _ = log_p(dense, mine)
        cache = log_p(dense, mine[:-1])[1] if len(mine) > 1 else DynamicCache()
        found = [log_p(candidate, mine[-1:], readable(cache, candidate))[0]]
        found += [log_p(candidate, mine)[0]]
        if t < len(other):
            theirs = [*ids, *other[:t]]
            found += [log_p(candidate, theirs)[0], log_p(dense, theirs)[0]]
        kls = [float((p.exp() * (p - q)).sum()) for q in found]
        rows.append(kls + [np.nan] * (4 - len(kls)))
    return np.array(rows)


@pytest.mark.parametrize("recipe", ["magnitude@0.3", "attn-drop@layers=0,2", "mlp-drop@layers=1"])
def test_all_histories_equal_single_cached_steps_on_every_architecture(tiny, recipe):
    candidate = compress(tiny, Recipe.parse(recipe))
    cell = decode(tiny, candidate, prompts=PROMPTS, steps=STEPS)
    steps = cell["steps"].to_dataset()
    for i, prompt in enumerate(PROMPTS):
        texts = [plain_write(model, prompt, STEPS) for model in (tiny, candidate)]
        for s, text in enumerate(texts):
            found = steps.token.values[i, :, s]
            assert found[found >= 0].tolist() == text
        kl = reference_kl(tiny, candidate, prompt, *texts)
        found = steps.kl.values[i, : len(kl)]
        np.testing.assert_allclose(found, kl, rtol=2e-3, atol=2e-5)
        assert np.isnan(steps.kl.values[i, len(kl) :]).all()


def test_windows_are_passed_by_the_tests_above():
    for name in ("mistral", "gemma2", "gemma3_text"):
        config = architectures.build(name).module.config
        longest = max(len(architectures.tokenizer()(p)["input_ids"]) for p in PROMPTS)
        assert config.sliding_window < longest + STEPS - 1, name


def test_laws_of_the_histories(pair):
    dense, candidate = pair
    steps = decode(dense, candidate, prompts=PROMPTS, steps=STEPS)["steps"].to_dataset()
    kl = steps.kl
    first = kl.isel(step=0)
    np.testing.assert_allclose(first.sel(history="forced"), first.sel(history="free"), rtol=1e-4)
    np.testing.assert_allclose(first.sel(history="swapped"), 0, atol=1e-9)
    assert (
        decoding.survival(steps).agreement == 1.0
    )  # greedy: the first forced flip parts the texts
    time, parts = decoding.divergence(steps)
    for i, (t, parted) in enumerate(zip(time, parts, strict=True)):
        upto = slice(0, t + 1)  # until the texts part, free is forced and swapped is nothing
        np.testing.assert_allclose(
            kl.sel(history="free").values[i, upto], kl.sel(history="forced").values[i, upto], rtol=1e-3,
            atol=1e-7,
        )  # fmt: skip
        np.testing.assert_allclose(kl.sel(history="swapped").values[i, upto], 0, atol=1e-9)
        if parted and t + 1 < STEPS and np.isfinite(kl.sel(history="swapped").values[i, t + 1]):
            assert kl.sel(history="swapped").values[i, t + 1] > 0


def test_a_model_against_itself_never_parts(pair):
    dense, _ = pair
    steps = decode(dense, dense, prompts=PROMPTS, steps=STEPS)["steps"].to_dataset()
    assert np.nanmax(steps.kl.values) <= 1e-9
    assert not decoding.divergence(steps)[1].any()
    assert np.nanmax(steps.flip.values) == 0


def test_a_model_without_attention_has_no_memory(pair):
    dense, _ = pair
    candidate = compress(dense, Recipe.parse("attn-drop@layers=0,1,2"))
    steps = decode(dense, candidate, prompts=PROMPTS, steps=STEPS)["steps"].to_dataset()
    kl = steps.kl.values
    np.testing.assert_allclose(kl[..., 0], kl[..., 1], rtol=1e-5)  # step = forced: nothing is read
    assert "reads nothing" in steps.attrs["step_history"]


def test_layers_without_counterparts_leave_step_out(pair):
    dense, _ = pair
    other = replace(architectures.build("qwen2"), weights="other")
    steps = decode(dense, other, prompts=PROMPTS, steps=4)["steps"].to_dataset()
    assert np.isnan(steps.kl.sel(history="step").values).all()
    assert np.isfinite(steps.kl.sel(history="forced").values[:, 0]).all()
    assert "no counterparts" in steps.attrs["step_history"]


def test_temperatures_are_what_decoding_at_each_gives(pair):
    dense, candidate = pair
    settings = {"prompts": PROMPTS, "steps": 5}
    cell = decode(dense, candidate, **settings, temperatures=(0.3, 1.5))
    for i, T in enumerate((0.3, 1.5)):
        alone = decode(dense, candidate, **settings, temperature=T, temperatures=())
        for name in ("kl", "tv", "entropy_candidate", "var_p"):
            np.testing.assert_array_equal(
                cell["temperatures"][name].values[..., i], alone["steps"][name].values
            )


def test_draws_follow_the_distribution_and_share_their_noise(pair):
    dense, candidate = pair
    prompts = [PROMPTS[1]] * 600
    T = 0.7
    first = np.array([row[0] for row in write(dense, prompts, 1, temperature=T, seed=3)])
    p, _ = log_p(dense, dense.tokenizer(prompts[0])["input_ids"])
    p = ((p / T).softmax(-1)).numpy()
    counts = np.bincount(first, minlength=len(p))
    likely = p > 0.02
    spread = np.sqrt(600 * p * (1 - p))
    assert (np.abs(counts - 600 * p)[likely] < 4.5 * spread[likely]).all()
    again = np.array([row[0] for row in write(dense, prompts, 1, temperature=T, seed=3)])
    assert (first == again).all()
    assert (first != [r[0] for r in write(dense, prompts, 1, temperature=T, seed=4)]).any()
    q, _ = log_p(candidate, dense.tokenizer(prompts[0])["input_ids"])
    q = ((q / T).softmax(-1)).numpy()
    tv = 0.5 * np.abs(p - q).sum()
    other = np.array([row[0] for row in write(candidate, prompts, 1, temperature=T, seed=3)])
    same = (first == other).mean()
    noise = 4 * np.sqrt(0.25 / 600)
    assert (1 - tv) / (1 + tv) - noise <= same <= 1 - tv + noise  # the predicted band
    few = write(dense, prompts[:3], 4, temperature=T, seed=3)
    assert few == write(dense, prompts[:6], 4, temperature=T, seed=3)[:3]  # whatever the batch


def test_what_was_written_can_be_given(pair):
    dense, candidate = pair
    texts = write(dense, PROMPTS, STEPS)
    a = decode(dense, candidate, prompts=PROMPTS, steps=STEPS)
    b = decode(dense, candidate, prompts=PROMPTS, steps=STEPS, written=texts)
    for name, found in b["steps"].data_vars.items():
        if found.dtype.kind == "f":  # one pass over the texts for the cached steps of writing them
            np.testing.assert_allclose(found, a["steps"][name], rtol=1e-3, atol=1e-6, err_msg=name)
        else:
            assert found.identical(a["steps"][name]), name
    c = decode(dense, candidate, prompts=PROMPTS, steps=STEPS, written=texts)
    assert c["steps"].to_dataset().identical(b["steps"].to_dataset())


def test_in_sixteen_bits_histories_are_passes():
    """Cached steps differ from passes there, and the difference must not pass for damage."""
    dense = architectures.build("llama")
    dense.module.to(torch.bfloat16)
    kl = decode(dense, dense, prompts=PROMPTS, steps=STEPS)["steps"].kl
    assert float(kl.sel(history="forced").max()) == 0
    assert float(kl.sel(history="swapped").max()) == 0


def test_cells_with_steps_are_written_and_read(pair, tmp_path):
    dense, candidate = pair
    cell = decode(dense, candidate, prompts=PROMPTS, steps=4)
    schema.write(cell, tmp_path / "a.nc")
    back = schema.read(tmp_path / "a.nc")
    np.testing.assert_array_equal(back["steps"].kl.values, cell["steps"].kl.values)
    assert back["steps"].token_text.values.tolist() == cell["steps"].token_text.values.tolist()


def test_bad_input_is_refused_before_anything_runs(pair, monkeypatch):
    dense, candidate = pair
    monkeypatch.setattr(type(dense.module), "generate", None)
    monkeypatch.setattr(type(dense.module), "forward", None)

    def bad(match, error=DecodeError, dense=dense, candidate=candidate, **changes):
        settings = {"prompts": PROMPTS, "steps": 4} | changes
        with pytest.raises(error, match=match):
            decode(dense, candidate, **settings)

    bad(r"prompt 1 has \d+ tokens; with 4 steps that passes the context", prompts=["cat " * 300])
    bad(r"at most \d+ steps", steps=256)
    bad("0 steps were asked for", steps=0)
    bad(r"temperature 0 cannot be used.*greedy", temperature=0)
    bad(r"temperature -1", sampled=True, temperature=-1)
    bad(r"temperature nan", temperatures=(float("nan"),))
    bad("no prompts", MeasureError, prompts=[])
    tokenizer = copy.deepcopy(dense.tokenizer)
    tokenizer.eos_token = None
    bad("no end-of-text token", dense=replace(dense, tokenizer=tokenizer))
    swapped = copy.deepcopy(dense.tokenizer)
    vocabulary = swapped.get_vocab()
    monkeypatch.setattr(
        swapped, "get_vocab", lambda: {t: (i + 1) % 384 for t, i in vocabulary.items()}
    )
    bad("different tokenizers", MeasureError, candidate=replace(candidate, tokenizer=swapped))
