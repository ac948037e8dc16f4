"""Recovery: what was compressed stays so, what is learned is what is merged, and training resumes."""

import json

import pytest
import torch
from prunescope.probes import load_tasks, prune
from prunescope.probes.anatomy import linears
from prunescope.probes.compress import compress
from prunescope.probes.items import without_examples
from prunescope.probes.load import load
from prunescope.probes.model import encode
from prunescope.probes.neurons import check_apart, pools
from prunescope.probes.recipe import Recipe
from prunescope.probes.recover import METHODS, RecoverError, Training, change, recover
from prunescope.probes.save import save
from prunescope.probes.score import score

TEXTS = [
    f"{a} {b} {c} birds sang to the {d}."
    for a, b, c, d in zip("12345" * 8, ["cat", "dog", "red", "hou"] * 10, "abcdefgh" * 5, "xyzw" * 10, strict=True)
]  # fmt: skip
RECIPES = (
    "magnitude@0.5", "wanda@2:4", "rtn@int4-g16", "gptq@int4-g16", "magnitude@0.3+rtn@int8",
    "attn-drop@1", "block-drop@1", "neurons-reverse@0.25",
)  # fmt: skip


def loss(model, texts=TEXTS[:8]):
    batch = encode(model, texts)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return float(model.module(**batch, labels=labels).loss)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_architecture(tiny, method):
    before = loss(tiny)
    made = recover(tiny, TEXTS, Training(method, 20, rate=3e-3))
    assert loss(tiny) == before, "what was trained stays as it is"
    told = made.achieved["recovered"]
    assert loss(made) <= before
    if method in ("lora", "full"):
        assert told["losses"][-1][1] < told["losses"][0][1]
        assert loss(made) < before
    assert (told["method"], told["trained"]) == (method, 20)


@pytest.mark.parametrize("method", ["lora", "full", "scale"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_was_compressed_stays_compressed(llama, recipe, method):
    candidate = compress(llama, Recipe.parse(recipe), calibration=TEXTS)
    made = recover(candidate, TEXTS, Training(method, 20, rate=3e-3))
    moved = 0
    for name, module in linears(llama.anatomy, candidate.module).items():
        old, new = module.weight, made.module.get_submodule(name).weight
        assert old.shape == new.shape
        if "@0" in recipe or ":" in recipe:
            assert bool((new[old == 0] == 0).all())
        if "int" in recipe and method != "scale":
            bits, group = (8, 0) if "int8" in recipe else (4, 16)
            again = prune.round_to_nearest(new, bits, group)
            torch.testing.assert_close(again, new, rtol=1e-4, atol=1e-5)
        moved += int(not torch.equal(old, new))
    assert moved or method == "scale", "whose factors may help nothing in a random model"
    if method == "full":
        assert loss(made) < loss(candidate)


def test_no_change_is_learned_before_the_first_step(tiny):
    for method in METHODS:
        made = change(tiny, Training(method))
        for name, weight in made.weights().items():
            torch.testing.assert_close(
                weight, tiny.module.get_parameter(name), rtol=1e-6, atol=1e-7
            )


def test_what_is_learned_is_what_is_merged(tiny):
    for method in METHODS:
        made = change(tiny, Training(method))
        with torch.no_grad():
            for value in made.learned.values():
                value.add_(0.01)
        batch = encode(tiny, TEXTS[:3])
        live = torch.func.functional_call(tiny.module, made.weights(), (), batch).logits
        merged = tiny.clone()
        for name, weight in made.weights().items():
            path, _, kind = name.rpartition(".")
            merged.module.get_submodule(path).register_parameter(
                kind, torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
            )
        if merged.module.config.tie_word_embeddings:
            merged.module.tie_weights()
        torch.testing.assert_close(merged.module(**batch).logits, live, rtol=1e-4, atol=1e-4)


def test_one_factor_divides_the_logits_by_a_temperature(tiny):
    made = change(tiny, Training("temperature"))
    with torch.no_grad():
        made.learned["inverse"].fill_(0.5)
    batch = encode(tiny, TEXTS[:2])
    cap = getattr(tiny.module.config, "final_logit_softcapping", None)
    found = torch.func.functional_call(tiny.module, made.weights(), (), batch).logits
    plain = tiny.module(**batch).logits
    if cap is None:
        torch.testing.assert_close(found, plain / 2, rtol=1e-4, atol=1e-4)
    else:
        raw = cap * torch.atanh((plain / cap).clamp(-1 + 1e-6, 1 - 1e-6))
        torch.testing.assert_close(found, cap * torch.tanh(raw / 2 / cap), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_a_training_that_was_stopped_goes_on_to_the_same_weights(llama, method, tmp_path):
    training = Training(method, 40, rate=1e-3)
    whole = recover(llama, TEXTS, training)

    def stop(done):
        if done >= 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(llama, TEXTS, training, state=tmp_path, progress=stop)
    assert (tmp_path / "training.safetensors").is_file()
    steps = []
    again = recover(llama, TEXTS, training, state=tmp_path, progress=steps.append)
    assert len(steps) == 20, "from the checkpoint on"
    for (name, a), (_, b) in zip(
        whole.module.named_parameters(), again.module.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    assert json.dumps(whole.achieved) == json.dumps(again.achieved)
    with pytest.raises(RecoverError, match="another training"):
        recover(llama, TEXTS, Training(method, 41), state=tmp_path)


def test_training_ends_when_it_no_longer_helps(llama):
    made = recover(llama, TEXTS, Training("full", 4000, rate=1.0))
    told = made.achieved["recovered"]
    assert told["trained"] < 4000
    assert loss(made) <= loss(llama) + 1e-6, "the best weights are kept, not the last"


def test_a_recovered_candidate_loads_back(llama, tmp_path):
    candidate = compress(llama, Recipe.parse("neurons-reverse@0.25,scope=global"))
    made = recover(candidate, TEXTS, Training("lora", 10))
    back = load(save(made, tmp_path / "made"))
    batch = encode(llama, TEXTS[:3])
    assert torch.equal(back.module(**batch).logits, made.module(**batch).logits)
    assert back.achieved["recovered"]["from"] == candidate.weights


def test_items_that_trained_are_not_scored(llama):
    texts = pools(["counting"], scored=[t.limited(40) for t in load_tasks(["counting"])])[
        "counting"
    ]
    made = recover(llama, texts, Training("scale", 10))
    check_apart("made", made.achieved, [t.limited(40) for t in load_tasks(["counting"])])
    with pytest.raises(ValueError, match="or trained it"):
        check_apart("made", made.achieved, load_tasks(["counting"]))


@pytest.mark.parametrize(
    ("recipe", "training", "message"),
    [
        ("rtn@int8", Training("adapters"), "not one of lora, full, scale, temperature"),
        ("rtn@int8", Training(steps=0), "must be above 0"),
        ("awq@int4-g16", Training(), "rounded by awq"),
        ("bitsandbytes@nf4", Training("scale"), "packed by a library"),
    ],
)
def test_what_cannot_be_trained_is_refused(llama, recipe, training, message):
    candidate = compress(llama, Recipe.parse(recipe), calibration=TEXTS)
    with pytest.raises(RecoverError, match=message):
        recover(candidate, TEXTS, training)


def test_too_few_texts_are_refused(llama):
    with pytest.raises(RecoverError, match="3 texts of at least two tokens"):
        recover(llama, TEXTS[:3], Training())


@pytest.mark.smollm2
@pytest.mark.parametrize("method", ["scale", "temperature"])
def test_a_planted_loss_of_calibration_is_refitted(smollm2, method):
    texts = without_examples(pools(["capitals"])["capitals"])
    anatomy, made = smollm2.anatomy, smollm2.clone()
    path = (
        anatomy.final_norm
        if method == "temperature"
        else f"{anatomy.layers}.0.{anatomy.neurons.out}"
    )
    module = made.module.get_submodule(path)
    weaker = torch.nn.Parameter(module.weight * 0.4, requires_grad=False)
    module.register_parameter("weight", weaker)
    found = recover(made, texts[16:], Training(method, 40, rate=5e-2))
    dense, lost, back = (loss(m, texts[:16]) for m in (smollm2, made, found))
    assert lost > dense + 0.3
    assert back < dense + 0.3 * (lost - dense)


@pytest.mark.smollm2
def test_training_brings_back_what_a_cut_took(smollm2):
    tasks = [t.limited(24) for t in load_tasks(["counting"])]
    ranking = pools(["counting", "kinds"], scored=tasks)
    recipe = Recipe.parse("neurons-reverse@0.2,target=counting,control=kinds")
    candidate = compress(smollm2, recipe, ranking=ranking)
    made = recover(candidate, ranking["counting"], Training("lora", 12, rate=2e-3))
    losses = [v for _, v in made.achieved["recovered"]["losses"]]
    assert losses[-1] < losses[0]
    before, after = (
        float(score(smollm2, m, tasks=tasks).score.sel(model="candidate").mean())
        for m in (candidate, made)
    )
    assert after >= before
