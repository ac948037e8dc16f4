"""The real model: every capability once, and what it is known to do."""

import json

import numpy as np
import pytest
import test_decode
import torch
from prunescope.analysis import causes, decoding, diagnose
from prunescope.probes import (
    Recipe,
    compress,
    decode,
    load,
    load_tasks,
    measure,
    patch,
    remember,
    save,
    score,
    twin,
)
from prunescope.probes.compress import cost
from prunescope.probes.rank import importance
from prunescope.probes.speed import speed
from prunescope.probes.twins import TWINS
from prunescope.reports import render
from prunescope.reports.progress import Progress
from prunescope.reports.request import Request, default_prompts, plan
from prunescope.reports.study import cells, run
from rich.console import Console

pytestmark = pytest.mark.smollm2
PROMPTS = [
    "The capital of France is Paris, and the capital of Italy is",
    "Water boils at one hundred degrees",
]


def test_it_is_what_it_says(smollm2):
    assert (smollm2.layer_count, smollm2.vocabulary, smollm2.module.config.model_type) == (
        30,
        49_152,
        "llama",
    )
    ids = smollm2.tokenizer("The capital of France is", return_tensors="pt")
    text = smollm2.tokenizer.decode(
        smollm2.module.generate(**ids, max_new_tokens=3, do_sample=False)[0]
    )
    assert "Paris" in text


def test_the_order_of_its_attention_sublayers(smollm2):
    """By cosine the late ones and layer 7 matter least; which of them comes first depends on the text."""
    order = np.argsort(importance(smollm2)["attn"])[:8].tolist()
    assert len(set(order) & {25, 26, 7, 28, 6, 29, 9, 5}) >= 6


def test_a_model_against_itself_is_exactly_zero(smollm2):
    tree = measure(smollm2, smollm2, prompts=PROMPTS)
    assert float(tree["shifts"].kl.max()) == float(tree["shifts"].angular.max()) == 0
    assert float(tree["output"].tv.max()) == 0


def test_a_drop_is_local_where_it_is_and_propagates_from_there(smollm2):
    candidate = compress(smollm2, Recipe.parse("mlp-drop@layers=15,16,17"))
    shifts = measure(smollm2, candidate, prompts=PROMPTS)["shifts"].to_dataset()
    local = shifts.kl.sel(effect="local").mean(("prompt", "token"))
    layer, site = np.nonzero(local.transpose("layer", "site").values)
    assert layer.tolist() == [15, 16, 17]
    assert local.site.values[site].tolist() == ["mlp"] * 3
    spread = shifts.kl.sel(effect="propagated").mean(("prompt", "token"))
    assert float(spread.isel(layer=slice(0, 15)).max()) == 0
    assert float(spread.isel(layer=slice(18, 30)).min()) > 0.05
    after = (
        shifts.angular.sel(effect="propagated")
        .isel(layer=slice(18, 28))
        .mean(("prompt", "token", "layer", "site"))
    )
    assert float(after.sel(space="z")) < float(after.sel(space="h")) < float(after.sel(space="p"))


def test_finer_rounding_moves_less(smollm2):
    kls = []
    for recipe in ("rtn@int8", "rtn@int4-g64", "rtn@int3-g64"):
        tree = measure(
            smollm2, compress(smollm2, Recipe.parse(recipe)), prompts=PROMPTS, layerwise=False
        )
        kls.append(float(tree["output"].kl.mean()))
    assert kls[0] < 0.05 < kls[1] < kls[2]


def test_all_twins_are_far_above_chance(smollm2):
    tasks = [t.limited(24) for name in TWINS for t in twin(name)]
    from prunescope.probes.score import answer

    for task in tasks:
        accuracy = np.mean([a.score for a in answer(smollm2, task)])
        assert accuracy >= (0.7 if task.format == "choice" else 0.4), (task.name, task.format)


def test_the_format_decides_what_a_dropped_mlp_costs(smollm2):
    """The same items: choosing survives what writing does not."""
    candidate = compress(smollm2, Recipe.parse("mlp-drop@3"))
    data = score(smollm2, candidate, tasks=[t.limited(40) for t in twin("opposites")])
    kept = data.score.groupby("format").mean("item")
    assert float(kept.sel(format="choice", model="candidate")) > 0.75
    assert float(kept.sel(format="generation", model="candidate")) < 0.3


def test_a_candidate_is_saved_and_measured_again(smollm2, tmp_path):
    candidate = compress(smollm2, Recipe.parse("block-drop@1+attn-drop@1"))
    back = load(save(candidate, tmp_path / "candidate"))
    assert float(measure(candidate, back, prompts=PROMPTS)["output"].kl.max()) == 0
    ids = smollm2.tokenizer(PROMPTS[0], return_tensors="pt")
    texts = [m.module.generate(**ids, max_new_tokens=8, do_sample=False) for m in (candidate, back)]
    assert torch.equal(*texts)


def test_the_main_job_end_to_end(tmp_path):
    request = Request(
        model="smollm2",
        recipes=("mlp-drop@3", "rtn@int4-g64"),
        tasks=("opposites",),
        limit=30,
        steps=8,
        causes=4,
        repair=1,
    )
    with Progress(Console(quiet=True)) as progress:
        run(plan(request, tmp_path / "out"), progress)
    found = cells(tmp_path / "out")
    findings = diagnose(found)
    verdicts = {f.where: f for f in findings if f.level == "verdict"}
    assert set(verdicts) == {"mlp-drop@3", "rtn@int4-g64"}
    drop = verdicts["mlp-drop@3"]
    assert drop.interval is not None
    assert drop.interval[0] > 0.3, "choice keeps more than generation, surely"
    file = render(found, tmp_path / "out" / "report.html", findings=findings)
    assert drop.claim.split(" (")[0] in file.read_text()
    drawn = {picture.stem for picture in (tmp_path / "out" / "figures").glob("*.svg")}
    assert {"retention", "theory", "validity", "layers-mlp-drop-3", "decoding-mlp-drop-3"} <= drawn
    assert "causes-mlp-drop-3" in drawn
    repairs = found["mlp-drop@3"]["repairs"].score.mean("item")
    assert float(repairs.sel(arm="none")) < float(repairs.sel(arm="all"))
    told = [f.evidence for f in findings if f.where == "mlp-drop@3"]
    assert {"/patches/depth", "/patches/swap", "/memory/kl", "/repairs/score"} <= set(told)
    assert len(json.loads((tmp_path / "out" / "summary.json").read_text())["findings"]) == len(
        findings
    )


def test_generation_fails_by_its_text_and_not_by_its_weights(smollm2):
    """An int4 candidate: forced KL stays where it is while free KL jumps to that of another text."""
    candidate = compress(smollm2, Recipe.parse("rtn@int4-g64"))
    prompts = default_prompts()[:8]
    cell = decode(smollm2, candidate, prompts=prompts, steps=16)
    steps = cell["steps"].to_dataset()
    assert decoding.survival(steps).agreement == 1.0
    kl = decoding.factors(steps)
    assert kl["cache"].low > 1.5  # the cache carries error, and the text far more
    assert kl["tokens"].low > 3
    leap = decoding.jump(steps)
    assert leap is not None
    assert leap.free_after.low > 3 * leap.free_before.high
    assert leap.forced_after.low < leap.forced_before.high
    assert leap.swapped_after.value > 0.7 * leap.free_after.value
    cold, hot = (
        decoding.by_temperature(cell["temperatures"].to_dataset())
        .value.sel(history="forced")
        .values[[0, -1]]
    )
    assert cold > hot


def test_structural_drops_are_really_faster_and_zeros_are_not(smollm2):
    half = compress(smollm2, Recipe.parse("block-drop@15"))
    measured = speed(smollm2, half, rounds=3)
    dense, held = measured.pop("peak_bytes")
    assert 0.55 < held / dense < 0.8, "15 of 30 layers, embeddings and logits stay"
    for rate in measured.values():
        assert np.median(rate[:, 1] / rate[:, 0]) > 1.2
    zeros = compress(smollm2, Recipe.parse("magnitude@0.5"))
    measured = speed(smollm2, zeros, rounds=3)
    assert len(set(measured.pop("peak_bytes"))) == 1
    for rate in measured.values():
        assert 0.5 < np.median(rate[:, 1] / rate[:, 0]) < 1.5


def test_texts_drawn_with_common_noise_part_within_the_predicted_band(smollm2):
    candidate = compress(smollm2, Recipe.parse("rtn@int8"))
    prompts = default_prompts()[:8]
    steps = decode(smollm2, candidate, prompts=prompts, steps=12, sampled=True, temperatures=())[
        "steps"
    ]
    life = decoding.survival(steps.to_dataset())
    assert life.lower[-1] - 0.5 <= life.observed[-1] <= life.upper[-1] + 0.5  # 8 texts: coarse
    again = decode(smollm2, candidate, prompts=prompts, steps=12, sampled=True, temperatures=())
    assert (again["steps"].token.values == steps.token.values).all()


def test_one_step_from_the_dense_cache_on_the_real_model(smollm2):
    """`step` is what one cached step of the candidate gives, the dense cache before it."""
    candidate = compress(smollm2, Recipe.parse("attn-drop@5"))
    prompt = default_prompts()[0]
    steps = decode(smollm2, candidate, prompts=[prompt], steps=4, temperatures=())["steps"]
    text = [int(t) for t in steps.token.sel(model="dense").values[0] if t >= 0]
    kl = test_decode.reference_kl(smollm2, candidate, prompt, text, text)
    np.testing.assert_allclose(steps.kl.values[0, : len(text), :2], kl[:, :2], rtol=1e-2, atol=1e-5)


def test_benchmark_rows_are_scored_from_a_folder(smollm2, shared_data):
    tasks = [t.limited(12) for t in load_tasks(["arc_easy", "blimp", "triviaqa"], shared_data)]
    data = score(smollm2, smollm2, tasks=tasks)
    assert data.task.values.tolist() == ["arc_easy"] * 12 + ["blimp"] * 12 + ["triviaqa"] * 12
    assert (data.score.sel(model="dense") == data.score.sel(model="candidate")).all()
    assert float(data.score[:24].mean()) > 0.3


def field(file, name="text"):
    return [json.loads(line)[name] for line in file.read_text("utf-8").splitlines()]


def loss(model, tokens):
    """Mean next-token loss in nat over rows of tokens."""
    with torch.no_grad():
        logits = model.module(input_ids=tokens).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def test_methods_that_look_at_activations_lose_less(smollm2, shared_data):
    """Calibrated on C4, scored on WikiText-2, as the papers do it, in small."""
    ids = smollm2.tokenizer("".join(field(shared_data / "wikitext2_test.jsonl")[:2]))["input_ids"]
    tokens = torch.tensor(ids[:2048]).view(4, 512)
    texts = field(shared_data / "c4.jsonl")[:12]
    names = ("random@0.5", "magnitude@0.5", "wanda@0.5", "sparsegpt@0.5", "wanda@2:4",
             "rtn@int3-g64", "awq@int3-g64")  # fmt: skip
    found = {n: loss(compress(smollm2, Recipe.parse(n), calibration=texts), tokens) for n in names}
    pruned = max(found["sparsegpt@0.5"], found["wanda@0.5"])
    assert pruned + 1 < found["magnitude@0.5"] < found["random@0.5"] - 5, found
    assert found["wanda@0.5"] < found["wanda@2:4"] < found["magnitude@0.5"] + 1, found
    assert loss(smollm2, tokens) < found["awq@int3-g64"] < found["rtn@int3-g64"], found


def test_a_planted_fault_is_blamed(smollm2):
    """Everything rounded a little, one MLP a lot: it causes most, alone and missing."""
    candidate = compress(smollm2, Recipe.parse("rtn@int8"))
    broken = compress(smollm2, Recipe.parse("rtn@int2-g64"))
    blocks = [m.anatomy.blocks(m.module) for m in (candidate, broken)]
    blocks[0][12].set_submodule("mlp", blocks[1][12].mlp)
    cell = patch(smollm2, candidate, prompts=PROMPTS[:1], answers=[" Rome"])["patches"].to_dataset()
    worst = causes.ranking(cell, "kl")[0]
    assert (worst.layer, worst.site) == (12, "mlp")
    assert worst.share.value > 0.5
    run = causes.culprits(cell, "kl")
    assert (run.first, run.last) == (12, 12)


def test_memory_of_the_real_model(smollm2):
    candidate = compress(smollm2, Recipe.parse("mlp-drop@layers=15"))
    kl = remember(smollm2, candidate, prompts=PROMPTS, steps=6)["memory"].kl.mean("prompt").values
    assert kl[0] == kl[16], "what is below the dropped MLP remembers alike"
    assert kl[-1] < kl[0]


def test_libraries_that_pack_move_less_with_more_bits(smollm2, tmp_path):
    kls = []
    for recipe in ("torchao@int8", "bitsandbytes@int8", "bitsandbytes@nf4", "torchao@int4"):
        candidate = compress(smollm2, Recipe.parse(recipe))
        tree = measure(smollm2, candidate, prompts=PROMPTS, layerwise=False)
        kls.append(float(tree["output"].kl.mean()))
        sizes = [cost(m)["bytes"] for m in (smollm2, candidate)]
        assert sizes[1] < 0.55 * sizes[0], recipe
    assert kls == sorted(kls)
    assert kls[1] < 0.1 < kls[2]
    back = load(save(candidate, tmp_path / "packed"))
    assert (
        float(measure(candidate, back, prompts=PROMPTS, layerwise=False)["output"].kl.max()) < 1e-6
    )
