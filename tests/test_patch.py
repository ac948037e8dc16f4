"""Patching: every patched model against one that is built and run by itself, prompt by prompt."""

from __future__ import annotations

import copy

import architectures
import numpy as np
import pytest
import torch
from prunescope.analysis import causes, schema
from prunescope.probes import compress
from prunescope.probes.anatomy import SUBLAYERS, first
from prunescope.probes.load import load
from prunescope.probes.measure import MeasureError
from prunescope.probes.patch import changes, patch
from prunescope.probes.recipe import Recipe
from prunescope.probes.save import save
from prunescope.probes.score import split

PROMPTS = ["The cat sat on the", "What is the capital of France? Answer:", "The dog ran"]
ANSWERS = [" mat.", " Paris", " to the red house"]


def logits(model, ids):
    with torch.no_grad():
        return model.module(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()


def figures(z, y, ids, start, total=True):
    """Mean KL, flips and the answer's log-probability, in float64."""
    p, q = (x[start - 1 : -1].log_softmax(-1) for x in (z, y))
    chosen = q.gather(1, torch.tensor(ids[start:])[:, None])
    return [
        float((p.exp() * (p - q)).sum(-1).mean()),
        float((p.argmax(-1) != q.argmax(-1)).double().mean()),
        float(chosen.sum() if total else chosen.mean()),
    ]


def mixed(model, other, layer, sublayer):
    """`model` with one sublayer of `other`, its norms included."""
    made = copy.deepcopy(model.module)
    block = model.anatomy.blocks(made)[layer]
    theirs = other.anatomy.blocks(other.module)[layer]
    part = model.anatomy.part(sublayer)
    for path in (part.norm, *part.body, part.post):
        if path is not None:
            block.set_submodule(path, copy.deepcopy(theirs.get_submodule(path)))
    return type(model)(made, model.tokenizer, model.anatomy, "mixed", "")


def written_in(dense, candidate, ids, layer, where):
    """Logits of the candidate with the dense state written in after a layer at some positions."""
    seen = []

    def keep(_, __, output):
        seen.append(first(output))

    def write(_, __, output):
        state = first(output).clone()
        state[:, where] = seen[0][:, where]
        return (state, *output[1:]) if isinstance(output, tuple) else state

    handle = dense.anatomy.blocks(dense.module)[layer].register_forward_hook(keep)
    logits(dense, ids)
    handle.remove()
    handle = candidate.anatomy.blocks(candidate.module)[layer].register_forward_hook(write)
    result = logits(candidate, ids)
    handle.remove()
    return result


@pytest.mark.parametrize(
    "recipe", ["magnitude@0.3", "attn-drop@layers=0,2", "mlp-drop@layers=1", "block-drop@layers=1"]
)
def test_every_patch_equals_the_model_built_by_itself(tiny, recipe):
    candidate = compress(tiny, Recipe.parse(recipe))
    found = patch(tiny, candidate, prompts=PROMPTS, answers=ANSWERS)["patches"].to_dataset()
    for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids, start = split(tiny, prompt, answer)
        z, row = logits(tiny, ids), found.isel(prompt=i)

        def same(prefix, y, row=row, z=z, ids=ids, start=start, **where):
            got = [float(row[f"{prefix}{name}"].sel(where)) for name in ("kl", "flip", "log_p")]
            np.testing.assert_allclose(
                got, figures(z, y, ids, start), rtol=2e-3, atol=5e-5, err_msg=f"{prefix} {where}"
            )

        same("", logits(candidate, ids))
        assert float(row.log_p_dense) == pytest.approx(figures(z, z, ids, start)[2], rel=1e-4)
        for layer in range(3):
            for span, where in (("all", slice(None)), ("last", slice(start - 1, -1))):
                y = written_in(tiny, candidate, ids, layer, where)
                same("depth_", y, layer=layer, span=span)
            for site in SUBLAYERS:
                y = logits(mixed(candidate, tiny, layer, site), ids)
                same("swap_", y, layer=layer, site=site, swap="denoise")
                y = logits(mixed(tiny, candidate, layer, site), ids)
                same("swap_", y, layer=layer, site=site, swap="noise")


def test_texts_without_answers_are_asked_everywhere(llama):
    candidate = compress(llama, Recipe.parse("magnitude@0.3"))
    found = patch(llama, candidate, prompts=PROMPTS)["patches"].to_dataset()
    for i, prompt in enumerate(PROMPTS):
        ids = llama.tokenizer(prompt)["input_ids"]
        expected = figures(logits(llama, ids), logits(candidate, ids), ids, 1, total=False)
        got = [float(found[n][i]) for n in ("kl", "flip", "log_p")]
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)
    assert np.isnan(found.depth_kl.sel(span="last").values).all()
    assert np.isfinite(found.depth_kl.sel(span="all").values).all()


def test_ends_of_the_depth_curve_and_an_unchanged_copy(llama):
    candidate = compress(llama, Recipe.parse("magnitude@0.3"))
    found = patch(llama, candidate, prompts=PROMPTS, answers=ANSWERS)["patches"]
    assert float(abs(found.depth_kl.isel(layer=-1)).max()) == 0, "the last layer: all recovers"
    late = compress(llama, Recipe.parse("mlp-drop@layers=2"))
    found = patch(llama, late, prompts=PROMPTS, answers=ANSWERS)["patches"]
    for layer in (0, 1):  # nothing patched that differs: nothing recovers
        np.testing.assert_array_equal(found.depth_kl.isel(layer=layer).sel(span="all"), found.kl)
    same = patch(llama, llama, prompts=PROMPTS, answers=ANSWERS)["patches"].to_dataset()
    assert not same.changed.any()
    for name in ("kl", "depth_kl", "swap_kl", "swap_flip"):
        assert float(abs(same[name]).max()) == 0, name
    np.testing.assert_array_equal(
        same.swap_log_p, np.broadcast_to(same.log_p_dense.values[:, None, None, None], (3, 3, 2, 2))
    )


def test_parts_of_the_change_against_float64(llama):
    candidate = compress(llama, Recipe.parse("magnitude@0.3"))
    found = patch(llama, candidate, prompts=PROMPTS, answers=ANSWERS)["patches"].to_dataset()
    for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids, start = split(llama, prompt, answer)
        z, y = logits(llama, ids), logits(candidate, ids)
        d = y - z
        common = d.mean(-1, keepdim=True).expand_as(d)
        top = torch.zeros_like(d).scatter(1, z.topk(10).indices, 1.0) * d
        for part, piece in (
            ("common", common),
            ("rest", d - common),
            ("top", top),
            ("tail", d - top),
        ):
            expected = figures(z, z + piece, ids, start)
            row = found.sel(part=part).isel(prompt=i)
            got = [float(row[f"part_{n}"]) for n in ("kl", "flip", "log_p")]
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-6, err_msg=part)
            share = (piece**2).sum(-1) / (d**2).sum(-1)
            assert float(row.part_share) == pytest.approx(
                float(share[start - 1 : -1].mean()), rel=1e-3
            )
    kl, share = found.part_kl, found.part_share
    assert float(kl.sel(part="common").max()) < 1e-9, "softmax does not see a common shift"
    assert float(kl.sel(part="parallel").max()) < 1e-9, "nor does an RMS norm a change of length"
    for pair in (("parallel", "orthogonal"), ("common", "rest"), ("top", "tail")):
        np.testing.assert_allclose(share.sel(part=list(pair)).sum("part"), 1, rtol=1e-5)


def corrupted(model, layer, sublayer, seed):
    """A copy in which one matrix of one sublayer has noise."""
    candidate = model.clone(name="corrupted")
    block = candidate.anatomy.blocks(candidate.module)[layer]
    matrix = next(
        m for m in candidate.anatomy.sublayer(block, sublayer)[-1].modules() if hasattr(m, "weight")
    )
    noise = 0.5 * torch.randn(matrix.weight.shape, generator=torch.Generator().manual_seed(seed))
    weight = matrix.weight + matrix.weight.std() * noise
    matrix.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
    return candidate


@pytest.mark.parametrize("seed", range(20))
def test_planted_damage_is_found_among_rounded_sublayers(seed):
    """Everything is rounded a little, one sublayer is corrupted: it must come first."""
    dense = architectures.build("llama", seed=seed)
    rng = np.random.default_rng(seed)
    layer, site = int(rng.integers(3)), str(rng.choice(SUBLAYERS))
    candidate = corrupted(compress(dense, Recipe.parse("rtn@int8")), layer, site, seed)
    assert changes(dense, candidate).all()
    cell = patch(dense, candidate, prompts=PROMPTS, answers=ANSWERS)["patches"].to_dataset()
    worst = causes.ranking(cell, "kl")[0]
    assert (worst.layer, worst.site) == (layer, site)
    alone = corrupted(dense, layer, site, seed)
    assert np.argwhere(changes(dense, alone)).tolist() == [[layer, SUBLAYERS.index(site)]]


def test_deleted_layers_keep_their_numbers(llama, tmp_path):
    """A candidate without a whole layer, saved and loaded, is patched at its original places."""
    candidate = compress(llama, Recipe.parse("block-drop@layers=1"))
    back = load(save(candidate, tmp_path / "candidate"))
    assert np.argwhere(changes(llama, back)).tolist() == [[1, 0], [1, 1]]
    cells = [
        patch(llama, model, prompts=PROMPTS, answers=ANSWERS)["patches"]
        for model in (candidate, back)
    ]
    for name in ("kl", "depth_kl", "swap_kl", "swap_log_p"):
        np.testing.assert_allclose(cells[0][name], cells[1][name], rtol=1e-4, atol=1e-7)


def test_cells_with_patches_are_written_and_read(llama, tmp_path):
    candidate = compress(llama, Recipe.parse("mlp-drop@1"))
    cell = patch(llama, candidate, prompts=PROMPTS, answers=ANSWERS)
    schema.write(cell, tmp_path / "a.nc")
    back = schema.read(tmp_path / "a.nc")
    np.testing.assert_array_equal(back["patches"].swap_kl, cell["patches"].swap_kl)


def test_bad_input_is_refused_before_anything_runs(llama):
    other = architectures.build("qwen2")
    with pytest.raises(MeasureError, match=r"(?:no counterparts|other architecture|positions)"):
        patch(llama, other, prompts=PROMPTS)
    with pytest.raises(MeasureError, match="1 answers for 3 prompts"):
        patch(llama, llama, prompts=PROMPTS, answers=[" mat."])
    with pytest.raises(MeasureError, match="no prompts"):
        patch(llama, llama, prompts=[])
    with pytest.raises(MeasureError, match="prompt 1 has a single token"):
        patch(llama, llama, prompts=["T"])
