"""What many cells compute alike is computed once."""

from __future__ import annotations

import pytest
import torch
from prunescope.probes import Recipe, compress, neurons
from prunescope.probes.remembered import remembered

TEXTS = ["a few words", "and some more of them", "a third text, a little longer"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNESCOPE_CACHE", str(tmp_path))
    return tmp_path


def test_the_same_weights_asked_the_same_are_asked_once(llama, cache):
    made = []

    def make():
        made.append(1)
        return {"x": torch.arange(3.0) + len(made)}

    first = remembered(llama, "kind", [1, "a"], make)["x"]
    assert torch.equal(remembered(llama.clone(), "kind", [1, "a"], make)["x"], first)
    assert len(made) == 1
    other = llama.clone()
    layer = other.anatomy.blocks(other.module)[0].get_submodule(other.anatomy.neurons.out)
    changed = layer.weight.detach().clone()
    changed[0, 0] += 1e-3
    layer.register_parameter("weight", torch.nn.Parameter(changed, requires_grad=False))
    for asked in ((other, "kind", [1, "a"]), (llama, "kind", [2, "a"]), (llama, "other", [1, "a"])):
        remembered(*asked, make)
    assert len(made) == 4
    assert not [f for f in cache.rglob("*") if f.name.startswith(".writing")]


def test_a_cache_that_is_damaged_or_cannot_be_written_costs_time_only(llama, cache, monkeypatch):
    def make():
        return {"x": torch.ones(2)}

    remembered(llama, "kind", [], make)
    (file,) = cache.rglob("*.safetensors")
    file.write_bytes(b"not safetensors")
    assert torch.equal(remembered(llama, "kind", [], make)["x"], torch.ones(2))
    (cache / "file").write_text("no folder")
    monkeypatch.setenv("PRUNESCOPE_CACHE", str(cache / "file"))
    assert torch.equal(remembered(llama, "kind", [], make)["x"], torch.ones(2))


def test_neurons_are_ranked_by_one_pass_for_all_orders_and_ratios(llama, cache, monkeypatch):
    passes = []
    plain = neurons.activity
    monkeypatch.setattr(neurons, "activity", lambda *a: passes.append(1) or plain(*a))
    ranking = {"counting": [f"{i} and {i + 1}" for i in range(12)]}
    for recipe in ("neurons-reverse@0.3", "neurons-salience@0.3", "neurons-selective@0.5"):
        compress(
            llama, Recipe.parse(f"{recipe},target=counting"), calibration=TEXTS, ranking=ranking
        )
    assert len(passes) == 2, "one over the target's texts, one over the control's"
    first, again = plain(llama, TEXTS), neurons.remembered_activity(llama, TEXTS)
    kept = neurons.remembered_activity(llama, TEXTS)
    for side in ("mean", "variance"):
        for a, b, c in zip(*(getattr(x, side) for x in (first, again, kept)), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(b, c)
