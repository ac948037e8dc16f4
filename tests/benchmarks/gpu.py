"""The same ratios on a 7B-shaped model of random weights in bf16, for an accelerator.

    python -m tests.benchmarks.gpu [--device cuda] [--small]

Prints, beside the ratios, the share of the matrix-product limit that the two bare forwards and
`measure` reach, and the peak memory beyond both models' weights. `--small` shrinks the model so
that the script itself can be tried on a CPU; its numbers mean nothing there.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from datetime import date

import torch
import transformers as tf
from prunescope.probes import Model, Recipe, compress, load
from prunescope.probes.anatomy import anatomy_of
from prunescope.probes.measure import measure
from prunescope.probes.model import encode

from .kernels import bare, layerwise, rows

FULL = {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 152_064}  # fmt: skip
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 49_152}  # fmt: skip


def build(shape: dict[str, int], device: str) -> Model:
    """Random weights; SmolLM2's tokenizer, whose ids are all valid."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(**shape)
    with torch.device(device):
        module = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    module = module.eval().requires_grad_(False)
    name = f"random d={shape['hidden_size']}, bf16"
    return Model(module, load("smollm2").tokenizer, anatomy_of(config), name, "random")


def product_limit(device: str, size: int) -> float:
    """Floating-point operations per second of a large bf16 matrix product."""
    x = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    return 2 * size**3 / _timed(lambda: x @ x)


def _timed(run: Callable[[], object], rounds: int = 5) -> float:
    run()
    best = float("inf")
    for _ in range(rounds):
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        best = min(best, time.perf_counter() - start)
    return best


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def beyond_weights(run: Callable[[], object]) -> float:
    """MB at the peak beyond what is held before (the weights)."""
    if not torch.cuda.is_available():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="a small model, to try the script")
    options = parser.parse_args()
    model = build(SMALL if options.small else FULL, options.device)
    candidate = compress(model, Recipe.parse("rtn@int4-g64"))
    text = "one two three four five six seven eight nine ten " * 20
    prompt = model.tokenizer.decode(
        model.tokenizer(text)["input_ids"][: 32 if options.small else 128]
    )
    prompts = [prompt] * (2 if options.small else 16)
    batch = encode(model, prompts)
    print(f"{date.today()}, torch {torch.__version__}, {options.device}, {len(prompts)} prompts\n")
    print("| what | value |\n| --- | ---: |")

    def compare() -> object:
        return measure(model, candidate, prompts=prompts, layerwise=False, compiled=True)

    def both() -> None:
        bare(model, batch)
        bare(candidate, batch)

    compare()
    extra = beyond_weights(compare)
    weights = sum(p.numel() for p in model.module.parameters())
    operations = 2 * 2 * weights * int(batch["attention_mask"].sum())
    limit = product_limit(options.device, 1024 if options.small else 8192)
    for name, run in (("both bare forwards", both), ("output-level measure", compare)):
        share = operations / _timed(run, 3) / limit
        print(f"| share of the matrix-product limit, {name} | {100 * share:.0f} % |", flush=True)
    print(f"| peak memory beyond both models' weights, MB | {extra:.0f} |", flush=True)
    found = [*rows(model, 3, prompts, layers=False), layerwise(model, candidate, prompts[:1], 3)]
    for name, value, _ in found:
        print(f"| {name} | {value:.2f} × |", flush=True)


if __name__ == "__main__":
    main()
