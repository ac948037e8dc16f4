"""Cost of patching all depths and all sublayers, against the bare passes that it needs.

    python -m tests.benchmarks.patching [--small] [--threads 1,2]

Floor: both models' layers, called bare, with as many streams at each layer as the sweep has there
(the model's own, those that left it, and the one that leaves by the other model's sublayers), the
dense forward pass that the surroundings come from, and the products of the final states with the
unembedding. Both sides are taken in turn within a round.
"""

from __future__ import annotations

import argparse
from datetime import date

import torch
import transformers as tf
from prunescope.analysis import causes
from prunescope.probes import Recipe, compress, load
from prunescope.probes.layerwise import layer_calls
from prunescope.probes.patch import patch

from .kernels import ratios

TEXT = "In the year {}, a traveller came to the old town by the river and asked for a room. " * 5
ANSWER = 4  # tokens at the end of each text that are asked about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="two prompts, one round")
    parser.add_argument("--prompts", type=int, default=16, help="of 64 tokens each (default 16)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of both sides (default 3)")
    parser.add_argument("--threads", default="1,2", help="numbers of threads (default 1,2)")
    options = parser.parse_args()
    count, rounds = (2, 1) if options.small else (options.prompts, options.rounds)
    dense = load("smollm2")
    candidate = compress(dense, Recipe.parse("rtn@int4-g64"))
    rows = [
        dense.tokenizer(TEXT.format(*range(1900 + i, 1905 + i)))["input_ids"][:64]
        for i in range(count)
    ]
    prompts = [dense.tokenizer.decode(ids[:-ANSWER]) for ids in rows]
    answers = [dense.tokenizer.decode(ids[-ANSWER:]) for ids in rows]
    layers, width = dense.layer_count, dense.module.config.hidden_size

    @torch.no_grad()
    def floor() -> None:
        for ids in rows:
            tokens = torch.tensor([ids])
            dense.module(input_ids=tokens, use_cache=False, logits_to_keep=1)
            calls = [layer_calls(m, tokens) for m in (dense, candidate)]
            for layer in range(layers):
                for side, leaving in zip(calls, (2, 4), strict=True):  # swaps; and two depths
                    side[layer](torch.randn(1 + leaving * layer, len(ids), width))
                    side[layer](torch.randn(1, len(ids), width))
        streams = 2 + 6 * layers
        states = torch.randn(streams * count * ANSWER, width)
        for part in states.split(1024):
            part @ dense.readout().weight.T

    def ours() -> object:
        return patch(dense, candidate, prompts=prompts, answers=answers)

    print(f"{date.today()}, torch {torch.__version__}, transformers {tf.__version__}\n")
    print("| what | threads | ratio | floor, s |\n| --- | ---: | ---: | ---: |")
    for threads in map(int, options.threads.split(",")):
        torch.set_num_threads(threads)
        found, base = ratios(floor, rounds, ours=ours)
        what = f"patch, {layers} depths and {2 * layers} sublayers both ways, {count} × 64 tokens"
        print(f"| {what} | {threads} | {found['ours']:.2f} | {base:.1f} |", flush=True)
    cell = patch(dense, candidate, prompts=prompts[:2], answers=answers[:2])["patches"]
    print(f"\nworst: {causes.ranking(cell.to_dataset(), 'kl')[0]}")


if __name__ == "__main__":
    main()
