"""Texts as vectors: retrieval (nDCG@10, recall) and similarity of sentences, from hidden states.

Decoder states are poor embeddings next to trained ones; what counts here is how much of what they
can do survives compression. The last layer's states after the final norm are averaged over a text's
tokens (`mean`) or taken from its last one (`last`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ..analysis import schema
from .items import Item, Row, Task, TaskError, not_had, rows_of, text_of
from .model import Model, batches, pad

Pooling = Literal["mean", "last"]
BATCH_TOKENS = 4096
TOKENS = 256  # of a text, the rest is cut off
CUT = 10  # documents that nDCG and recall look at


@torch.no_grad()
def embed(
    model: Model,
    texts: Sequence[str],
    *,
    pooling: Pooling = "mean",
    max_tokens: int = TOKENS,
    progress: Callable[[float], None] = lambda _: None,
) -> Tensor:
    """Unit vectors of texts, `(text, d_model)`, float32.

    Args:
        model: whose last states are used.
        texts: each with at least one token.
        pooling: mean over the tokens, or the last one.
        max_tokens: of a text, at most.
        progress: called with the share of the work that is done.
    """
    rows = [
        model.tokenizer(t)["input_ids"][:max_tokens] or [model.tokenizer.eos_token_id]
        for t in texts
    ]
    made: list[Tensor] = [torch.empty(0)] * len(rows)
    done = 0
    for batch in batches([len(row) for row in rows], BATCH_TOKENS):
        inputs = pad(model, [rows[i] for i in batch])
        hidden = model.module.base_model(**inputs, use_cache=False).last_hidden_state.float()
        mask = inputs["attention_mask"].float()
        if pooling == "last":
            mask = torch.nn.functional.one_hot(mask.sum(-1).long() - 1, mask.shape[1]).float()
        vectors = torch.einsum("btd,bt->bd", hidden, mask) / mask.sum(-1, keepdim=True)
        for i, vector in zip(batch, torch.nn.functional.normalize(vectors, dim=-1), strict=True):
            made[i] = vector
        done += len(batch)
        progress(done / len(rows))
    return torch.stack(made)


def _sides(
    models: Sequence[Model],
    texts: Sequence[str],
    pooling: Pooling,
    progress: Callable[[float], None],
) -> list[Tensor]:
    """The texts' vectors in each model."""
    return [
        embed(m, texts, pooling=pooling, progress=lambda x, n=n: progress((n + x) / len(models)))
        for n, m in enumerate(models)
    ]


def retrieval(
    dense: Model,
    candidate: Model,
    *,
    task: Task,
    pooling: Pooling = "mean",
    progress: Callable[[float], None] = lambda _: None,
) -> xr.DataTree:
    """Search the task's corpus with both models: `/retrieval`, one row a query.

    Each model searches with its own vectors of queries and documents. Gains and recall are
    trec_eval's.
    """
    texts = [*(item.prompt for item in task.items), *(text for _, text in task.corpus)]
    vectors = _sides((dense, candidate), texts, pooling, progress)
    both = np.stack([_judged(task, v) for v in vectors], axis=1)  # query, model, figure
    coords: dict[str, Any] = {
        "query": np.arange(len(task.items)), "model": list(schema.MODELS),
        "item_id": ("query", [i.id for i in task.items]),
        "task": ("query", [task.name] * len(task.items)),
    }  # fmt: skip
    variables = {"ndcg": both[..., 0], "recall": both[..., 1]}
    data = schema.dataset("retrieval", variables, coords, {"cut": CUT, "pooling": pooling})
    return schema.tree({"retrieval": data}, {})


def _judged(task: Task, vectors: Tensor) -> np.ndarray:
    """nDCG and recall of every query, `(query, 2)`."""
    import pytrec_eval

    queries, documents = vectors[: len(task.items)], vectors[len(task.items) :]
    best = (queries @ documents.T).topk(min(100, len(task.corpus)))
    ids = [id for id, _ in task.corpus]
    judged = {i.id: {d: int(g) for d, g in i.relevant} for i in task.items}
    found = {
        item.id: {ids[int(d)]: float(s) for d, s in zip(places, scores, strict=True)}
        for item, places, scores in zip(task.items, best.indices, best.values, strict=True)
    }
    names = (f"ndcg_cut_{CUT}", f"recall_{CUT}")
    judge = pytrec_eval.RelevanceEvaluator(judged, {f"ndcg_cut.{CUT}", f"recall.{CUT}"})
    marks = judge.evaluate(found)
    return np.array([[marks[i.id][name] for name in names] for i in task.items])


def similarity(
    dense: Model,
    candidate: Model,
    *,
    task: Task,
    pooling: Pooling = "mean",
    progress: Callable[[float], None] = lambda _: None,
) -> xr.DataTree:
    """Cosine of the two sentences of each pair in both models, with the gold score: `/similarity`."""
    texts = [text for item in task.items for text in (item.prompt, item.choices[0])]
    vectors = _sides((dense, candidate), texts, pooling, progress)
    sides = [(v[0::2] * v[1::2]).sum(-1).cpu().numpy() for v in vectors]
    coords: dict[str, Any] = {
        "pair": np.arange(len(task.items)), "model": list(schema.MODELS),
        "item_id": ("pair", [i.id for i in task.items]),
        "task": ("pair", [task.name] * len(task.items)),
    }  # fmt: skip
    variables = {
        "cosine": np.stack(sides, axis=1), "gold": np.array([i.grade for i in task.items])
    }  # fmt: skip
    data = schema.dataset("similarity", variables, coords, {"pooling": pooling})
    return schema.tree({"similarity": data}, {})


# --- what is read --------------------------------------------------------------------------------


def pair_rows(name: str, rows: Sequence[tuple[str, Row]]) -> Task:
    """A task of sentence pairs from rows with `sentence1`, `sentence2` and `score`."""
    items = tuple(_pair(row, where, f"{name}-{i}") for i, (where, row) in enumerate(rows))
    return Task(name, "similarity", items, kind="similarity")


def _pair(row: Row, where: str, id: str) -> Item:
    score = row.get("score")
    if not isinstance(score, int | float) or isinstance(score, bool):
        raise TaskError(f"{where}: field 'score' must be a number, not {score!r}")
    first, second = (text_of(row, f"sentence{n}", where) for n in (1, 2))
    return Item(str(row.get("id", id)), first, (second,), grade=float(score))


def is_retrieval(folder: Path) -> bool:
    """Whether a folder holds a corpus, queries and judgements in BEIR's form."""
    return (folder / "corpus.jsonl").is_file() and (folder / "queries.jsonl").is_file()


def read_retrieval(folder: Path) -> Task:
    """A retrieval task from a BEIR folder: corpus.jsonl, queries.jsonl, qrels.tsv or qrels/test.tsv.

    Raises:
        TaskError: a file or field that is missing, a judgement of a query that is not there.
    """
    corpus = tuple(
        _document(row, f"{folder}/corpus.jsonl:{n}") for n, row in rows_of(folder / "corpus.jsonl")
    )
    queries = [
        Item(
            _id(row, f"{folder}/queries.jsonl:{n}"),
            text_of(row, "text", f"{folder}/queries.jsonl:{n}"),
        )
        for n, row in rows_of(folder / "queries.jsonl")
    ]
    return _search(folder.name, str(folder), corpus, queries, _judgements(folder))


Judged = dict[str, list[tuple[str, float]]]  # query -> documents with their grades


def _search(
    name: str, where: str, corpus: tuple[tuple[str, str], ...], queries: list[Item], judged: Judged
) -> Task:
    """The queries that are judged, with what was judged."""
    unknown = {d for docs in judged.values() for d, _ in docs} - {id for id, _ in corpus}
    if unknown:
        raise TaskError(f"{where}: judged documents that corpus lacks: {sorted(unknown)[:3]}")
    items = tuple(replace(q, relevant=tuple(judged[q.id])) for q in queries if q.id in judged)
    if not items:
        raise TaskError(f"{where}: no query of queries is judged")
    return Task(name, "retrieval", items, kind="retrieval", corpus=corpus)


def hub_retrieval(name: str, path: str, judgements: str) -> Task:
    """A retrieval task of the hub in BEIR's form.

    Raises:
        TaskError: it cannot be had.
    """
    import datasets

    try:
        parts: list[Any] = [datasets.load_dataset(path, c, split=c) for c in ("corpus", "queries")]
        graded: Any = datasets.load_dataset(judgements, split="test")
    except Exception as error:
        raise not_had(name, path, error, f"the folder {name} in it, in BEIR's form") from error
    corpus = tuple(_document(row, f"{path}, corpus row {n}") for n, row in enumerate(parts[0]))
    judged: Judged = {}
    for row in graded:
        if row["score"] > 0:
            judged.setdefault(str(row["query-id"]), []).append(
                (str(row["corpus-id"]), row["score"])
            )
    queries = [Item(_id(row, f"{path}, query {n}"), row["text"]) for n, row in enumerate(parts[1])]
    return _search(name, path, corpus, queries, judged)


def _id(row: Row, where: str) -> str:
    return text_of({"id": str(row.get("_id", row.get("id", "")))}, "id", where)


def _document(row: Row, where: str) -> tuple[str, str]:
    title = str(row.get("title") or "")
    return _id(row, where), f"{title} {text_of(row, 'text', where)}".strip()


def _judgements(folder: Path) -> Judged:
    places = [folder / "qrels.tsv", folder / "qrels" / "test.tsv"]
    file = next((p for p in places if p.is_file()), None)
    if file is None:
        raise TaskError(f"{folder}: neither qrels.tsv nor qrels/test.tsv is there")
    found: Judged = {}
    for number, line in enumerate(file.read_text("utf-8").splitlines()[1:], start=2):
        query, document, grade = _line(line, f"{file}:{number}")
        if grade > 0:
            found.setdefault(query, []).append((document, grade))
    return found


def _line(line: str, where: str) -> tuple[str, str, float]:
    parts = line.split("\t")
    try:
        query, document, grade = parts
        return query, document, float(grade)
    except ValueError as error:
        raise TaskError(
            f"{where}: query, document and grade are needed, with tabs between"
        ) from error
