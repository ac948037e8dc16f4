import architectures
import numpy as np
import pytest
import reference
import torch
from prunescope.analysis import schema
from prunescope.probes import measure as run
from prunescope.probes.kernels import FIGURES
from prunescope.probes.measure import PLAIN, SPACED, MeasureError
from prunescope.probes.model import encode
from test_trace import TEXTS, candidate_of, reference_sites


def logits_of(model, hidden, lens):
    with torch.no_grad():
        h = (
            model.module.get_submodule(model.anatomy.final_norm)(hidden)
            if lens == "norm"
            else hidden
        )
        z = model.module.get_submodule(model.anatomy.unembed)(h)
    cap = getattr(model.module.config, "final_logit_softcapping", None)
    return cap * torch.tanh(z / cap) if cap else z


@pytest.mark.parametrize("lens", ["norm", "raw"])
def test_every_figure_of_every_site_equals_the_reference(tiny, lens):
    candidate = candidate_of(tiny)
    tree = run(tiny, candidate, prompts=TEXTS, lens=lens, temperature=1.5)
    shifts = tree["shifts"].to_dataset()
    batch = encode(tiny, TEXTS)
    mask = batch["attention_mask"].bool().numpy()
    for place, states in enumerate(reference_sites(tiny, candidate, batch)):
        layer, site = divmod(place, 2)
        for effect in (0, 1):
            here = shifts.isel(layer=layer, site=site, effect=effect)
            h, other = states[0], states[1 + effect]
            truth = reference.figures(
                logits_of(tiny, h, lens), logits_of(candidate, other, lens), 1.5
            )
            angles = reference.angle(h.double(), other.double())
            for name in PLAIN:
                close(here[name].values, truth[name].numpy(), mask, name)
            for name in SPACED:
                for i, values in enumerate((angles[name], truth[f"{name}_z"], truth[f"{name}_p"])):
                    close(here[name].isel(space=i).values, values.numpy(), mask, name)


def close(found, expected, mask, name):
    assert np.isnan(found[~mask]).all()
    atol = 1e-5 if name in ("third_cumulant", "parallel") else 1e-6
    np.testing.assert_allclose(
        found[mask], expected[mask], rtol=2e-2, atol=atol * max(1, np.abs(expected[mask]).max())
    )


def test_a_model_against_itself_is_exactly_zero(tiny):
    tree = run(tiny, tiny, prompts=TEXTS)
    for group in ("shifts", "output"):
        data = tree[group].to_dataset()
        for name in ("kl", "kl_reverse", "js", "tv", "var_p", "angular", "orthogonal", "flip"):
            assert float(data[name].max()) == 0, (group, name)


def test_the_output_alone_is_the_output_of_the_whole(tiny):
    candidate = candidate_of(tiny)
    whole, alone = (run(tiny, candidate, prompts=TEXTS, layerwise=lw) for lw in (True, False))
    assert "shifts" not in alone.children
    for name in alone["output"].data_vars:
        np.testing.assert_allclose(
            alone["output"][name].values, whole["output"][name].values, rtol=1e-5, atol=1e-7
        )
    last = whole["shifts"].to_dataset().isel(layer=-1, site=-1, effect=1)
    np.testing.assert_allclose(last.kl.values, whole["output"].kl.values, rtol=1e-6)


def test_batches_do_not_change_figures(llama, monkeypatch):
    import sys

    from prunescope.probes import measure as _  # noqa: F401  (the function hides the module)

    candidate = candidate_of(llama)
    whole = run(llama, candidate, prompts=TEXTS)
    monkeypatch.setattr(sys.modules["prunescope.probes.measure"], "BATCH_TOKENS", 1)
    single = run(llama, candidate, prompts=TEXTS)
    np.testing.assert_allclose(
        single["shifts"].kl.values, whole["shifts"].kl.values, rtol=2e-3, atol=1e-6
    )


def test_the_tree_says_what_it_holds(llama):
    tree = run(llama, candidate_of(llama), prompts=TEXTS, temperature=0.7)
    attrs = tree["shifts"].attrs
    assert attrs["temperature"] == 0.7
    assert attrs["direction"].startswith("dense first")
    for group, node in tree.children.items():
        schema.check_group(group, node.to_dataset())
    assert len(FIGURES) == len(set(FIGURES))


def test_pairs_that_cannot_be_compared_are_refused(llama):
    import transformers as tf

    other = architectures.build("qwen3")
    deeper = architectures.build("llama")
    config = deeper.module.config
    config.num_hidden_layers = 4
    from dataclasses import replace

    deep = replace(deeper, module=tf.AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(MeasureError, match="has 3 layers, tiny-llama 4"):
        run(llama, deep, prompts=TEXTS)
    run(llama, deep, prompts=TEXTS, layerwise=False)
    run(llama, other, prompts=TEXTS, layerwise=False)
    small = replace(other, tokenizer=_other_tokenizer())
    with pytest.raises(MeasureError, match="different tokenizers"):
        run(llama, small, prompts=TEXTS)
    with pytest.raises(MeasureError, match="no prompts"):
        run(llama, llama, prompts=[])
    with pytest.raises(MeasureError, match="prompt 2 of 2 has no token"):
        run(llama, llama, prompts=["Paris", ""])
    with pytest.raises(ValueError, match="above 0"):
        run(llama, llama, prompts=TEXTS, temperature=0.0)


def _other_tokenizer():
    import copy

    tokenizer = copy.deepcopy(architectures.tokenizer())
    vocabulary = tokenizer.get_vocab()
    first, second = sorted(vocabulary, key=vocabulary.get)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    tokenizer.get_vocab = lambda: vocabulary
    return tokenizer
