"""Cuts of SmolLM2's neurons: five orders along the ratios, three seeds, the target beside other tasks.

    python -m tests.benchmarks.neurons --cost
    python -m tests.benchmarks.neurons --out DIR [--target counting] [--items 24] [--seeds 1,2,3]

The first times the statistics beside the bare forward passes that they need, in turn. The second compresses and scores only, so that a cell takes well under a minute; cells that are in DIR are kept.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from prunescope.analysis import diagnose, schema
from prunescope.probes import Recipe, compress, load, load_tasks
from prunescope.probes.model import Model, batches, pad
from prunescope.probes.neurons import activity, pools
from prunescope.probes.rank import calibration_texts
from prunescope.probes.recipe import Neurons
from prunescope.probes.score import answers, pair
from prunescope.reports import render

OTHERS = ("capitals", "opposites", "plurals", "kinds")
RATIOS = {
    "reverse": (0.05, 0.1, 0.2), "salience-reverse": (0.05, 0.1, 0.2),
    "selective": (0.1, 0.2, 0.35), "random": (0.1, 0.2, 0.35),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cost", action="store_true", help="time the statistics only")
    parser.add_argument("--target", default="counting")
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--seeds", default="1,2,3")
    options = parser.parse_args()
    dense = load("smollm2")
    if options.cost:
        print(
            f"| neuron statistics, 128 × 256 tokens | {cost(dense):.2f} × the bare forward passes |"
        )
        return
    if options.out is None:
        parser.error("--out or --cost is needed")
    tasks = [t.limited(options.items) for t in load_tasks([options.target, *OTHERS])]
    ranking, own = pools([options.target], scored=tasks), answers(dense, tasks)
    cells = {}
    for seed in map(int, options.seeds.split(",")):
        for recipe in recipes(options.target, seed):
            file = options.out / f"{recipe}.nc"
            if not file.exists():
                candidate = compress(dense, recipe, ranking=ranking)
                groups = {
                    "scores": pair(tasks, own, answers(candidate, tasks)),
                    **candidate.measured,
                }
                told = {"recipe": str(recipe), "achieved": candidate.achieved, "model": dense.name}
                schema.write(schema.tree(groups, told), file)
            cells[str(recipe)] = schema.read(file)
            print(file.name, flush=True)
    found = [f for f in diagnose(cells) if f.evidence == "/scores, neurons"]
    print(*(f.claim for f in found), sep="\n")
    render(cells, options.out / "report.html")


@torch.no_grad()
def cost(model: Model, rounds: int = 3) -> float:
    """Seconds of `activity` over those of the same batches run bare, medians of rounds in turn."""
    text = " ".join(calibration_texts())
    ids = model.tokenizer(text)["input_ids"]
    rows = [[ids[(256 * i + t) % len(ids)] for t in range(256)] for i in range(128)]
    fed = replace(model, tokenizer=_Rows(model.tokenizer, rows))
    bare, whole = list[float](), list[float]()
    for _ in range(rounds):
        start = time.perf_counter()
        for batch in batches([256] * len(rows)):
            inputs = pad(model, [rows[i] for i in batch])
            model.module(**inputs, use_cache=False, logits_to_keep=1)
        bare.append(time.perf_counter() - start)
        start = time.perf_counter()
        activity(fed, [str(i) for i in range(len(rows))])
        whole.append(time.perf_counter() - start)
    return statistics.median(w / b for w, b in zip(whole, bare, strict=True))


class _Rows:
    """Stands for a tokenizer: gives rows of ids by their number."""

    def __init__(self, tokenizer: Any, rows: list[list[int]]) -> None:
        self.rows, self.pad_token_id = rows, tokenizer.pad_token_id
        self.bos_token_id = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.rows[int(text)]}


def recipes(target: str, seed: int) -> list[Recipe]:
    made = []
    for order, ratios in RATIOS.items():
        for ratio in ratios:
            step = Recipe.parse(f"neurons-{order}@{ratio}").steps[0]
            assert isinstance(step.amount, Neurons)
            amount = replace(step.amount, target=target, seed=seed)
            made.append(Recipe((replace(step, amount=amount),)))
    return made


if __name__ == "__main__":
    main()
