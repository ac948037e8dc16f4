"""Wiring: every role that a trace reads is what plain forward hooks see, on every architecture."""

import gc
import weakref

import architectures
import pytest
import torch
from prunescope.probes import trace
from prunescope.probes.anatomy import (
    ANATOMIES,
    AnatomyError,
    anatomy_of,
    contribution,
    drop,
    dropped,
    first,
)  # fmt: skip
from prunescope.probes.model import encode

TEXTS = ["The cat sat on the mat.", "Paris is", "What is the capital of France? Answer: Paris."]


def hooked(model, batch):
    """The same roles by plain forward hooks."""
    anatomy, seen, handles = model.anatomy, {}, []

    def keep(module, name, take):
        handles.append(module.register_forward_hook(
            lambda m, a, k, out: seen.__setitem__(name, take(a, k, out).clone()), with_kwargs=True
        ))  # fmt: skip

    def hidden(a, k, _):
        return k["hidden_states"] if "hidden_states" in k else a[0]

    module = model.module
    keep(module.get_submodule(anatomy.embed), "embed", lambda a, k, out: out)
    for i, block in enumerate(anatomy.blocks(module)):
        keep(block, f"layer.{i}.input", hidden)
        handles.append(block.register_forward_hook(
            lambda m, a, out, n=f"layer.{i}.output": seen.__setitem__(n, first(out).clone())
        ))  # fmt: skip
        for name, part in (("attn", anatomy.attn), ("mlp", anatomy.mlp)):
            keep(
                block.get_submodule(part.post or part.body[-1]),
                f"layer.{i}.{name}",
                lambda a, k, out: first(out),
            )
    norm = module.get_submodule(anatomy.final_norm)
    keep(norm, "final_norm.output", lambda a, k, out: out)
    handles.append(
        norm.register_forward_pre_hook(
            lambda m, a: seen.__setitem__("final_norm.input", a[0].clone())
        )
    )
    with torch.no_grad():
        seen["logits"] = module(**batch, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return seen


def test_every_architecture_of_the_table_is_tested():
    assert set(architectures.CONFIGS) == set(ANATOMIES)


def test_a_trace_of_every_role_equals_plain_hooks_to_the_bit(tiny):
    batch = encode(tiny, TEXTS)
    expected = hooked(tiny, batch)
    found: dict[str, torch.Tensor] = {}
    trace.roles(tiny.module, tiny.anatomy, batch, found.__setitem__)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_the_table_describes_the_forward_pass(tiny):
    trace.verify(
        tiny.module, tiny.anatomy, getattr(tiny.module.config, "final_logit_softcapping", None)
    )


def test_a_wrong_row_is_refused_by_role(llama):
    from dataclasses import replace

    wrong = replace(llama.anatomy, mlp=replace(llama.anatomy.mlp, body=("mlp.down_proj",)))
    trace.verify(llama.module, wrong, None)  # the down projection's output is the MLP's output
    with pytest.raises(AnatomyError, match=r"layer 0: input \+ attention \+ MLP = output is off"):
        trace.verify(
            llama.module,
            replace(llama.anatomy, attn=replace(llama.anatomy.attn, body=("self_attn.q_proj",))),
            None,
        )
    with pytest.raises(AnatomyError, match="in the order input, attention, MLP, output"):
        trace.verify(
            llama.module,
            replace(llama.anatomy, mlp=replace(llama.anatomy.mlp, body=("self_attn.o_proj",))),
            None,
        )
    with pytest.raises(AnatomyError, match="has no 'self_attention'"):
        trace.verify(
            llama.module,
            replace(llama.anatomy, attn=replace(llama.anatomy.attn, body=("self_attention",))),
            None,
        )


def test_an_unknown_architecture_is_refused_by_name():
    import transformers as tf

    with pytest.raises(AnatomyError, match=r"'bloom' is not in the table.*To add it"):
        anatomy_of(tf.BloomConfig())
    with pytest.raises(AnatomyError, match="350m"):
        anatomy_of(tf.OPTConfig(do_layer_norm_before=False))


def test_batched_equals_single(tiny):
    """Left and right padding, mask and positions: a batch gives what each prompt gives alone."""
    for side in ("left", "right"):
        batch = encode(tiny, TEXTS, side=side)
        with torch.no_grad():
            together = tiny.module(**batch).logits
        for i, text in enumerate(TEXTS):
            with torch.no_grad():
                alone = tiny.module(**encode(tiny, [text])).logits[0]
            kept = together[i][batch["attention_mask"][i].bool()]
            torch.testing.assert_close(kept, alone, rtol=1e-3, atol=2e-4)


def candidate_of(model, seed=1):
    """Another random model that shares nothing but the shape."""
    other = model.clone()
    torch.manual_seed(seed)
    for module in other.module.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            new = p + 0.05 * torch.randn_like(p)
            module.register_parameter(name, torch.nn.Parameter(new, requires_grad=False))
    return other


def reference_sites(model, candidate, batch):
    """local and propagated states one sublayer at a time, through the models' own hooks."""
    dense_seen, own_seen = hooked(model, batch), hooked(candidate, batch)
    calls = {}
    handles = [
        block.get_submodule(model.anatomy.attn.body[0]).register_forward_pre_hook(
            lambda m, a, k, i=i: calls.__setitem__(i, (a, k)), with_kwargs=True
        )
        for i, block in enumerate(model.anatomy.blocks(model.module))
    ]
    with torch.no_grad():
        model.module(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    sites = []
    for i, block in enumerate(candidate.anatomy.blocks(candidate.module)):
        x = dense_seen[f"layer.{i}.input"]
        mid = x + dense_seen[f"layer.{i}.attn"]
        with torch.no_grad():
            attn = contribution(model.anatomy, block, "attn", x, *calls[i])
            mlp = contribution(model.anatomy, block, "mlp", x if model.anatomy.parallel else mid)
        own = own_seen[f"layer.{i}.input"]
        sites.append((mid, x + attn, own + own_seen[f"layer.{i}.attn"]))
        sites.append((dense_seen[f"layer.{i}.output"], mid + mlp, own_seen[f"layer.{i}.output"]))
    return sites


@pytest.mark.parametrize("dropping", [False, True], ids=["weights", "drops"])
def test_local_and_propagated_equal_one_sublayer_at_a_time(tiny, dropping):
    candidate = candidate_of(tiny)
    if dropping:
        blocks = candidate.anatomy.blocks(candidate.module)
        drop(candidate.anatomy, blocks[0], "attn", 0)
        drop(candidate.anatomy, blocks[1], "mlp", 1)
    batch = encode(tiny, TEXTS)
    found = []
    trace.lockstep(tiny.module, candidate.module, tiny.anatomy, batch, found.append)
    expected = reference_sites(tiny, candidate, batch)
    mask = batch["attention_mask"].bool()
    assert len(found) == len(expected) == 6
    for site, (dense, local, propagated) in zip(found, expected, strict=True):
        torch.testing.assert_close(site.dense[mask], dense[mask], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(site.local[mask], local[mask], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(site.propagated[mask], propagated[mask], rtol=1e-4, atol=1e-4)


def test_lockstep_ends_where_each_model_ends_alone(tiny):
    candidate, batch = candidate_of(tiny), encode(tiny, TEXTS)
    ends = trace.lockstep(tiny.module, candidate.module, tiny.anatomy, batch, lambda _: None)
    for end, model in zip(ends, (tiny, candidate), strict=True):
        assert torch.equal(end, trace.final_states(model.module, model.anatomy, batch))


def test_a_drop_is_a_zero_contribution_and_generates_with_a_cache(tiny):
    candidate = tiny.clone()
    blocks = candidate.anatomy.blocks(candidate.module)
    for layer, sublayer in ((0, "attn"), (1, "mlp"), (2, "attn")):
        drop(candidate.anatomy, blocks[layer], sublayer, layer)
        assert dropped(candidate.anatomy, blocks[layer], sublayer)
    batch = encode(candidate, TEXTS, side="left")
    seen = hooked(candidate, batch)
    assert float(seen["layer.0.attn"].abs().max()) == 0
    assert float(seen["layer.1.mlp"].abs().max()) == 0
    mask = batch["attention_mask"]
    tokens = candidate.module.generate(
        batch["input_ids"],
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    for row, text in enumerate(TEXTS):  # again without any cache, prompt by prompt
        ids = encode(candidate, [text])["input_ids"]
        for _ in range(12):
            with torch.no_grad():
                ids = torch.cat(
                    [ids, candidate.module(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=-1
                )
        assert tokens[row, -12:].tolist() == ids[0, -12:].tolist()


def test_clones_share_weights_and_leave_the_dense_model_alone(llama):
    batch = encode(llama, TEXTS)
    before = llama.module(**batch).logits
    candidate = llama.clone()
    assert {id(p) for p in candidate.module.parameters()} == {
        id(p) for p in llama.module.parameters()
    }
    drop(candidate.anatomy, candidate.anatomy.blocks(candidate.module)[1], "mlp", 1)
    assert torch.equal(llama.module(**batch).logits, before)
    assert not torch.equal(candidate.module(**batch).logits, before)


def test_a_traced_candidate_is_gone_once_it_is_let_go(llama):
    candidate, batch = candidate_of(llama), encode(llama, TEXTS)
    trace.lockstep(llama.module, candidate.module, llama.anatomy, batch, lambda _: None)
    trace.final_states(candidate.module, candidate.anatomy, batch)
    there = weakref.ref(candidate.module)
    del candidate
    gc.collect()
    assert there() is None
