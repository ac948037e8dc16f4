"""Letters, running text, retrieval and similarity: against plain references."""

import architectures
import numpy as np
import pytest
import torch
import xarray as xr
from prunescope.analysis import collapse, diagnose, perplexity, schema, task_findings
from prunescope.probes import Recipe, compress, load_tasks
from prunescope.probes.chat import chatted
from prunescope.probes.embed import embed, retrieval, similarity
from prunescope.probes.further import further
from prunescope.probes.items import Item, Task, TaskError
from prunescope.probes.perplexity import perplexity as read
from prunescope.probes.score import score, split
from prunescope.probes.subspace import check_letters, subspace

LETTERS = tuple("ABCD")
ASKED = Task(
    "by letter",
    "choice",
    tuple(
        Item(
            f"i{n}",
            f"Which {n} is it?\nA. cat\nB. dog\nC. house\nD. river\nAnswer: ",
            LETTERS,
            n % 4,
        )
        for n in range(12)
    ),
    letters=True,
)
TEXT = Task(
    "prose", "text", (Item("a", "The cat sat on the mat. " * 30), Item("b", "The dog ran. " * 40))
)
CORPUS = tuple(
    (f"d{n}", f"The {w} sat by the river {n}") for n, w in enumerate(("cat", "dog", "house") * 5)
)
FOUND = Task(
    "search", "retrieval",
    tuple(Item(f"q{n}", text, relevant=((f"d{n}", 1.0), (f"d{n + 3}", 2.0))) for n, (_, text) in enumerate(CORPUS[:4])),
    corpus=CORPUS,
)  # fmt: skip
PAIRS = Task(
    "pairs", "similarity",
    tuple(Item(f"p{n}", f"The cat {n}", (f"The dog {n * n}",), grade=n / 2) for n in range(10)),
)  # fmt: skip


@pytest.fixture
def two(llama):
    return llama, architectures.build("llama", seed=1)


def logits(model, prompt):
    ids = model.tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        return model.module(torch.tensor([ids])).logits[0, -1].double()


def test_subspace_equals_its_definition(two):
    data = subspace(*two, tasks=[ASKED])["subspace"].to_dataset()
    schema.check_group("subspace", data)
    for n, item in enumerate(ASKED.items):
        z, y = (logits(m, item.prompt) for m in two)
        ids = torch.tensor([split(two[0], item.prompt, c)[0][-1] for c in LETTERS])
        for k, subset in enumerate((ids, z.topk(10).indices, torch.arange(len(z)))):
            p, q = z[subset].softmax(-1), y[subset].softmax(-1)
            assert float(data.kl[n, k]) == pytest.approx(
                float((p * (p / q).log()).sum()), rel=1e-3, abs=1e-9
            )
            cosine = torch.nn.functional.cosine_similarity(z[subset], y[subset], dim=0)
            assert float(data.cosine[n, k, 0]) == pytest.approx(float(cosine), abs=1e-5)
        assert float(data.mass[n, 1]) == pytest.approx(float(y.softmax(-1)[ids].sum()), rel=1e-4)
        best = z[ids].argmax()
        gains = [float((y - z)[ids][c] - (y - z)[ids][best]) for c in range(4) if c != best]
        assert float(data.gain[n]) == pytest.approx(max(gains), rel=1e-4, abs=1e-5)


def test_where_no_option_gains_the_margin_the_answer_stands(two):
    data = subspace(*two, tasks=[ASKED])["subspace"].to_dataset()
    assert ((data.stable == 0) | (data.agree == 1)).all()
    same = subspace(two[0], two[0], tasks=[ASKED])["subspace"].to_dataset()
    assert same.stable.all()
    assert float(same.kl.max()) == 0


def test_options_that_are_not_one_token_each_are_refused(llama):
    item = Item("x", "Which?", ("A", " some words"), 0)
    with pytest.raises(TaskError, match="not one token each"):
        check_letters(llama, [Task("t", "choice", (item,), letters=True)])
    with pytest.raises(TaskError, match="not one token each"):
        check_letters(llama, [Task("t", "choice", (Item("x", "W", ("A", "A")),), letters=True)])
    with pytest.raises(TaskError, match="none of the tasks is asked by letter"):
        subspace(llama, llama, tasks=[TEXT])


def test_perplexity_equals_one_window_at_a_time(two):
    data = read(*two, tasks=[TEXT], window=32)["perplexity"].to_dataset()
    schema.check_group("perplexity", data)
    ids = [i for item in TEXT.items for i in two[0].tokenizer(item.prompt)["input_ids"]]
    count = -(-len(ids) // 32)
    rows = torch.tensor(ids[: count * (len(ids) // count)]).view(count, -1)[:32]
    expected = []
    for row in rows:
        with torch.no_grad():
            z, y = (m.module(row[None]).logits[0].double().log_softmax(-1) for m in two)
        kl = (z.exp() * (z - y)).sum(-1)
        expected += [
            [float(z[t - 1, row[t]]), float(y[t - 1, row[t]]), float(kl[t - 1])]
            for t in range(1, len(row))
        ]
    expected = np.array(expected)
    np.testing.assert_allclose(data.log_p.values, expected[:, :2], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(data.kl.values, expected[:, 2], rtol=1e-3, atol=1e-7)
    found = perplexity.figures(data, "prose")
    change = np.exp(expected[:, 1]) - np.exp(expected[:, 0])
    assert found["Mean PPL(base)"].value == pytest.approx(np.exp(-expected[:, 0].mean()), rel=1e-3)
    assert found["Mean PPL(Q)"].value == pytest.approx(np.exp(-expected[:, 1].mean()), rel=1e-3)
    assert found["RMS Δp"].value == pytest.approx(np.sqrt((change**2).mean()), rel=1e-2)
    assert found["Mean KLD"].value == pytest.approx(expected[:, 2].mean(), rel=1e-3)
    assert found["Mean KLD"].low <= found["Mean KLD"].value <= found["Mean KLD"].high
    more = perplexity.percentiles(data, "prose")
    assert more["Maximum KLD"] >= more["99.0% KLD"] >= more["Median KLD"] >= more["Minimum KLD"]
    assert -1 <= perplexity.correlation(data, "prose") <= 1


def test_texts_are_pooled_over_their_own_tokens(tiny):
    texts = ["The cat", "The red house stood by the river", "dog"]
    for pooling in ("mean", "last"):
        together = embed(tiny, texts, pooling=pooling)
        for text, vector in zip(texts, together, strict=True):
            ids = torch.tensor([tiny.tokenizer(text)["input_ids"]])
            with torch.no_grad():
                states = tiny.module.base_model(ids).last_hidden_state[0].float()
            pooled = states.mean(0) if pooling == "mean" else states[-1]
            torch.testing.assert_close(
                vector, torch.nn.functional.normalize(pooled, dim=0), rtol=1e-3, atol=1e-4
            )


def test_retrieval_and_similarity(two):
    data = retrieval(*two, task=FOUND)["retrieval"].to_dataset()
    schema.check_group("retrieval", data)
    for side, model in enumerate(two):
        queries = embed(model, [i.prompt for i in FOUND.items])
        documents = embed(model, [text for _, text in CORPUS])
        for n, item in enumerate(FOUND.items):
            order = (documents @ queries[n]).argsort(descending=True)[:10].tolist()
            gains = dict(item.relevant)
            found = [gains.get(f"d{d}", 0.0) for d in order]
            best = sum(
                g / np.log2(r + 2) for r, g in enumerate(sorted(gains.values(), reverse=True))
            )
            ndcg = sum(g / np.log2(r + 2) for r, g in enumerate(found)) / best
            assert float(data.ndcg[n, side]) == pytest.approx(ndcg, abs=1e-5)
            assert float(data.recall[n, side]) == pytest.approx(sum(g > 0 for g in found) / 2)
    pairs = similarity(*two, task=PAIRS)["similarity"].to_dataset()
    schema.check_group("similarity", pairs)
    assert pairs.gold.values.tolist() == [n / 2 for n in range(10)]
    assert task_findings.spearman(np.arange(5.0), np.arange(5.0) ** 3) == pytest.approx(1)


def test_several_tasks_of_a_kind_stand_after_each_other_and_are_told(two):
    other = Task("others", "similarity", PAIRS.items)
    groups = further(*two, tasks=[ASKED, TEXT, FOUND, PAIRS, other])
    assert set(groups) == {"subspace", "perplexity", "retrieval", "similarity"}
    assert groups["similarity"].sizes["pair"] == 20
    found = diagnose(schema.tree(groups, {"recipe": "r"}))
    told = {f.evidence.split("/")[1] for f in found}
    assert set(groups) <= told
    assert sum(f.evidence == "/similarity/cosine" for f in found) == 2


def planted(choice_kept, written_kept, n=60):
    """Scores of one choice and one written task, with these shares kept."""
    rng = np.random.default_rng(0)
    dense = np.ones(2 * n)
    kept = np.concatenate([rng.random(n) < choice_kept, rng.random(n) < written_kept]).astype(float)
    coords = {
        "item": np.arange(2 * n), "model": list(schema.MODELS),
        "task": ("item", ["c"] * n + ["w"] * n), "twin": ("item", [""] * 2 * n),
        "format": ("item", ["choice"] * n + ["generation"] * n),
        "chance": ("item", [0.25] * n + [0.0] * n),
    }  # fmt: skip
    return xr.Dataset({"score": (("item", "model"), np.stack([dense, kept], -1))}, coords)


def test_a_planted_difference_between_kinds_is_found():
    gap = collapse.kinds_apart(planted(0.9, 0.1))
    assert gap is not None
    assert gap.difference.low > 0.4
    even = collapse.kinds_apart(planted(0.625, 0.5))  # (0.625 - 0.25) / 0.75 = 0.5
    assert even is not None
    assert even.difference.low < 0 < even.difference.high
    only = planted(0.9, 0.1).isel(item=slice(0, 60))
    assert collapse.kinds_apart(only) is None


def test_a_floor_can_never_collapse():
    scores = planted(0.9, 0.0)
    scores["score"][60:, 0] = 0  # the dense model writes nothing right either
    row = next(r for r in collapse.retentions(scores) if r.task == "w")
    assert row.verdict == "uninformative"
    assert collapse.kinds_apart(scores) is None


@pytest.mark.smollm2
def test_chat_turns_go_around_what_is_written_only(smollm2, llama, shared_data):
    tasks = load_tasks(["gsm8k", "arc_easy", "humaneval"], shared_data)
    sums, choice, code = chatted(smollm2, tasks)
    assert sums.items[0].prompt.startswith("<|im_start|>")
    assert sums.items[0].prompt.rstrip().endswith("<|im_start|>assistant")
    assert tasks[0].items[0].prompt in sums.items[0].prompt
    assert choice == tasks[1]
    assert code == tasks[2]
    with pytest.raises(TaskError, match="no chat template"):
        chatted(llama, tasks)


@pytest.mark.smollm2
def test_benchmarks_on_smollm2(smollm2, shared_data):
    names = ["arc_easy", "mmlu", "lambada", "nq_open", "winogrande"]
    tasks = [t.limited(12) for t in load_tasks(names, shared_data)]
    candidate = compress(smollm2, Recipe.parse("rtn@int4-g64"))
    scores = score(smollm2, candidate, tasks=tasks)
    dense = scores.score.sel(model="dense").values
    by = {n: dense[scores.task.values == n].mean() for n in names}
    assert by["arc_easy"] > 0.3
    assert by["lambada"] > 0.15
    plain = tasks[0].items
    for item, log_p in zip(plain, scores.log_p.sel(model="dense").values[:12], strict=True):
        ids, start = split(smollm2, item.prompt, item.right)
        with torch.no_grad():
            z = smollm2.module(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        alone = sum(float(z[t - 1, ids[t]]) for t in range(start, len(ids)))
        assert log_p == pytest.approx(alone, rel=1e-3, abs=1e-3)
    texts = [t.limited(2) for t in load_tasks(["wikitext2", "stsb"], shared_data)]
    groups = further(smollm2, candidate, tasks=[*tasks, *texts])
    assert groups["subspace"].kl.sel(subset="options").mean() >= 0
    found = perplexity.figures(groups["perplexity"], "wikitext2")
    assert 10 < found["Mean PPL(base)"].value < 60
    assert found["Mean PPL(Q)/PPL(base)"].low > 1
