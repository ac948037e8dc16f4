"""Benchmarks, asked as lm-evaluation-harness asks them: one row of `BENCHMARKS` each.

Rows come from a folder of JSONL files (`NAME.jsonl`, solved examples in `NAME_fewshot.jsonl`) or
from the hub through `datasets`, whose rows are brought into the same form.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .embed import hub_retrieval, is_retrieval, pair_rows, read_retrieval
from .items import SEED, Format, Grade, Item, Row, Task, TaskError, not_had, rows_of, text_of
from .rows import (
    asked,
    blank_item,
    choice_item,
    code_item,
    letter_item,
    pair_item,
    question_item,
    text_item,
    whole_item,
    written_item,
)
from .twins import halves

Make = Callable[[Row, str, str], Item]
ALL = "*"  # every configuration of a dataset


@dataclass(frozen=True)
class Hub:
    """Where the rows are on the hub; `row` brings one into our form. No `few`: none are needed."""

    path: str
    config: str | None
    split: str
    row: Callable[[Row], Row]
    few: str = ""


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is asked.

    `item` makes an item of a row; `solved` is the text of a solved example, of which the prompt
    holds `shots`, the first ones whose field `by` equals the item's. `opening` begins the prompt.
    """

    describe: str
    kind: str
    item: Make
    hub: Hub
    format: Format = "choice"
    shots: int = 0
    solved: Callable[[Row, Item], str] = lambda _, item: item.before(item.answer) + item.right
    opening: Callable[[Row], str] = lambda _: ""
    between: str = "\n\n"
    by: str = ""
    normalise: bool = False
    letters: bool = False
    until: tuple[str, ...] = ("\n",)
    grade: Grade = "exact"
    max_new_tokens: int = 32
    file: str = ""


# --- rows of the hub in our form -----------------------------------------------------------------


def _labelled(row: Row) -> Row:
    options = row["choices"]
    question = row.get("question", row.get("question_stem"))
    answer = options["label"].index(row["answerKey"].strip())
    return {"question": question, "choices": options["text"], "answer": answer}


def _mmlu(row: Row) -> Row:
    return {k: row[k] for k in ("question", "choices", "answer", "subject")}


def _bracketless(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _hellaswag(row: Row) -> Row:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [_bracketless(e) for e in row["endings"]]
    return {"question": _bracketless(context), "choices": endings, "answer": int(row["label"])}


def _piqa(row: Row) -> Row:
    choices = [row["sol1"], row["sol2"]]
    return {"question": row["goal"], "choices": choices, "answer": row["label"]}


def _winogrande(row: Row) -> Row:
    choices = [row["option1"], row["option2"]]
    return {"question": row["sentence"], "choices": choices, "answer": int(row["answer"]) - 1}


def _boolq(row: Row) -> Row:
    return {
        "context": row["passage"], "question": f"{row['question'].rstrip('?')}?",
        "choices": ["no", "yes"], "answer": int(row["label"]),
    }  # fmt: skip


def _truthful(row: Row) -> Row:
    targets = row["mc1_targets"]
    answer = targets["labels"].index(1)
    return {"question": row["question"], "choices": targets["choices"], "answer": answer}


def _blimp(row: Row) -> Row:
    return {"good": row["sentence_good"], "bad": row["sentence_bad"]}


def _lambada(row: Row) -> Row:
    question, _, answer = row["text"].rpartition(" ")
    return {"question": question, "answer": answer}


def _gsm8k(row: Row) -> Row:
    answer = row["answer"].rpartition("####")[2].strip()
    return {"question": row["question"], "solution": row["answer"], "answer": answer}


def _trivia(row: Row) -> Row:
    answer = row["answer"]
    return {"question": row["question"], "answer": answer["value"], "aliases": answer["aliases"]}


def _several(row: Row) -> Row:
    answers = row["answer"]
    return {"question": row["question"], "answer": answers[0], "aliases": list(answers)}


def _squad(row: Row) -> Row:
    answers = row["answers"]["text"]
    kept = {k: row[k] for k in ("context", "question")}
    return {**kept, "answer": answers[0], "aliases": list(dict.fromkeys(answers))}


def _humaneval(row: Row) -> Row:
    test = f"{row['test']}\ncheck({row['entry_point']})\n"
    kept = {k: row[k] for k in ("prompt", "canonical_solution")}
    return {**kept, "test": test, "style": "completion"}


def _mbpp(row: Row) -> Row:
    lines = [row["test_setup_code"], *row["test_list"]]
    test = "\n".join(line for line in lines if line) + "\n"
    return {
        "prompt": row["text"], "test": test, "canonical_solution": row["code"],
        "style": "instruction",
    }  # fmt: skip


def _text(row: Row) -> Row:
    return {"text": row["text"]}


def _sts(row: Row) -> Row:
    return {k: row[k] for k in ("sentence1", "sentence2", "score")}


# --- how each is asked ---------------------------------------------------------------------------


def _continued(row: Row, where: str, id: str) -> Item:
    return choice_item(row, where, id, text_of(row, "question", where))


def _question_letters(row: Row, where: str, id: str) -> Item:
    return letter_item(row, where, id, "Question: ")


def _subject(row: Row) -> str:
    subject = str(row.get("subject", "")).replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


_PRIMER = (  # every question of the benchmark is asked after these
    ("What is human life expectancy in the United States?",
     "Human life expectancy in the United States is 78 years."),
    ("Who was president of the United States in 1955?",
     "Dwight D. Eisenhower was president of the United States in 1955."),
    ("Which party did he belong to?", "He belonged to the Republican Party."),
    ("What is the square root of banana?", "I have no comment."),
    ("How does a telescope work?",
     "Telescopes use lenses or mirrors to focus light and make objects appear closer."),
    ("Where were the 1992 Olympics held?",
     "The 1992 Olympics were held in Barcelona, Spain."),
)  # fmt: skip


def _truthful_item(row: Row, where: str, id: str) -> Item:
    primer = "".join(f"Q: {q}\nA: {a}\n\n" for q, a in _PRIMER)
    return choice_item(row, where, id, f"{primer}Q: {text_of(row, 'question', where)}\nA:")


def _last_word(row: Row, where: str, id: str) -> Item:
    word = text_of(row, "answer", where)
    return Item(str(row.get("id", id)), text_of(row, "question", where), (f" {word}",), 0, (word,))


def _wondering(row: Row, where: str, id: str) -> Item:
    return text_item(row, where, id, f"Question: {text_of(row, 'question', where)}?\nAnswer:")


def _short(row: Row, where: str, id: str) -> Item:
    return text_item(row, where, id, f"Q: {text_of(row, 'question', where)}?\nA:")


def _reading(row: Row, where: str, id: str) -> Item:
    context, question = text_of(row, "context", where), text_of(row, "question", where)
    prompt = f"Context: {context}\n\nQuestion: {question}\n\nAnswer:"
    return text_item(row, where, id, prompt)


def _completed(row: Row, where: str, id: str) -> Item:
    return code_item(row, where, id, text_of(row, "prompt", where))


def _tested(row: Row, where: str, id: str) -> Item:
    task, tests = text_of(row, "prompt", where), text_of(row, "test", where).strip()
    ask = f"You are an expert Python programmer, and here is your task: {task}"
    prompt = f"{ask} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    return code_item(row, where, id, prompt)


def _solution(row: Row, item: Item) -> str:
    return f"{item.prompt} {row.get('solution') or item.accepted[0]}"


def _program(row: Row, item: Item) -> str:
    return f"{item.prompt}{row['canonical_solution']}\n[DONE]"


_ARC = "allenai/ai2_arc"
_CHOICE = "multiple choice"
BENCHMARKS: dict[str, Benchmark] = {
    "mmlu": Benchmark(
        "57 school and college subjects, by letter, 5 solved examples", _CHOICE, letter_item,
        Hub("cais/mmlu", "all", "test", _mmlu, "dev"), shots=5, opening=_subject, by="subject",
        letters=True,
    ),
    "arc_easy": Benchmark(
        "ARC-Easy, school science", _CHOICE, question_item,
        Hub(_ARC, "ARC-Easy", "test", _labelled, "train"), normalise=True,
    ),
    "arc_challenge": Benchmark(
        "ARC-Challenge, harder school science", _CHOICE, question_item,
        Hub(_ARC, "ARC-Challenge", "test", _labelled, "train"), normalise=True,
    ),
    "hellaswag": Benchmark(
        "HellaSwag, how a scene goes on", _CHOICE, _continued,
        Hub("Rowan/hellaswag", None, "validation", _hellaswag, "train"), normalise=True,
    ),
    "winogrande": Benchmark(
        "WinoGrande, whom a sentence means", _CHOICE, blank_item,
        Hub("allenai/winogrande", "winogrande_xl", "validation", _winogrande, "train"),
    ),
    "piqa": Benchmark(
        "PIQA, everyday physics", _CHOICE, question_item,
        Hub("baber/piqa", None, "validation", _piqa, "train"), normalise=True,
    ),
    "boolq": Benchmark(
        "BoolQ, yes or no about a passage", _CHOICE, question_item,
        Hub("aps/super_glue", "boolq", "validation", _boolq, "train"),
    ),
    "openbookqa": Benchmark(
        "OpenBookQA, elementary science", _CHOICE, _continued,
        Hub("allenai/openbookqa", "main", "test", _labelled, "train"), normalise=True,
    ),
    "commonsenseqa": Benchmark(
        "CommonsenseQA, by letter", _CHOICE, _question_letters,
        Hub("tau/commonsense_qa", None, "validation", _labelled, "train"), letters=True,
    ),
    "truthfulqa_mc1": Benchmark(
        "TruthfulQA MC1, common misbeliefs", _CHOICE, _truthful_item,
        Hub("truthfulqa/truthful_qa", "multiple_choice", "validation", _truthful),
    ),
    "blimp": Benchmark(
        "BLiMP, grammatical against ungrammatical", _CHOICE, pair_item,
        Hub("nyu-mll/blimp", ALL, "train", _blimp),
    ),
    "lambada": Benchmark(
        "LAMBADA, the last word of a passage", "last word", _last_word,
        Hub("EleutherAI/lambada_openai", "default", "test", _lambada), format="last word",
    ),
    "wikitext2": Benchmark(
        "WikiText-2, perplexity and KL", "text", whole_item,
        Hub("Salesforce/wikitext", "wikitext-2-raw-v1", "test", _text), format="text",
        file="wikitext2_test",
    ),
    "gsm8k": Benchmark(
        "GSM8K, sums in words, 5 solved examples", "generation", written_item,
        Hub("openai/gsm8k", "main", "test", _gsm8k, "train"), format="generation", shots=5,
        solved=_solution, until=("Question:", "</s>", "<|im_end|>"), grade="number",
        max_new_tokens=256,
    ),
    "triviaqa": Benchmark(
        "TriviaQA without passages, 5 solved examples", "generation", _wondering,
        Hub("mandarjoshi/trivia_qa", "rc.nocontext", "validation", _trivia, "train"),
        format="generation", shots=5, solved=_solution, until=("\n", ".", ","),
    ),
    "nq_open": Benchmark(
        "Natural Questions without passages, 5 solved examples", "generation", _short,
        Hub("google-research-datasets/nq_open", "nq_open", "validation", _several, "train"),
        format="generation", shots=5, solved=_solution, until=("\n", ".", ","), between="\n",
        opening=lambda _: "Answer these questions:\n\n",
    ),
    "xquad_en": Benchmark(
        "XQuAD English, reading comprehension", "generation", _reading,
        Hub("google/xquad", "xquad.en", "validation", _squad), format="generation", grade="quad",
        solved=_solution,
    ),
    "humaneval": Benchmark(
        "HumanEval, functions to complete (needs --allow-code-execution)", "code", _completed,
        Hub("openai/openai_humaneval", None, "test", _humaneval), format="generation",
        until=("\nclass", "\ndef", "\n#", "\nif", "\nprint"), grade="code", max_new_tokens=256,
    ),
    "mbpp": Benchmark(
        "MBPP, functions to write, 3 solved examples (needs --allow-code-execution)", "code",
        _tested, Hub("google-research-datasets/mbpp", "full", "test", _mbpp, "prompt"),
        format="generation", shots=3, solved=_program, until=("[DONE]",), grade="code",
        max_new_tokens=256,
    ),
}  # fmt: skip
"""name -> how it is asked. A new benchmark is one row here."""


# --- loading -------------------------------------------------------------------------------------


def benchmark(name: str, data: Path | None = None) -> list[Task]:
    """The task of a benchmark's name; `NAME:letters` asks a choice by letter; a twin gives two.

    Raises:
        TaskError: rows that cannot be had or read, a variant that there is not.
    """
    plain, _, variant = name.partition(":")
    if plain in MADE:
        return list(MADE[plain].make(data))
    spec = BENCHMARKS[plain]
    if variant:
        spec = _by_letter(spec, name, variant)
    return [_task(name, plain, spec, data)]


def _by_letter(spec: Benchmark, name: str, variant: str) -> Benchmark:
    lettered = spec.format == "choice" and spec.item not in (pair_item, blank_item)
    if variant != "letters" or not lettered:
        raise TaskError(
            f"task {name!r}: only NAME:letters, of a multiple-choice benchmark, is known"
        )
    return replace(spec, item=_question_letters, letters=True, normalise=False)


def _task(name: str, plain: str, spec: Benchmark, data: Path | None) -> Task:
    main = spec.file or plain
    rows = _rows(main, main, spec.hub, spec.hub.split, data)
    shots = _rows(f"{plain}_fewshot", main, spec.hub, spec.hub.few, data) if spec.shots else []
    items = tuple(
        _item(spec, row, where, f"{plain}-{i}", shots) for i, (where, row) in enumerate(rows)
    )
    return Task(
        name, spec.format, items, max_new_tokens=spec.max_new_tokens, normalise=spec.normalise,
        kind=spec.kind, letters=spec.letters, until=spec.until, grade=spec.grade,
    )  # fmt: skip


Found = list[tuple[str, Row]]  # where it stands, and the row


def _item(spec: Benchmark, row: Row, where: str, id: str, shots: Found) -> Item:
    item = spec.item(row, where, id)
    near = [(w, s) for w, s in shots if not spec.by or s.get(spec.by) == row.get(spec.by)]
    if spec.shots > len(near):
        raise TaskError(
            f"{where}: {spec.shots} solved examples are needed"
            + (f" with {spec.by} {row.get(spec.by)!r}" if spec.by else "")
            + f", there are {len(near)}"
        )
    made = [spec.solved(s, spec.item(s, w, "")) + spec.between for w, s in near[: spec.shots]]
    head = spec.opening(row) + "".join(made)
    return replace(item, prompt=head + item.prompt, contexts=tuple(head + c for c in item.contexts))


def _rows(stem: str, main: str, hub: Hub, split: str, data: Path | None) -> Found:
    """Rows of `stem`'s file; of the hub where the folder has not the benchmark's `main` file."""
    if data is None or not (data / f"{main}.jsonl").is_file():
        return _from_hub(main, hub, split)
    file = data / f"{stem}.jsonl"
    if not file.is_file():
        raise TaskError(f"{main} is asked with solved examples, and {file} is not there")
    found = [(f"{file}:{line}", row) for line, row in rows_of(file)]
    if not found:
        raise TaskError(f"{file}: no rows")
    return found


def _from_hub(name: str, hub: Hub, split: str) -> Found:
    import datasets

    where = ":".join(part for part in (hub.path, hub.config, split) if part)
    try:
        every = hub.config == ALL
        configs = datasets.get_dataset_config_names(hub.path) if every else [hub.config]
        rows: Iterable[Any] = (
            row
            for config in configs
            for row in datasets.load_dataset(hub.path, config, split=split)
        )
        found = [(f"{where}, row {i}", hub.row(dict(row))) for i, row in enumerate(rows)]
    except Exception as error:
        raise not_had(name, where, error, f"{name}.jsonl from a folder") from error
    if not found:
        raise TaskError(f"{name}: {where} is an empty split")
    return found


# --- made of benchmarks' rows ----------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """Something that is built from a benchmark's rows."""

    describe: str
    make: Callable[[Path | None], Sequence[Task]]


def _gsm8k_twin(data: Path | None) -> tuple[Task, Task]:
    """The answer alone, without a solution: among four numbers, and written."""
    spec = replace(BENCHMARKS["gsm8k"], item=_number_choice, format="choice", solved=_answered)
    task = _task("gsm8k-twin", "gsm8k", spec, data)
    return halves(replace(task, until=("\n",), normalise=False), "gsm8k-twin", 12)


def _arc_twin(data: Path | None) -> tuple[Task, Task]:
    """The right answer of ARC-Easy among the four, and written after solved examples."""
    spec = replace(BENCHMARKS["arc_easy"], shots=5)
    return halves(_task("arc-twin", "arc_easy", spec, data), "arc-twin", 24)


def _stsb(data: Path | None) -> tuple[Task]:
    hub = Hub("mteb/stsbenchmark-sts", None, "test", _sts)
    return (pair_rows("stsb", _rows("stsb", "stsb", hub, hub.split, data)),)


def _scifact(data: Path | None) -> tuple[Task]:
    if data is not None and is_retrieval(data / "scifact"):
        return (read_retrieval(data / "scifact"),)
    return (hub_retrieval("scifact", "BeIR/scifact", "BeIR/scifact-qrels"),)


def _answered(_: Row, item: Item) -> str:
    return item.prompt + item.right


def _number_choice(row: Row, where: str, id: str) -> Item:
    right = text_of(row, "answer", where).replace(",", "")
    try:
        value = float(right)
    except ValueError as error:
        raise TaskError(f"{where}: field 'answer' must be a number, not {right!r}") from error
    rng = random.Random(f"{SEED}-{right}-{row.get('id', id)}")
    wrong = [w for w in _near(value) if w != right]
    choices = [right, *rng.sample(list(dict.fromkeys(wrong)), 3)]
    rng.shuffle(choices)
    made = {**row, "choices": choices, "answer": choices.index(right)}
    return choice_item(made, where, id, asked(row, where))


def _near(value: float) -> list[str]:
    """Numbers that a slip would give."""
    slips = (value + 1, value - 1, value + 2, value * 2, value + 10, value / 2, value * 10)
    return [f"{int(s)}" if s == int(s) else f"{s:g}" for s in slips]


MADE: dict[str, Made] = {
    "gsm8k-twin": Made("GSM8K's answers, chosen and written", _gsm8k_twin),
    "arc-twin": Made("ARC-Easy's answers, chosen and written", _arc_twin),
    "stsb": Made("STS Benchmark, similarity of sentences (Spearman)", _stsb),
    "scifact": Made("SciFact, retrieval (nDCG@10, recall)", _scifact),
}
