"""Perplexity, seconds and peak memory of every way to compress, one process each.

    python -m tests.benchmarks.compression [--data DIR] [--tokens 32] [--recipe R …]

Calibrated on C4 text, `--tokens` × 512 tokens; perplexity of WikiText-2's test text in windows of
512 tokens. Memory is the peak of the process beyond what it held with the dense model loaded.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
import transformers as tf
from prunescope.probes import Model, Recipe, compress, load
from prunescope.probes.compress import SEED
from prunescope.probes.layerwise import sequences
from prunescope.probes.tasks import load_tasks

RECIPES = (
    "rtn@int8", "rtn@int4-g64", "gptq@int4-g64", "awq@int4-g64", "rtn@int3-g64", "gptq@int3-g64",
    "awq@int3-g64", "sparsegpt@0.5", "wanda@0.5", "magnitude@0.5", "random@0.5", "sparsegpt@4:8",
    "wanda@4:8", "magnitude@4:8", "sparsegpt@2:4", "wanda@2:4", "magnitude@2:4",
)  # fmt: skip
LENGTH, WINDOWS = 512, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--tokens", type=int, default=32, help="sequences of 512 tokens")
    parser.add_argument("--recipe", action="append", help="only these")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(row(options.one, options.data, options.tokens)))
        return
    print(f"{date.today()}, torch {torch.__version__}, transformers {tf.__version__}, "
          f"{options.tokens} × {LENGTH} tokens of C4\n")  # fmt: skip
    print("| recipe | perplexity | seconds | MB beyond the model |\n| --- | ---: | ---: | ---: |")
    for recipe in ("", *(options.recipe or RECIPES)):
        command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.compression"]
        command += ["--one", recipe, "--data", str(options.data), "--tokens", str(options.tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        perplexity, seconds, memory = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {recipe or 'dense'} | {perplexity:.2f} | {seconds:.0f} | {memory:.0f} |", flush=True
        )


def row(recipe: str, data: Path, count: int) -> tuple[float, float, float]:
    """Perplexity, seconds to compress, and peak MB beyond the loaded model."""
    model = load("smollm2")
    rows = (json.loads(line) for line in (data / "c4.jsonl").open(encoding="utf-8"))
    texts = _first(model, [r["text"] for r in rows], count * LENGTH)
    before, start = _peak(), time.perf_counter()
    if recipe:
        model = compress(model, Recipe.parse(recipe), calibration=texts, seed=SEED)
    seconds, memory = time.perf_counter() - start, _peak() - before
    return perplexity(model, data), seconds, memory


def _first(model: Model, texts: list[str], tokens: int) -> list[str]:
    """As many of the texts as hold so many tokens."""
    kept, held = list[str](), 0
    for text in texts:
        if held >= tokens:
            break
        kept.append(text)
        held += len(model.tokenizer(text)["input_ids"])
    return kept


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.no_grad()
def perplexity(model: Model, data: Path) -> float:
    texts = [item.prompt for item in load_tasks(["wikitext2"], data)[0].items]
    lost = 0.0
    windows = sequences(model, texts, LENGTH)[:WINDOWS]
    for window in windows:
        logits = model.module(window[None], use_cache=False).logits[0, :-1]
        lost += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return math.exp(lost / (len(windows) * (windows.shape[1] - 1)))


if __name__ == "__main__":
    main()
