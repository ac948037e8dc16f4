"""Cost of the four histories of decoding, against the bare generation that they need anyway.

    python -m tests.benchmarks.decoding [--small] [--threads 1,2]

Floor: both models generate (greedy, the same batch and steps), and the candidate reads the dense
texts once, as `forced` needs. Both sides are taken in turn within a round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import date

import torch
import transformers as tf
from prunescope.probes import Recipe, compress, decode, load
from prunescope.probes.decode import TEMPERATURES
from prunescope.probes.model import pad
from prunescope.probes.writing import write

from .kernels import ratios

PROMPT = "In the year {}, a traveller came to the old town by the river and"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="four prompts, 16 steps, one round")
    parser.add_argument("--threads", default="1,2", help="numbers of threads (default 1,2)")
    options = parser.parse_args()
    count, steps, rounds = (4, 16, 1) if options.small else (16, 64, 5)
    dense = load("smollm2")
    candidate = compress(dense, Recipe.parse("rtn@int4-g64"))
    prompts = [PROMPT.format(1900 + i) for i in range(count)]
    rows = [dense.tokenizer(p)["input_ids"] for p in prompts]

    def floor() -> None:
        texts = write(dense, prompts, steps)
        write(candidate, prompts, steps)
        batch = pad(dense, [row + text[:-1] for row, text in zip(rows, texts, strict=True)])
        with torch.no_grad():
            candidate.module(**batch, use_cache=False)

    def ours(compiled: bool, *temperatures: float) -> Callable[[], object]:
        return lambda: decode(
            dense,
            candidate,
            prompts=prompts,
            steps=steps,
            temperatures=temperatures,
            compiled=compiled,
        )

    print(f"{date.today()}, torch {torch.__version__}, transformers {tf.__version__}\n")
    print("| what | threads | ratio | floor, s |\n| --- | ---: | ---: | ---: |")
    for threads in map(int, options.threads.split(",")):
        torch.set_num_threads(threads)
        found, base = ratios(
            floor, rounds, plain=ours(False), fused=ours(True), five=ours(True, *TEMPERATURES)
        )
        words = {"plain": "plain", "fused": "fused", "five": "fused, four more temperatures"}
        for name, value in found.items():
            what = f"decode, four histories, {count} × {steps}, {words[name]}"
            print(f"| {what} | {threads} | {value:.2f} | {base:.1f} |", flush=True)


if __name__ == "__main__":
    main()
