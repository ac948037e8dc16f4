import importlib

import architectures
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prunescope.analysis import schema
from prunescope.probes import score as module_score  # the function, by the package's name
from prunescope.probes.grading import f1, last_number, normalise, repetition
from prunescope.probes.items import Item, Task
from prunescope.probes.model import encode
from prunescope.probes.score import answer, generate, judge, likelihoods, split

_scoring = importlib.import_module("prunescope.probes.score")

ITEMS = (
    Item("a", "The cat sat on", (" the mat", " a red house"), 0, ("the mat",)),
    Item("b", "The cat sat by the dog and ran to", (" the red house", " the mat", " Paris"), 2, ("Paris",)),
    Item("c", "The cat is", (" 1 2 3", " birds"), 1, ("birds",)),
)  # fmt: skip
CHOICE = Task("t", "choice", ITEMS, "t")
WRITE = Task("t", "generation", ITEMS, "t", max_new_tokens=6)


def plain_likelihood(model, prompt, choice):
    ids, start = split(model, prompt, choice)
    with torch.no_grad():
        logp = model.module(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logp[t - 1, ids[t]]) for t in range(start, len(ids)))


def test_likelihoods_equal_one_row_at_a_time(tiny):
    rows = [(i.prompt, c) for i in ITEMS for c in i.choices]
    found = likelihoods(tiny, [split(tiny, *r) for r in rows])
    expected = [plain_likelihood(tiny, *r) for r in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("opening", ["", "The red house stood by the river and the dog ran. "])
def test_what_options_share_is_run_once_and_changes_nothing(tiny, opening, monkeypatch):
    monkeypatch.setattr(_scoring, "STEM", 1)
    monkeypatch.setattr(_scoring, "BATCH_TOKENS", 60)
    rows = [split(tiny, opening + i.prompt, c) for i in ITEMS for c in i.choices]
    found = likelihoods(tiny, rows, sizes=[len(i.choices) for i in ITEMS])
    expected = [plain_likelihood(tiny, opening + i.prompt, c) for i in ITEMS for c in i.choices]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_last_word_is_right_where_greedy_decoding_writes_it(llama, monkeypatch):
    ids = llama.tokenizer("The cat sat on")["input_ids"]
    written = generate(llama, ["The cat sat on"], 2)[0][1]
    rows = {"a": [*ids, *written], "b": [*ids, written[0], (written[1] + 1) % 64]}
    monkeypatch.setattr(_scoring, "split", lambda _, prompt, word: (rows[word], len(ids)))
    items = tuple(Item(word, "The cat sat on", (word,)) for word in rows)
    found = answer(llama, Task("w", "last word", items))
    assert [a.score for a in found] == [1.0, 0.0]
    assert found[1].log_p < found[0].log_p < 0


def test_each_choice_may_follow_a_prompt_of_its_own(llama):
    item = Item("w", "", (" sat by the dog",) * 2, 1, contexts=("The cat", "The red house"))
    found = answer(llama, Task("w", "choice", (item,)))[0]
    values = [plain_likelihood(llama, c, item.choices[0]) for c in item.contexts]
    assert found.score == float(np.argmax(values) == 1)


def test_text_ends_before_the_first_stop(llama):
    whole = generate(llama, ["The cat sat on"], 8)[0][0]
    stop = whole.strip().split(" ")[-1][-3:]
    text, tokens, stopped = generate(llama, ["The cat sat on"], 8, until=("\n\n\n", stop))[0]
    assert text == whole[: whole.index(stop)]
    assert stopped
    assert len(tokens) <= 8


def test_a_text_that_never_ends_counts_as_no_stop(llama):
    found = answer(llama, WRITE)
    written = generate(llama, [i.prompt for i in ITEMS], 6, until=("\n",))
    assert [a.no_stop for a in found] == [not w[2] for w in written]
    assert any(a.no_stop for a in found)


def test_without_a_prompt_the_text_follows_the_first_special_token(llama):
    ids, start = split(llama, "", "The cat")
    assert (ids[0], start) == (llama.tokenizer.bos_token_id, 1)
    expected = plain_likelihood(llama, "", "The cat sat")
    np.testing.assert_allclose(
        likelihoods(llama, [split(llama, "", "The cat sat")]), [expected], rtol=1e-4
    )


@pytest.mark.parametrize("normalised", [False, True])
def test_a_choice_is_the_likeliest_option(llama, normalised):
    from dataclasses import replace

    answers = answer(llama, replace(CHOICE, normalise=normalised))
    for item, found in zip(ITEMS, answers, strict=True):
        values = [
            plain_likelihood(llama, item.prompt, c) / (len(c.strip()) if normalised else 1)
            for c in item.choices
        ]
        assert found.text == item.choices[int(np.argmax(values))].strip()
        assert found.score == (int(np.argmax(values)) == item.answer)


def test_generation_equals_one_prompt_at_a_time_without_cache(tiny):
    prompts = [i.prompt for i in ITEMS]
    together = generate(tiny, prompts, 6)
    for prompt, (_, tokens, stopped) in zip(prompts, together, strict=True):
        ids = encode(tiny, [prompt])["input_ids"]
        length = ids.shape[1]
        for _ in range(6):
            with torch.no_grad():
                ids = torch.cat(
                    [ids, tiny.module(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=-1
                )
        alone = ids[0, length:].tolist()
        if tiny.tokenizer.eos_token_id in alone:
            alone = alone[: alone.index(tiny.tokenizer.eos_token_id)]
        assert tokens == alone
        assert stopped == (len(alone) < 6)


def test_scores_are_paired_and_labelled(llama):
    other = architectures.build("llama", seed=1)
    data = module_score(llama, other, tasks=[CHOICE, WRITE])
    schema.check_group("scores", data)
    assert data.sizes == {"item": 6, "model": 2}
    assert data.item_id.values.tolist() == ["a", "b", "c"] * 2
    assert data.chance.values.tolist() == pytest.approx([0.5, 1 / 3, 0.5, 0, 0, 0])
    for side, model in enumerate((llama, other)):
        expected = [a.score for t in (CHOICE, WRITE) for a in answer(model, t)]
        assert data.score.values[:, side].tolist() == expected


@pytest.mark.parametrize(
    ("text", "accepted", "exact", "right"),
    [
        ("Paris.", ["Paris"], True, True),
        ("the Paris", ["paris"], True, True),
        ("Paris, which is", ["Paris"], True, False),
        ("Paris, which is", ["Paris"], False, True),
        ("Parisian", ["Paris"], False, False),
        ("Bogotá", ["Bogota"], True, True),
        ("18, 19, 20, 21", ["18, 19, 20"], False, True),
        ("18, 19, 201", ["18, 19, 20"], False, False),
        ("", ["Paris"], False, False),
        ("Mr. Bligh", ["William Bligh", "mr bligh"], True, True),
    ],
)
def test_grading(text, accepted, exact, right):
    task = Task("t", "generation", (), grade="exact" if exact else "begins")
    found = judge(task, Item("i", "", accepted=tuple(accepted)), text, [1, 2], True)
    assert found.score == right
    assert found.no_answer == (not text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 8 - 2 = 6 pm\n#### 6", "6"),
        ("It costs $1,234.", "1234"),
        ("He has -3.5 left", "-3.5"),
        ("none", ""),
        ("5 and then 70.", "70"),
    ],
)
def test_the_last_number_is_read(text, number):
    assert last_number(text) == number
    task = Task("t", "generation", (), grade="number")
    found = judge(task, Item("i", "", accepted=("6",)), text, [1], True)
    assert (found.score, found.no_answer) == (float(number == "6"), number == "")


def test_word_overlap():
    assert f1("the red house", ["red house"]) == 1
    assert f1("a red car", ["red house", "blue"]) == pytest.approx(0.5)
    assert f1("", ["x"]) == 0


@given(st.text(max_size=40))
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


def test_repetition_is_the_share_of_repeated_four_grams():
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([7] * 11) == pytest.approx(7 / 8)


def test_what_prompts_share_is_read_once_and_changes_no_text(tiny, monkeypatch):
    prompts = [
        f"The cat sat on the mat. The dog ran to the red house, and {end}"
        for end in ("1 2 3", "4", "5 birds", "Paris is", "sang! 1 2 3 4 5")
    ]
    rows = [tiny.tokenizer(p)["input_ids"] for p in prompts]
    past = _scoring._beginning(tiny, rows)
    windowed = bool(getattr(tiny.module.config, "sliding_window", None))
    assert (past is None) == windowed
    if past is not None:
        assert int(past.lengths[0]) >= _scoring.STEM
        assert all(row[: int(past.lengths[0])] == rows[0][: int(past.lengths[0])] for row in rows)
    found = generate(tiny, prompts, 8)
    alone = [generate(tiny, [p], 8)[0] for p in prompts]
    monkeypatch.setattr(_scoring, "_beginning", lambda *_: None)
    assert found == generate(tiny, prompts, 8) == alone
