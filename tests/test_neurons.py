"""Neurons: statistics against loops in float64, cuts against zeroes, texts that rank and score apart."""

import json

import numpy as np
import pytest
import torch
import xarray as xr
from prunescope.probes import backends, load_tasks, neurons
from prunescope.probes.compress import compress
from prunescope.probes.items import TaskError, without_examples
from prunescope.probes.load import load
from prunescope.probes.model import encode
from prunescope.probes.recipe import Neurons, Recipe, RecipeError
from prunescope.probes.save import save
from prunescope.probes.speed import _read, peak_bytes
from prunescope.probes.width import cut, narrow, width, widths

TARGET = ["The cat sat on the mat.", "The dog ran to the red house, and 1 2 3", "4 5 birds sang!"]
CONTROL = ["Paris is.", "What is the capital of France? Answer: Paris."]
RANKING = {"a": TARGET, "b": CONTROL}


def looped(model, texts):
    """Item means of |input of the down projection|, one text at a time, in float64."""
    found, seen = [], {}
    handles = [
        block.get_submodule(model.anatomy.neurons.out).register_forward_pre_hook(
            lambda _, args, i=i: seen.__setitem__(i, args[0].double().abs())
        )
        for i, block in enumerate(model.anatomy.blocks(model.module))
    ]
    for text in texts:
        model.module(**encode(model, [text]))
        found.append([seen[i].view(-1, seen[i].shape[-1]).mean(0) for i in sorted(seen)])
    for handle in handles:
        handle.remove()
    return [torch.stack(layer) for layer in zip(*found, strict=True)]


def test_activity_is_the_mean_over_tokens_then_items(tiny):
    found = neurons.activity(tiny, TARGET)
    for layer, items in enumerate(looped(tiny, TARGET)):
        torch.testing.assert_close(found.mean[layer], items.mean(0), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found.variance[layer], items.var(0), rtol=1e-3, atol=1e-7)


def test_a_token_that_only_begins_does_not_count(llama):
    class Begun:
        bos_token_id, pad_token_id = 1, 0

        def __call__(self, text):
            return {"input_ids": [1, *llama.tokenizer(text)["input_ids"]]}

    import dataclasses

    begun = dataclasses.replace(llama, tokenizer=Begun())
    found = neurons.activity(begun, TARGET)
    seen = {}
    out = llama.anatomy.blocks(llama.module)[0].mlp.down_proj
    handle = out.register_forward_pre_hook(lambda _, args: seen.__setitem__(0, args[0]))
    means = []
    for text in TARGET:
        llama.module(input_ids=torch.tensor([begun.tokenizer(text)["input_ids"]]))
        means.append(seen[0][0, 1:].double().abs().mean(0))
    handle.remove()
    torch.testing.assert_close(found.mean[0], torch.stack(means).mean(0), rtol=1e-4, atol=1e-7)


def test_every_variant_follows_its_formula(llama):
    sides = [neurons.activity(llama, texts) for texts in (TARGET, CONTROL)]
    (t, c), (v, w) = ([s.mean[1] for s in sides], [s.variance[1] for s in sides])
    expected = {
        "difference": t - c,
        "normalised": (t - c) / (t + c),
        "ratio": t / c,
        "standardised": (t - c) / (0.5 * (v + w)).sqrt(),
    }
    for metric, value in expected.items():
        torch.testing.assert_close(neurons.specific(*sides, metric)[1], value)
    down = llama.anatomy.blocks(llama.module)[1].mlp.down_proj.weight
    found = neurons.salience(llama, sides[0])[1]
    torch.testing.assert_close(found, t * down.double().norm(dim=0))


def test_a_neuron_that_nothing_excites_is_neutral():
    none = neurons.Activity([torch.zeros(2).double()], [torch.zeros(2).double()])
    for metric, neutral in (
        ("normalised", 0),
        ("difference", 0),
        ("ratio", 1),
        ("standardised", 0),
    ):
        assert neurons.specific(none, none, metric)[0].tolist() == [neutral] * 2


def test_cutting_equals_zeroing(tiny):
    batch, kept = encode(tiny, TARGET), torch.tensor([0, 3, 5, 17, 40, 63])
    zeroed, made = tiny.clone(), tiny.clone()
    for block in made.anatomy.blocks(made.module):
        cut(made.anatomy, block, kept)
    for block in zeroed.anatomy.blocks(zeroed.module):
        out = block.get_submodule(zeroed.anatomy.neurons.out)
        linear = isinstance(out, torch.nn.Linear)
        weight = out.weight.clone() if linear else out.weight.T.clone()
        gone = torch.ones(weight.shape[1], dtype=torch.bool)
        gone[kept] = False
        weight[:, gone] = 0
        new = weight if linear else weight.T.contiguous()
        out.register_parameter("weight", torch.nn.Parameter(new, requires_grad=False))
    torch.testing.assert_close(
        made.module(**batch).logits, zeroed.module(**batch).logits, rtol=1e-4, atol=1e-4
    )
    assert widths(made.anatomy, made.module) == [6] * 3
    whole, less = (sum(p.numel() for p in m.module.parameters()) for m in (tiny, made))
    block, small = (m.anatomy.blocks(m.module)[0] for m in (tiny, made))
    assert whole - less == 3 * sum(
        p.numel() - q.numel() for p, q in zip(block.parameters(), small.parameters(), strict=True)
    )


ORDERS = ("selective", "reverse", "random", "salience", "salience-reverse")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_orders_cut_what_their_names_say(llama, order, scope):
    share = 0.25
    recipe = Recipe.parse(f"neurons-{order}@{share},target=a,control=b,scope={scope},multiple=1")
    made = compress(llama, recipe, ranking=RANKING)
    sides = [neurons.activity(llama, texts) for texts in (TARGET, CONTROL)]
    values = neurons.salience(llama, sides[0])
    if not order.startswith("salience"):
        values = neurons.specific(*sides, "normalised")
    if order.endswith("reverse"):
        values = [-v for v in values]
    kept = made.measured["neurons"].kept.values == 1
    assert kept.sum() == 3 * 48
    if order == "random":
        selective = compress(
            llama, Recipe.parse(str(recipe).replace("random", "selective")), ranking=RANKING
        )
        assert made.achieved["neurons"]["widths"] == selective.achieved["neurons"]["widths"]
        again = compress(llama, recipe, ranking=RANKING, seed=7)
        assert not np.array_equal(again.measured["neurons"].kept.values == 1, kept)
        return
    table = torch.stack(values).numpy()
    rows = [(table, kept)] if scope == "global" else zip(table, kept, strict=True)
    for value, stays in rows:
        assert value[stays].min() >= value[~stays].max()


def test_kept_widths_are_multiples_and_both_ratios_are_told(llama):
    made = compress(llama, Recipe.parse("neurons-reverse@0.2,target=a,control=b"), ranking=RANKING)
    told = made.achieved["neurons"]
    assert told["widths"] == widths(made.anatomy, made.module) == [48] * 3
    assert (told["asked"], told["cut"]) == (0.2, 0.25)
    assert (told["target"], told["control"], told["items"]) == ("a", ["b"], [3, 2])
    spared = Recipe.parse("neurons-reverse@0.2,target=a,control=b-keep=mlp.1")
    assert compress(llama, spared, ranking=RANKING).achieved["neurons"]["widths"] == [48, 64, 48]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_was_cut_loads_back(tiny, scope, tmp_path):
    recipe = f"neurons-selective@0.5,target=a,control=b,scope={scope},metric=difference"
    made = compress(tiny, Recipe.parse(recipe), ranking=RANKING)
    folder = save(made, tmp_path / "made")
    again, batch = load(folder), encode(tiny, TARGET, side="left")
    assert torch.equal(again.module(**batch).logits, made.module(**batch).logits)
    written = [
        m.module.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
        for m in (again, made)
    ]
    assert torch.equal(*written)
    assert widths(again.anatomy, again.module) == made.achieved["neurons"]["widths"]
    whole = save(tiny, tmp_path / "whole")
    sizes = [sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (folder, whole)]
    assert sizes[0] < sizes[1]
    with xr.open_dataset(folder / "neurons.nc", engine="h5netcdf") as data:
        assert set(data.data_vars) == {"activation", "spread", "selectivity", "salience", "kept"}
    uneven = len(set(made.achieved["neurons"]["widths"])) > 1
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    assert (kind == "prunescope-candidate") == uneven
    assert (again.recipe, again.achieved) == (made.recipe, made.achieved)


def test_weights_that_do_not_fit_are_an_error(llama, tmp_path):
    from prunescope.probes.load import LoadError
    from safetensors.torch import load_file, save_file

    recipe = Recipe.parse("neurons-selective@0.5,target=a,control=b,scope=global")
    folder = save(compress(llama, recipe, ranking=RANKING), tmp_path / "made")
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(
        LoadError,
        match=r"1 weights of its configuration are not in its files.*layers\.0\.mlp\.up_proj",
    ):
        load(folder)


def test_texts_that_rank_are_not_those_that_score():
    tasks = [t.limited(30) for t in load_tasks(["counting"])]
    pool = neurons.pools(["counting"], scored=tasks)["counting"]
    every = load_tasks(["counting"])[0].items
    assert len(pool) == len(every) - 30
    asked = {i.prompt + i.right for i in tasks[0].items}
    assert not asked & set(pool)
    with pytest.raises(TaskError, match=r"leaves 0 to rank neurons by.*--limit"):
        neurons.pools(["counting"], scored=load_tasks(["counting"]))
    own = without_examples(pool)
    assert own == [text.rsplit("\n", 1)[-1] for text in pool], "solved examples are left out"


def test_a_candidate_is_not_scored_on_what_ranked_it(llama):
    made = compress(llama, Recipe.parse("neurons-reverse@0.3,target=counting,control=plurals"))
    for name in ("counting", "plurals"):
        with pytest.raises(TaskError, match=f"{name}: .* have ranked the neurons"):
            neurons.check_apart("made", made.achieved, load_tasks([name]))
    neurons.check_apart("made", made.achieved, load_tasks(["kinds"]))
    neurons.check_apart("dense", llama.achieved, load_tasks(["counting"]))


def test_a_subset_is_drawn_with_the_seed():
    pool = [f"text {i}" for i in range(500)]
    assert len(neurons.drawn(pool)) == neurons.RANKED
    assert neurons.drawn(pool, 1) == neurons.drawn(pool, 1) != neurons.drawn(pool, 2)
    assert len(neurons.drawn(pool[:40])) == 30, "so that seeds differ where there are few, too"
    assert set(neurons.drawn(pool[:40], 1)) != set(neurons.drawn(pool[:40], 2))
    assert sorted(neurons.drawn(pool[:5])) == pool[:5]


def test_amounts_print_and_parse_back():
    text = "neurons-reverse@0.1,target=gsm8k,control=piqa/arc-twin,metric=ratio,scope=global,multiple=128,seed=2"
    step = Recipe.parse(text).steps[0]
    assert step.amount == Neurons(
        0.1, "gsm8k", ("piqa", "arc-twin"), "ratio", "global", 128, 2
    )  # fmt: skip
    assert str(Recipe.parse(text)) == text
    assert str(Recipe.parse("neurons-random@0.10,multiple=8")) == "neurons-random@0.1"


@pytest.mark.parametrize(
    "text",
    [
        "1.5",
        "0.1,metric=best",
        "0.1,targets=x",
        "0.1,seed=1,seed=2",
        "0.1,multiple=0",
        "0.1,control=",
    ],
)
def test_amounts_that_cannot_be_read_say_what_can(text):
    with pytest.raises(RecipeError, match=r"neurons-reverse@0\.1,target=counting"):
        Recipe.parse(f"neurons-selective@{text}")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("neurons-reverse@0.1,multiple=64", "leaves nothing to cut"),
        ("neurons-reverse@0.3+rtn@int4-g16", "cut with multiple=16"),
        ("neurons-reverse@0.01", "changed no weight"),
    ],
)
def test_cuts_that_do_not_fit_are_errors(llama, recipe, message):
    with pytest.raises(RecipeError, match=message):
        compress(llama, Recipe.parse(recipe))


def test_packed_weights_cannot_be_cut(llama):
    with pytest.raises(RecipeError, match="packs the weights"):
        compress(llama, Recipe.parse("bitsandbytes@nf4+neurons-reverse@0.3"))


def test_room_is_made_for_weights_of_other_widths(llama):
    made = llama.clone()
    narrow(made.anatomy, made.module, [8, 64, 0])
    assert widths(made.anatomy, made.module) == [8, 64, 64]
    assert width(llama.anatomy, llama.anatomy.blocks(llama.module)[0]) == 64


@pytest.mark.smollm2
def test_neurons_of_smollm2(smollm2):
    recipe = "neurons-{}@0.1,target=counting,control=capitals/kinds"
    lost = {}
    for order in ("selective", "reverse"):
        made = compress(smollm2, Recipe.parse(recipe.format(order)))
        assert made.achieved["neurons"]["widths"] == [1384] * 30
        with torch.no_grad():
            batch = encode(smollm2, ["2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13"])
            loss = made.module(**batch, labels=batch["input_ids"]).loss
        lost[order] = float(loss)
    assert lost["reverse"] > lost["selective"]


def test_peak_memory_is_what_the_profiler_counts(tiny):
    before = peak_bytes(tiny) - backends.held(tiny.module)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as watched:
        _read(tiny)
    changes = [
        e.nbytes() for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"
    ]
    counted = np.cumsum(changes).max()
    assert 0.95 * counted <= before <= counted, "all but the scratch space inside an operation"
    assert peak_bytes(tiny) - backends.held(tiny.module) == before
