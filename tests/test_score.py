import architectures
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prunescope.analysis import schema
from prunescope.probes import score as module_score  # the function, by the package's name
from prunescope.probes.model import encode
from prunescope.probes.score import (
    answer,
    generate,
    grade,
    likelihoods,
    normalise,
    repetition,
    split,
)
from prunescope.probes.tasks import Item, Task

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
    found = grade(text, accepted, [1, 2], True, exact=exact)
    assert found.score == right
    assert found.no_answer == (not text)


@given(st.text(max_size=40))
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


def test_repetition_is_the_share_of_repeated_four_grams():
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([7] * 11) == pytest.approx(7 / 8)
