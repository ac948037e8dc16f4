import json

import pytest
from prunescope.probes.benchmarks import BENCHMARKS, MADE
from prunescope.probes.items import TaskError
from prunescope.probes.tasks import load_tasks, read_task
from prunescope.probes.twins import TWINS, twin


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


@pytest.mark.parametrize("name", [*BENCHMARKS, *MADE])
def test_every_benchmark_is_read_from_the_folder(name, shared_data):
    tasks = load_tasks([name], shared_data)
    assert {t.name for t in tasks} == {name}
    assert len(tasks) == 2 if name.endswith("-twin") else 1
    for task in tasks:
        assert len(task.items) >= (30 if name == "wikitext2" else 80)
        ids = [i.id for i in task.items]
        assert len(set(ids)) == len(ids)
        assert all(i.prompt or i.choices for i in task.items)


@pytest.mark.parametrize(
    ("name", "begins", "ends", "choices"),
    [
        ("arc_easy", "Question: Which of these is an", "Answer:", " storing milk"),
        ("piqa", "Question: How  do you make", "Answer:", " Cut them"),
        ("hellaswag", "Family Life: How to", "motor skills.", " Give her"),
        ("boolq", "The ASU includes", "jacket?\nAnswer:", " no"),
        ("openbookqa", "as you get closer", "begins to", ""),
        ("truthfulqa_mc1", "Q: What is human life", "dancing?\nA:", " The Irish"),
        ("commonsenseqa", "Question: Where is a grape", "E. painting\nAnswer:", " A"),
        ("nq_open", "Answer these questions:\n\nQ: ", "in florida?\nA:", ""),
        ("xquad_en", "Context: BSkyB", "\n\nAnswer:", ""),
    ],
)
def test_prompts_are_those_of_lm_evaluation_harness(name, begins, ends, choices, shared_data):
    item = load_tasks([name], shared_data)[0].items[0]
    assert item.prompt.startswith(begins)
    assert item.prompt.endswith(ends) or name == "hellaswag"
    assert not choices or item.choices[0].startswith(choices)


def test_solved_examples(shared_data):
    mmlu = load_tasks(["mmlu"], shared_data)[0]
    head = "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    assert mmlu.items[0].prompt.startswith(head)
    assert mmlu.items[0].prompt.count("\nAnswer: ") == 5
    assert mmlu.items[0].prompt.endswith("D. False, True\nAnswer:")
    assert mmlu.items[0].choices == (" A", " B", " C", " D")
    sums = load_tasks(["gsm8k"], shared_data)[0].items[0].prompt
    assert sums.count("Question: ") == 6
    assert sums.count("\n#### ") == 5
    code = load_tasks(["mbpp"], shared_data)[0].items[0]
    assert code.prompt.count("[DONE]") == 3
    assert code.prompt.endswith("[BEGIN]\n")


def test_a_blank_is_filled_before_what_is_scored(shared_data):
    item = load_tasks(["winogrande"], shared_data)[0].items[0]
    assert item.before(1).endswith("owned by Jason, so Jason")
    assert item.choices == (" received the rent for the apartment each month.",) * 2


def test_any_choice_can_be_asked_by_letter(shared_data):
    task = load_tasks(["arc_easy:letters"], shared_data)[0]
    assert task.letters
    assert task.items[0].choices == (" A", " B", " C", " D")
    with pytest.raises(TaskError, match="only NAME:letters"):
        load_tasks(["arc_easy:words"], shared_data)
    with pytest.raises(TaskError, match="only NAME:letters"):
        load_tasks(["gsm8k:letters"], shared_data)


def test_twins_of_benchmarks_have_the_same_prompts(shared_data):
    for name in ("gsm8k-twin", "arc-twin"):
        choice, written = load_tasks([name], shared_data)
        assert choice.items == written.items
        assert (choice.format, written.format, choice.twin) == ("choice", "generation", name)
        for item in choice.items:
            assert len(set(item.choices)) >= 2
            assert item.accepted == (item.right.strip(),)


HUB = {
    "arc_easy": {"question": "Q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    "openbookqa": {"question_stem": "Q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    "hellaswag": {"activity_label": "Play", "ctx_a": "He [x] runs.", "ctx_b": "then", "endings": ["a", "b"], "label": "1"},
    "piqa": {"goal": "Q", "sol1": "a", "sol2": "b", "label": 1},
    "winogrande": {"sentence": "A and B, _ won.", "option1": "A", "option2": "B", "answer": "2"},
    "boolq": {"passage": "P", "question": "is it", "label": 1},
    "truthfulqa_mc1": {"question": "Q", "mc1_targets": {"choices": ["a", "b"], "labels": [0, 1]}},
    "blimp": {"sentence_good": "b", "sentence_bad": "a"},
    "lambada": {"text": "the red house"},
    "wikitext2": {"text": "Some text."},
    "humaneval": {"prompt": "def f():\n", "test": "def check(f): pass", "entry_point": "f", "canonical_solution": " return 1"},
    "xquad_en": {"context": "C", "question": "Q", "answers": {"text": ["a", "b"]}},
}  # fmt: skip


@pytest.mark.parametrize("name", list(HUB))
def test_rows_of_the_hub_become_ours(name, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [HUB[name]]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: ["only"])
    task = load_tasks([name])[0]
    assert asked[0][1]["split"] == BENCHMARKS[name].hub.split
    item = task.items[0]
    if task.format == "choice":
        assert len(item.choices) == 2
        assert item.answer == (0 if name == "blimp" else 1)
    if name == "hellaswag":
        assert item.prompt == "Play: He runs. Then"
    if name == "boolq":
        assert item.prompt == "P\nQuestion: is it?\nAnswer:"
    if name == "lambada":
        assert (item.prompt, item.choices) == ("the red", (" house",))


def test_a_benchmark_that_cannot_be_had_says_so(tmp_path, monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(TaskError, match=r"piqa: .*cannot be had .*no network.*--data DIR"):
        load_tasks(["piqa"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [])
    with pytest.raises(TaskError, match="empty split"):
        load_tasks(["piqa"], tmp_path)


def test_missing_examples_and_bad_fields_are_named(tmp_path):
    write(tmp_path, "gsm8k", [{"question": "q", "answer": "1"}])
    with pytest.raises(TaskError, match="gsm8k_fewshot"):
        load_tasks(["gsm8k"], tmp_path)
    write(tmp_path, "gsm8k_fewshot", [{"question": "q", "answer": "1"}])
    with pytest.raises(TaskError, match="5 solved examples are needed, there are 1"):
        load_tasks(["gsm8k"], tmp_path)
    write(tmp_path, "winogrande", [{"question": "no blank", "choices": ["a", "b"], "answer": 0}])
    with pytest.raises(TaskError, match=r"winogrande\.jsonl:1: field 'question' has no blank"):
        load_tasks(["winogrande"], tmp_path)
    write(tmp_path, "stsb", [{"sentence1": "a", "sentence2": "b", "score": "x"}])
    with pytest.raises(TaskError, match="field 'score' must be a number"):
        load_tasks(["stsb"], tmp_path)
    write(tmp_path, "humaneval", [{"prompt": "p", "test": "t", "style": "x"}])
    with pytest.raises(TaskError, match="style"):
        load_tasks(["humaneval"], tmp_path)


def test_retrieval_folders_are_checked(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    write(folder, "corpus", [{"_id": "d", "title": "T", "text": "x"}])
    write(folder, "queries", [{"_id": "q", "text": "x"}])
    with pytest.raises(TaskError, match="neither qrels"):
        load_tasks(["mine"], tmp_path)
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\te\t1\n", "utf-8")
    with pytest.raises(TaskError, match="judged documents that corpus"):
        load_tasks(["mine"], tmp_path)
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq d 1\n", "utf-8")
    with pytest.raises(TaskError, match=r"qrels\.tsv:2"):
        load_tasks(["mine"], tmp_path)
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n", "utf-8")
    task = load_tasks(["mine"], tmp_path)[0]
    assert task.corpus == (("d", "T x"),)
    assert task.items[0].relevant == (("d", 1.0),)
