"""Ratios of measuring to the forward passes that it needs anyway, side by side in one run.

    python -m tests.benchmarks.kernels [--small]

Each row: median over the rounds of (ours / floor), both taken in turn within a round.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
import transformers as tf
from prunescope.probes import Model, Recipe, compress, load, trace
from prunescope.probes.anatomy import anatomy_of
from prunescope.probes.kernels import compare_logits, compare_states
from prunescope.probes.measure import measure
from prunescope.probes.model import encode


def ratio(
    ours: Callable[[], object], floor: Callable[[], object], rounds: int
) -> tuple[float, float]:
    """Median of ours/floor and median seconds of the floor."""
    ours()
    floor()
    ratios, floors = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        floor()
        middle = time.perf_counter()
        ours()
        end = time.perf_counter()
        ratios.append((end - middle) / (middle - start))
        floors.append(middle - start)
    return statistics.median(ratios), statistics.median(floors)


def random_model(dense: Model) -> Model:
    """d = 896, vocabulary 151,936, random weights, SmolLM2's tokenizer (its ids are all valid)."""
    torch.manual_seed(0)
    config = tf.Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=151_936, tie_word_embeddings=True,
    )  # fmt: skip
    module = (
        tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        .eval()
        .requires_grad_(False)
    )
    return Model(module, dense.tokenizer, anatomy_of(config), "random d=896", "random")


def bare(model: Model, batch: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        model.module(**batch, use_cache=False)


def rows(model: Model, rounds: int, prompts: list[str]) -> list[tuple[str, float, float]]:
    recipe = Recipe.parse("rtn@int4-g64")
    candidate = compress(model, recipe)
    batch = encode(model, prompts)
    sites = ("attn", "mlp")

    def both() -> None:
        bare(model, batch)
        bare(candidate, batch)

    def traced() -> None:
        trace.roles(model.module, model.anatomy, batch)

    name = model.name
    result = [
        (f"output-level measure, {name}", *ratio(lambda: measure(model, candidate, prompts=prompts, layerwise=False), both, rounds)),
        (f"trace of every layer and site, {name}", *ratio(traced, lambda: bare(model, batch), rounds)),
    ]  # fmt: skip
    few = prompts[:1]
    small = encode(model, few)
    weight = model.readout().weight
    width = weight.shape[1]
    states = torch.randn(int(small["attention_mask"].sum()), width)
    products = (1 + 2) * len(sites) * model.layer_count  # dense, local, propagated at each site

    def floor() -> None:
        for _ in range(3):  # dense, candidate, and the candidate's sublayers on dense inputs
            trace.final_states(model.module, model.anatomy, small)
        for _ in range(products):
            torch.mm(states, weight.T)

    def layerwise() -> None:
        measure(model, candidate, prompts=few)

    result.append((f"layerwise measure, {name}", *ratio(layerwise, floor, max(3, rounds // 2))))
    return result


def memory(positions: int, vocabulary: int) -> float:
    """Extra peak memory of `compare_states`, MB."""
    h, weight = torch.randn(positions, 896), torch.randn(vocabulary, 896)
    other = h + 0.1 * torch.randn_like(h)
    compare_states(h[:2], other[:2], weight)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    compare_states(h, other, weight)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def per_element(vocabulary: int) -> float:
    z = torch.randn(32, vocabulary) * 3
    y = z + 0.3 * torch.randn_like(z)
    compare_logits(z, y)
    start = time.perf_counter()
    for _ in range(3):
        compare_logits(z, y)
    return (time.perf_counter() - start) / 3 / z.numel() * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="SmolLM2 only, three rounds")
    small = parser.parse_args().small
    positions = 256 if small else 1024
    print(
        f"compare_states, {positions} × 151,936: {memory(positions, 151_936):.0f} MB more at the peak"
    )
    dense = load("smollm2")
    text = "The quick brown fox jumps over the lazy dog and runs into the forest. " * 20
    prompt = dense.tokenizer.decode(dense.tokenizer(text)["input_ids"][:128])
    models = [dense] if small else [dense, random_model(dense)]
    print(f"\n{date.today()}, torch {torch.__version__}, transformers {tf.__version__}\n")
    print("| what | threads | ratio | floor, s |\n| --- | ---: | ---: | ---: |")
    for count in (1, 2):
        torch.set_num_threads(count)
        for vocabulary in (49_152, 151_936):
            print(
                f"| compare_logits, ns per element, vocabulary {vocabulary:,} | {count} | {per_element(vocabulary):.0f} | |"
            )
        for model in models:
            for name, value, seconds in rows(model, 3 if small else 5, [prompt] * 8):
                print(f"| {name} | {count} | {value:.2f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
