import json

import pytest
from prunescope.probes.tasks import TWINS, TaskError, load_tasks, read_task, twin


@pytest.mark.parametrize("name", list(TWINS))
def test_a_twin_asks_the_same_items_both_ways(name):
    choice, generation = twin(name)
    assert choice.items == generation.items
    assert len(choice.items) >= 100
    assert (choice.format, generation.format) == ("choice", "generation")
    assert (choice.chance, generation.chance) == (0.25, 0.0)
    assert twin(name) == (choice, generation), "the same on every call"
    for item in choice.items:
        assert len(set(item.choices)) == 4
        assert item.choices[item.answer] == f" {item.accepted[0]}"
        solved = item.prompt.split("\n")[:-1]
        assert item.prompt.split("\n")[-1] not in solved, "no item is among the solved examples"
    prompts = [i.prompt for i in choice.items]
    assert len(set(prompts)) == len(prompts)
    answers = [item.answer for item in choice.items]
    assert max(answers.count(k) for k in range(4)) < 0.5 * len(answers), "no place gives it away"


def test_a_limit_draws_the_same_items_for_both_halves():
    choice, generation = (t.limited(10, seed=3) for t in twin("capitals"))
    assert choice.items == generation.items
    assert len(choice.items) == 10
    assert choice.items != twin("capitals")[0].limited(10, seed=4).items
    assert twin("capitals")[0].limited(None) == twin("capitals")[0]


def write(folder, name, rows):
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), "utf-8")
    return file


def test_every_format_of_a_file(tmp_path):
    choice = read_task(
        write(
            tmp_path,
            "c",
            [{"question": "Sky?", "choices": ["blue", "red"], "answer": 1, "context": "Look."}],
        )
    )
    assert (choice.format, choice.normalise, choice.chance) == ("choice", True, 0.5)
    assert choice.items[0].prompt == "Look.\nQuestion: Sky?\nAnswer:"
    assert choice.items[0].choices == (" blue", " red")
    pairs = read_task(write(tmp_path, "p", [{"good": "He runs.", "bad": "He run."}]))
    assert (pairs.items[0].prompt, pairs.items[0].choices, pairs.normalise) == (
        "",
        ("He runs.", "He run."),
        False,
    )
    free = read_task(
        write(
            tmp_path,
            "g",
            [{"id": "x", "question": "Who?", "answer": "Bo", "aliases": ["Bo", "Mr Bo"]}],
        )
    )
    assert (free.format, free.items[0].accepted, free.items[0].id) == (
        "generation",
        ("Bo", "Mr Bo"),
        "x",
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"question": ', r"t\.jsonl:2: not valid JSON"),
        ("[1]", r"t\.jsonl:2: a JSON object is needed, not list"),
        ({"a": 1}, r"t\.jsonl:2: fields a are those of no task"),
        (
            {"question": "q", "choices": ["x"], "answer": 0},
            "'choices' must be a list of at least two",
        ),
        (
            {"question": "q", "choices": ["x", "y"], "answer": 2},
            "'answer' must be the number of a choice, 0 to 1, not 2",
        ),
        ({"question": "q", "choices": ["x", "x"], "answer": 0}, "the right answer twice"),
        (
            {"question": 3, "choices": ["x", "y"], "answer": 0},
            "field 'question' must be text, not 3",
        ),
        ({"question": "q", "answer": "a"}, "rows of different kinds"),
        ({"good": "g", "bad": "b"}, "rows of different kinds"),
    ],
)
def test_bad_rows_are_named_by_file_line_and_field(tmp_path, row, message):
    good = {"question": "q", "choices": ["x", "y"], "answer": 0}
    with pytest.raises(TaskError, match=message):
        read_task(write(tmp_path, "t", [good, row]))


def test_empty_files_and_unknown_names(tmp_path):
    with pytest.raises(TaskError, match="no rows"):
        read_task(write(tmp_path, "empty", []))
    with pytest.raises(TaskError, match=r"unknown task 'capital'; nearest: capitals.*--data"):
        load_tasks(["capital"])
    with pytest.raises(TaskError, match=r"In .*: empty"):
        load_tasks(["arc"], tmp_path)


def test_real_benchmark_rows_are_read(shared_data):
    names = [
        "arc_easy",
        "hellaswag",
        "mmlu",
        "piqa",
        "boolq",
        "blimp",
        "triviaqa",
        "xquad_en",
        "gsm8k",
        "lambada",
    ]
    tasks = load_tasks(names, shared_data)
    assert [t.name for t in tasks] == names
    assert {t.format for t in tasks} == {"choice", "generation"}
    assert all(len(t.items) >= 200 for t in tasks)
