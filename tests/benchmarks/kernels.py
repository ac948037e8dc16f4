"""Ratios of measuring to the forward passes that it needs anyway, side by side in one run.

    python -m tests.benchmarks.kernels [--small] [--threads 1,2] [--paper FILE] [--plot FILE]

Each row: median over the rounds of (ours / floor), both taken in turn within a round. `--paper` is
the released `transition_metrics_logging.py` of arXiv 2603.24652, kept outside this repository.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from prunescope.probes import Model, Recipe, compress, load, trace
from prunescope.probes.anatomy import anatomy_of
from prunescope.probes.kernels import compare_logits, compare_states
from prunescope.probes.measure import measure
from prunescope.probes.model import encode


def ratios(
    floor: Callable[[], object], rounds: int, **ours: Callable[[], object]
) -> tuple[dict[str, float], float]:
    """Median of ours/floor for each, taken in turn within each round; median seconds of the floor."""
    for run in (floor, *ours.values()):
        run()
    found: dict[str, list[float]] = {name: [] for name in ours}
    floors: list[float] = []
    for _ in range(rounds):
        floors.append(_once(floor))
        for name, run in ours.items():
            found[name].append(_once(run) / floors[-1])
    return {name: statistics.median(v) for name, v in found.items()}, statistics.median(floors)


def ratio(
    ours: Callable[[], object], floor: Callable[[], object], rounds: int
) -> tuple[float, float]:
    """Median of ours/floor and median seconds of the floor."""
    found, base = ratios(floor, rounds, ours=ours)
    return found["ours"], base


def _once(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def random_model(
    dense: Model, *, layers: int = 24, width: int = 896, vocabulary: int = 151_936
) -> Model:
    """Random weights in the shape of Qwen2-0.5B; SmolLM2's tokenizer (its ids are all valid)."""
    torch.manual_seed(0)
    config = tf.Qwen2Config(
        hidden_size=width, intermediate_size=width * 38 // 7 // 64 * 64, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=2, vocab_size=vocabulary,
        tie_word_embeddings=True,
    )  # fmt: skip
    module = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    module = module.eval().requires_grad_(False)
    return Model(module, dense.tokenizer, anatomy_of(config), f"random d={width}", "random")


def bare(model: Model, batch: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        model.module(**batch, use_cache=False)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


Row = tuple[str, float, float]


def rows(model: Model, rounds: int, prompts: list[str], layers: bool) -> Iterator[Row]:
    candidate = compress(model, Recipe.parse("rtn@int4-g64"))
    batch, name = encode(model, prompts), model.name

    def both() -> None:
        bare(model, batch)
        bare(candidate, batch)

    def output(compiled: bool) -> Callable[[], object]:
        return lambda: measure(
            model, candidate, prompts=prompts, layerwise=False, compiled=compiled
        )

    def traced() -> None:
        trace.roles(model.module, model.anatomy, batch, lambda *_: None)

    found, base = ratios(both, rounds, plain=output(False), fused=output(True))
    for word, value in found.items():
        yield f"output-level measure, {word}, {name}", value, base
    if layers:
        floor = functools.partial(bare, model, batch)
        yield f"trace of every layer and site, {name}", *ratio(traced, floor, rounds)
        yield layerwise(model, candidate, prompts[:1], rounds)


def layerwise(model: Model, candidate: Model, prompts: list[str], rounds: int) -> Row:
    """All layers, sites and effects against what nothing can avoid: forwards and logits."""
    batch, weight = encode(model, prompts), model.readout().weight
    states = torch.randn(int(batch["attention_mask"].sum()), weight.shape[1]).to(weight)
    products = (1 + 2) * 2 * model.layer_count  # dense, local, propagated at each of two sites

    def floor() -> None:
        for _ in range(3):  # dense, candidate, and the candidate's sublayers on dense inputs
            trace.final_states(model.module, model.anatomy, batch)
        for _ in range(products):
            torch.mm(states, weight.T)

    def ours() -> None:
        measure(model, candidate, prompts=prompts, compiled=True)

    return f"layerwise measure, fused, {model.name}", *ratio(ours, floor, rounds)


def against_paper(file: Path, width: int, vocabulary: int, rounds: int) -> Iterator[Row]:
    """The released metric function, position by position as its scripts call it, and batched."""
    released = _import(file).compute_and_log_transition_metrics
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    h = torch.randn(128, 1, width)
    other = h + 0.1 * torch.randn_like(h)

    def theirs(x: torch.Tensor, y: torch.Tensor) -> None:
        with torch.no_grad():
            released(x, y, head, 0, 0, log_path="", write_fn=lambda *_: None)

    def single() -> None:
        for x, y in zip(h.split(1), other.split(1), strict=True):
            theirs(x, y)

    def ours() -> None:
        compare_states(h[:, 0], other[:, 0], head.weight, compiled=True)

    name = f"compare_states, vocabulary {vocabulary:,}, against the paper's function"
    yield f"{name} as called (times faster)", *_faster(ours, single, rounds)
    yield f"{name} batched (times faster)", *_faster(ours, lambda: theirs(h, other), rounds)


def _faster(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int
) -> tuple[float, float]:
    value, seconds = ratio(ours, theirs, rounds)
    return 1 / value, seconds


def _import(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location("released", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scaling(target: Path) -> None:
    """Seconds of `compare_states` and layerwise `measure` as one size grows, drawn and fitted."""
    from matplotlib.figure import Figure

    def states(positions: int, vocabulary: int) -> float:
        h, weight = torch.randn(positions, 128), torch.randn(vocabulary, 128)
        other = h + 0.1 * torch.randn_like(h)
        return seconds(lambda: compare_states(h, other, weight))

    def depth(layers: int) -> float:
        model = random_model(load("smollm2"), layers=layers, width=128, vocabulary=49_152)
        other = compress(model, Recipe.parse("rtn@int4-g64"))
        return seconds(lambda: measure(model, other, prompts=["one two three four five"]))

    axes_of = {
        "positions": ([64, 128, 256, 512, 1024], lambda n: states(n, 16_384)),
        "vocabulary": ([16_384, 32_768, 65_536, 131_072, 262_144], lambda n: states(64, n)),
        "layers": ([2, 4, 8, 16, 32], depth),
    }
    figure = Figure(figsize=(9, 2.8))
    for axis, (name, (sizes, run)) in zip(figure.subplots(1, 3), axes_of.items(), strict=True):
        times = [run(size) for size in sizes]
        slope, start = statistics.linear_regression(sizes, times)
        fit = statistics.correlation(sizes, times) ** 2
        axis.plot(sizes, times, "o", color="#2f5d8a")
        axis.plot(sizes, [start + slope * n for n in sizes], lw=1, color="#999999")
        axis.set(xlabel=name, ylabel="s", title=f"linear, R² = {fit:.3f}", xlim=0, ylim=0)
        print(f"| seconds linear in {name}, R² | {torch.get_num_threads()} | {fit:.3f} | |")
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


def seconds(run: Callable[[], object], rounds: int = 5) -> float:
    run()
    return statistics.median(_once(run) for _ in range(rounds))


def memory(positions: int, vocabulary: int) -> float:
    """Extra peak memory of `compare_states`, MB."""
    h, weight = torch.randn(positions, 896), torch.randn(vocabulary, 896)
    other = h + 0.1 * torch.randn_like(h)
    compare_states(h[:2], other[:2], weight)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    compare_states(h, other, weight)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def per_element(vocabulary: int, compiled: bool) -> float:
    z = torch.randn(64, vocabulary) * 3
    y = z + 0.3 * torch.randn_like(z)
    return seconds(lambda: compare_logits(z, y, compiled=compiled)) / z.numel() * 1e9


def table(threads: int, small: bool, paper: Path | None, dense: Model, prompt: str) -> None:
    """All rows of one number of threads."""
    torch.set_num_threads(threads)
    rounds = 3 if small else 5
    for vocabulary in (49_152, 151_936):
        for compiled, word in ((False, "plain"), (True, "fused")):
            name = f"compare_logits, {word}, ns per element, vocabulary {vocabulary:,}"
            print(f"| {name} | {threads} | {per_element(vocabulary, compiled):.1f} | |", flush=True)
    if paper is not None:
        for width, vocabulary in ((576, 49_152), (896, 151_936)):
            _show(against_paper(paper, width, vocabulary, rounds), threads)
    _show(rows(dense, rounds, [prompt] * 8, layers=True), threads)
    if not small:
        _show(rows(random_model(dense), rounds, [prompt] * 8, layers=False), threads)


def _show(found: Iterable[Row], threads: int) -> None:
    for name, value, floor in found:
        print(f"| {name} | {threads} | {value:.2f} | {floor:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="SmolLM2 only, three rounds")
    parser.add_argument("--threads", default="1,2", help="numbers of threads (default 1,2)")
    parser.add_argument("--paper", type=Path, help="the paper's transition_metrics_logging.py")
    parser.add_argument("--plot", type=Path, help="draw cost against size into this file, and end")
    options = parser.parse_args()
    print(f"{date.today()}, torch {torch.__version__}, transformers {tf.__version__}\n")
    print("| what | threads | ratio | floor, s |\n| --- | ---: | ---: | ---: |")
    if options.plot is not None:
        scaling(options.plot)
        return
    positions = 256 if options.small else 1024
    extra = memory(positions, 151_936)
    print(f"| compare_states, {positions} × 151,936: MB more at the peak | | {extra:.0f} | |")
    dense = load("smollm2")
    text = "The quick brown fox jumps over the lazy dog and runs into the forest. " * 20
    prompt = dense.tokenizer.decode(dense.tokenizer(text)["input_ids"][:128])
    for threads in map(int, options.threads.split(",")):
        table(threads, options.small, options.paper, dense, prompt)


if __name__ == "__main__":
    main()
