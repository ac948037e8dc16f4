"""Every recipe on every architecture, against references of a few lines."""

import architectures
import numpy as np
import pytest
import torch
from prunescope.probes import prune, rank
from prunescope.probes.anatomy import dropped, linears, matrices_of
from prunescope.probes.compress import compress, cost, sparsity
from prunescope.probes.kernels import compare_logits
from prunescope.probes.layerwise import sequences, walk
from prunescope.probes.load import load
from prunescope.probes.measure import measure
from prunescope.probes.model import encode
from prunescope.probes.recipe import Recipe, RecipeError
from prunescope.probes.save import SaveError, save

RECIPES = [
    "attn-drop@1", "mlp-drop@2", "block-drop@1", "attn-drop@layers=0", "block-drop@2-angular",
    "joint-drop@2", "attn-drop@1-kl", "mlp-drop@1-var-r", "joint-drop@2-kl-iterative",
    "magnitude@0.5", "magnitude@2:4", "random@0.5", "wanda@0.5", "wanda@4:8", "sparsegpt@0.5",
    "sparsegpt@2:4", "rtn@int8", "rtn@int4-g16", "gptq@int4-g16", "gptq@int3", "awq@int4-g16",
    "attn-drop@1+rtn@int4-g16", "block-drop@1+wanda@0.5", "neurons-reverse@0.25",
    "neurons-selective@0.5,target=plurals,control=capitals/kinds,metric=standardised,scope=global",
    "mlp-drop@1+neurons-salience@0.3", "neurons-random@0.5,multiple=16+rtn@int4-g16",
]  # fmt: skip
TEXTS = ["The cat sat on the mat.", "The dog ran to the red house", "1 2 3 4 5 birds sang!"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_on_every_architecture(tiny, recipe):
    batch = encode(tiny, TEXTS)
    before = tiny.module(**batch).logits
    candidate = compress(tiny, Recipe.parse(recipe), calibration=TEXTS)
    assert torch.equal(tiny.module(**batch).logits, before), "the dense model is untouched"
    after = candidate.module(**batch).logits
    assert not torch.equal(after, before)
    assert bool(torch.isfinite(after).all())
    assert candidate.recipe == Recipe.parse(recipe)
    for role in (tiny.anatomy.embed, tiny.anatomy.unembed):
        assert candidate.module.get_submodule(role).weight is tiny.module.get_submodule(role).weight


def test_magnitude_zeroes_the_smallest(llama):
    candidate = compress(llama, Recipe.parse("magnitude@0.3"))
    for name, module in linears(llama.anatomy, llama.module).items():
        weight, pruned = module.weight, candidate.module.get_submodule(name).weight
        count = int(weight.numel() * 0.3)
        threshold = weight.abs().flatten().sort().values[count - 1]
        assert torch.equal(pruned, torch.where(weight.abs() <= threshold, 0.0, weight))
    assert candidate.achieved["sparsity"] == pytest.approx(sparsity(candidate))
    assert candidate.achieved["sparsity"] == pytest.approx(0.3, abs=1e-3)


def brute_force_rtn(matrix, bits, group):
    """Round to nearest one weight at a time, in float64."""
    out = np.zeros(matrix.shape)
    for i, row in enumerate(matrix.double().numpy()):
        for start in range(0, len(row), group or len(row)):
            part = row[start : start + (group or len(row))]
            low, high = min(part.min(), 0), max(part.max(), 0)
            scale = (high - low) / (2**bits - 1)
            zero = np.round(-low / scale)
            codes = np.clip(np.round(part / scale) + zero, 0, 2**bits - 1)
            out[i, start : start + len(part)] = (codes - zero) * scale
    return torch.tensor(out)


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 16), (3, 32), (2, 8)])
def test_rounding_equals_brute_force(bits, group):
    torch.manual_seed(bits)
    matrix = torch.randn(20, 64)
    found = prune.round_to_nearest(matrix, bits, group)
    expected = brute_force_rtn(matrix, bits, group)
    step = (matrix.amax() - matrix.amin()) / (2**bits - 1)
    close = (found.double() - expected).abs() < 1e-5
    assert close.double().mean() > 0.999, "but for ties that float32 rounds the other way"
    assert float((found - matrix).abs().max()) <= float(step)
    assert bool((prune.round_to_nearest(matrix * 0, bits, group) == 0).all())
    torch.testing.assert_close(
        prune.round_to_nearest(found, bits, group), found, rtol=1e-4, atol=1e-5
    )


def test_importance_is_one_minus_the_cosine(tiny):
    from test_trace import hooked

    found = rank.importance(tiny, TEXTS)
    sums = {name: np.zeros(3) for name in found}
    count = 0
    for text in TEXTS:
        seen = hooked(tiny, encode(tiny, [text]))
        count += seen["layer.0.input"].shape[1]
        for i in range(3):
            x, out = seen[f"layer.{i}.input"], seen[f"layer.{i}.output"]
            mid = x + seen[f"layer.{i}.attn"]
            read = x if tiny.anatomy.parallel else mid
            after = read + seen[f"layer.{i}.mlp"].view_as(x)
            for name, a, b in (("attn", x, mid), ("mlp", read, after), ("block", x, out)):
                sums[name][i] += float(
                    torch.cosine_similarity(a.double(), b.double(), dim=-1).sum()
                )
    for name in found:
        np.testing.assert_allclose(found[name], 1 - sums[name] / count, rtol=1e-3, atol=1e-6)


def test_drops_take_the_least_important_first(llama):
    order = np.argsort(rank.importance(llama, TEXTS)["mlp"])
    candidate = compress(llama, Recipe.parse("mlp-drop@2"), calibration=TEXTS)
    assert candidate.achieved["dropped"] == {"mlp": order[:2].tolist()}
    blocks = candidate.anatomy.blocks(candidate.module)
    assert [dropped(candidate.anatomy, b, "mlp") for b in blocks] == [
        i in order[:2] for i in range(3)
    ]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("attn-drop@3", "1 to 2 can be dropped"),
        ("joint-drop@6", "has 6 sublayers; 1 to 5 can be dropped"),
        ("mlp-drop@layers=3", "has layers 0 to 2"),
        ("rtn@int4-g24", "which 24 does not divide"),
        ("attn-drop@layers=1+attn-drop@layers=1", "changed no weight"),
        ("attn-drop@2+attn-drop@2", "only 1 are left"),
        ("magnitude@0.3+magnitude@0.3", "changed no weight"),
    ],
)
def test_amounts_that_do_not_fit_are_errors(llama, recipe, message):
    with pytest.raises(RecipeError, match=message):
        compress(llama, Recipe.parse(recipe), calibration=TEXTS)


def test_cost_counts_what_is_there(llama):
    dense = cost(llama)
    assert dense["parameters"] == sum(p.numel() for p in llama.module.parameters())
    assert dense["bytes"] == dense["bytes_packed"] == 4 * dense["parameters"]
    block = llama.anatomy.blocks(llama.module)[1]
    part = sum(
        p.numel() for p in (*block.mlp.parameters(), *block.post_attention_layernorm.parameters())
    )
    assert (
        cost(compress(llama, Recipe.parse("mlp-drop@layers=1")))["parameters"]
        == dense["parameters"] - part
    )
    packed = cost(compress(llama, Recipe.parse("rtn@int4-g16")))
    inside = sum(m.weight.numel() for m in linears(llama.anatomy, llama.module).values())
    assert packed["bytes"] == dense["bytes"]
    assert packed["bytes_packed"] == dense["bytes"] - inside * (4 - (4 + 32 / 16) / 8)
    zeroed = cost(compress(llama, Recipe.parse("magnitude@0.5")))
    assert zeroed["parameters"] == dense["parameters"]
    assert zeroed["nonzero"] == pytest.approx(dense["nonzero"] - inside / 2, abs=200)


@pytest.mark.parametrize(
    "recipe",
    [
        "magnitude@0.5",
        "rtn@int4-g16",
        "block-drop@1",
        "attn-drop@1",
        "mlp-drop@1",
        "block-drop@1+attn-drop@1",
        "joint-drop@2",
        "wanda@2:4",
        "sparsegpt@0.5",
        "random@0.5",
        "gptq@int4-g16",
        "awq@int4-g16",
    ],
)
def test_a_saved_candidate_loads_back(tiny, recipe, tmp_path):
    candidate = compress(tiny, Recipe.parse(recipe), calibration=TEXTS)
    save(candidate, tmp_path / "candidate")
    back = load(tmp_path / "candidate")
    batch = encode(candidate, TEXTS, side="left")
    torch.testing.assert_close(
        back.module(**batch).logits, candidate.module(**batch).logits, rtol=1e-5, atol=1e-5
    )
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = {k: batch[k] for k in ("input_ids", "attention_mask")}
    assert torch.equal(
        back.module.generate(**ids, **options), candidate.module.generate(**ids, **options)
    )
    assert (back.recipe, back.achieved, back.layer_count) == (
        candidate.recipe,
        candidate.achieved,
        3,
    )
    assert float(measure(candidate, back, prompts=TEXTS)["output"].kl.max()) < 1e-9
    with pytest.raises(SaveError, match="not empty"):
        save(candidate, tmp_path / "candidate")


@pytest.mark.parametrize(
    ("recipe", "plain"), [("block-drop@1", True), ("magnitude@0.5", True), ("attn-drop@1", False)]
)
def test_transformers_loads_what_it_can_and_refuses_the_rest(llama, recipe, plain, tmp_path):
    from transformers import AutoModelForCausalLM

    candidate = compress(llama, Recipe.parse(recipe), calibration=TEXTS)
    folder = save(candidate, tmp_path / "candidate")
    batch = encode(candidate, TEXTS)
    if plain:
        again = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(
            again(**batch).logits, candidate.module(**batch).logits, rtol=1e-5, atol=1e-5
        )
        assert "from_pretrained(folder)" in (folder / "README.md").read_text()
    else:
        with pytest.raises(ValueError, match="prunescope-candidate"):
            AutoModelForCausalLM.from_pretrained(folder)
        assert "prunescope.probes.load(folder)" in (folder / "README.md").read_text()


def test_conv1d_is_read_the_right_way_round():
    model = architectures.build("gpt2")
    candidate = compress(model, Recipe.parse("rtn@int4-g16"))
    name = "transformer.h.0.mlp.c_fc"
    weight = model.module.get_submodule(name).weight  # (input, output) in GPT-2
    assert torch.equal(
        candidate.module.get_submodule(name).weight, prune.round_to_nearest(weight.T, 4, 16).T
    )


# --- agreement with brute force ------------------------------------------------------------------


def activations(inputs=24, tokens=300, seed=0):
    """Correlated activations, some channels large, one never used."""
    torch.manual_seed(seed)
    x = torch.randn(tokens, inputs) @ torch.randn(inputs, inputs) * torch.linspace(0.1, 3, inputs)
    x[:, 5] = 0
    return x


def moments_of(x, products=True):
    moments = prune.Moments.of(x.shape[1], x.device, products)
    for part in x.split(77):
        moments.add(part)
    return moments


def patterns(width):
    return [prune.Share(0.5), prune.Share(0.3), prune.Share(0.5, 2, 4), prune.Share(0.5, 4, 8)]


@pytest.mark.parametrize("share", patterns(24), ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_masks_equal_brute_force(share, tied):
    torch.manual_seed(1)
    x, matrix = activations(), torch.randn(10, 24)
    if tied:
        matrix, x = matrix.sign() * (1 + (matrix > 1)), x.sign()
    norms = x.double().norm(dim=0)
    for method, by_row in (("magnitude", False), ("wanda", True)):
        score = matrix.double().abs() * (norms if by_row else 1)
        gone = np.zeros((10, 24), bool)
        if share.of:
            for i in range(10):
                for start in range(0, 24, share.of):
                    part = score[i, start : start + share.of].numpy().round(9)
                    gone[i, start + np.argsort(part, kind="stable")[: share.of - share.keep]] = True
        elif by_row:
            for i in range(10):
                order = np.argsort(score[i].numpy().round(9), kind="stable")
                gone[i, order[: int(24 * share.share)]] = True
        else:
            order = np.argsort(score.flatten().numpy(), kind="stable")
            gone.reshape(-1)[order[: int(240 * share.share)]] = True
        found = (
            prune.wanda(matrix, moments_of(x, products=False), share)
            if method == "wanda" else prune.magnitude(matrix, share)
        )  # fmt: skip
        expected = matrix.masked_fill(torch.tensor(gone), 0)
        assert torch.equal(found, expected), method


def surgeon(matrix, x, settle, every):
    """Optimal brain surgery one column at a time in float64, by its definition.

    The columns that are left are the least-squares answer to the error of those that are settled:
    their update is the inverse Hessian of the columns from here on.
    """
    w, x = matrix.double().clone(), x.double()
    hessian = x.T @ x / len(x)
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    w[:, dead] = 0
    hessian += prune.DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))
    for i in range(w.shape[1]):
        inverse = torch.linalg.inv(hessian[i:, i:])
        if i % every == 0:
            ahead = [
                torch.linalg.inv(hessian[j:, j:])[0, 0]
                for j in range(i, min(i + every, w.shape[1]))
            ]
            change = settle(w[:, i : i + every], torch.stack(ahead).sqrt())
        settled = change(i % every, w[:, i])
        error = (w[:, i] - settled) / inverse[0, 0]
        w[:, i:] -= error[:, None] * inverse[0]
        w[:, i] = settled
    return w


@pytest.mark.parametrize(
    "share", [prune.Share(0.5), prune.Share(0.5, 2, 4), prune.Share(0.5, 4, 8)], ids=str
)
def test_sparsegpt_equals_brute_force(share):
    torch.manual_seed(2)
    x, matrix = activations(), torch.randn(10, 24)

    def settle(weights, diagonal):
        score = (weights / diagonal) ** 2
        gone = share.mask(score.float(), by_row=False)
        return lambda column, values: values.masked_fill(gone[:, column], 0)

    expected = surgeon(matrix, x, settle, share.of or 128)
    found = prune.sparsegpt(matrix, moments_of(x), share)
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "group"), [(4, 8), (3, 24), (4, 0)])
def test_gptq_equals_brute_force(bits, group):
    torch.manual_seed(3)
    x, matrix = activations(), torch.randn(10, 24)
    order = (x**2).sum(0).argsort(descending=True)  # those that read most come first
    grids = [prune.grid(part.double(), bits) for part in matrix.split(group or 24, 1)]
    scale, zero = (torch.cat([g[k] for g in grids], 1) for k in (0, 1))
    of = (torch.arange(24) // (group or 24))[order]

    def settle(*_):
        def change(column, values):
            at = scale[:, of[column]], zero[:, of[column]]
            return ((((values / at[0]).round() + at[1]).clamp(0, 2**bits - 1)) - at[1]) * at[0]

        return change

    expected = surgeon(matrix[:, order], x[:, order], settle, 128)[:, order.argsort()]
    found = prune.gptq(matrix, moments_of(x), bits, group)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def outputs_error(found, matrix, x):
    return float(((found - matrix) @ x.T).double().square().mean())


def test_what_is_made_up_for_errs_less():
    torch.manual_seed(4)
    x, matrix = activations(), torch.randn(40, 24)
    moments, half = moments_of(x), prune.Share(0.5)
    lot = prune.at_random(matrix, half, torch.Generator().manual_seed(0))
    found = [
        prune.sparsegpt(matrix, moments, half),
        prune.wanda(matrix, moments, half),
        prune.magnitude(matrix, half),
        lot,
    ]
    errors = [outputs_error(f, matrix, x) for f in found]
    assert errors == sorted(errors), "SparseGPT, Wanda, magnitude, random"
    rounded = prune.round_to_nearest(matrix, 3, 8)
    made_up = prune.gptq(matrix, moments, 3, 8)
    assert outputs_error(made_up, matrix, x) < outputs_error(rounded, matrix, x)
    x[:, 3] *= 50  # one channel that matters more than the others
    scaled = prune.awq([matrix], moments_of(x), 3, 8)[0]
    assert outputs_error(scaled, matrix, x) < 0.8 * outputs_error(rounded, matrix, x)


def test_awq_takes_the_best_of_its_scales():
    torch.manual_seed(5)
    x, matrix = activations(), torch.randn(10, 24)
    errors = []
    size = x.double().abs().mean(0).clamp(min=1e-4)
    for step in range(20):
        scale = size ** (step / 20)
        scale = (scale / (scale.max() * scale.min()).sqrt()).clamp(min=1e-4)
        rounded = brute_force_rtn(matrix.double() * scale, 4, 8) / scale
        errors.append(outputs_error(rounded, matrix.double(), x.double()))
    found = prune.awq([matrix], moments_of(x), 4, 8)[0]
    assert outputs_error(found, matrix, x) == pytest.approx(min(errors), rel=1e-2)


@pytest.mark.parametrize("method", ["wanda@0.5", "sparsegpt@0.5", "gptq@int4-g16", "awq@int4-g16"])
def test_layers_are_calibrated_on_the_compressed_prefix(tiny, method):
    """By hand: run the candidate as compressed so far, and compress the next layer on what it reads."""
    found = compress(tiny, Recipe.parse(method), calibration=TEXTS)
    by_hand = tiny.clone()
    ids = [i for text in TEXTS for i in tiny.tokenizer(text)["input_ids"]]
    batch = {"input_ids": torch.tensor([ids])}
    blocks = zip(
        by_hand.anatomy.blocks(by_hand.module), found.anatomy.blocks(found.module), strict=True
    )
    for block, done in blocks:
        for name, module in block.named_modules():
            if module not in matrices_of(block):
                continue
            seen = []
            handle = module.register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0])
            )
            by_hand.module(**batch)
            handle.remove()
            moments = moments_of(seen[0].flatten(0, -2))
            matrix = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T
            other = done.get_submodule(name).weight
            other = other if isinstance(module, torch.nn.Linear) else other.T
            if method == "wanda@0.5":
                expected = prune.wanda(matrix, moments, prune.Share(0.5))
            elif method == "sparsegpt@0.5":
                expected = prune.sparsegpt(matrix, moments, prune.Share(0.5))
            elif method == "gptq@int4-g16":
                expected = prune.gptq(matrix, moments, 4, 16)
            else:
                error = outputs_error(other, matrix, seen[0].flatten(0, -2))
                plain = prune.round_to_nearest(matrix, 4, 16)
                assert error <= 1.5 * outputs_error(plain, matrix, seen[0].flatten(0, -2))
                continue
            torch.testing.assert_close(other, expected, rtol=1e-3, atol=1e-4)
        block.load_state_dict(done.state_dict(), assign=True)


def test_damage_is_that_of_dropping_one_sublayer(tiny):
    found = rank.importance(tiny, TEXTS, "kl")
    tokens = sequences(tiny, TEXTS, rank.TOKENS)
    texts = [tiny.tokenizer.decode(row) for row in tokens]
    for kind in ("attn", "mlp", "block"):
        for layer in range(3):
            candidate = compress(tiny, Recipe.parse(f"{kind}-drop@layers={layer}"))
            dense, other = (m.module(input_ids=tokens).logits for m in (tiny, candidate))
            kl = compare_logits(dense, other)["kl"].mean()
            assert found[kind][layer] == pytest.approx(float(kl), rel=1e-3), (kind, layer, texts)


def test_angular_drops_the_run_whose_ends_are_closest(llama):
    distances = rank.angular(llama, TEXTS, 2)
    assert distances.shape == (2,)
    candidate = compress(llama, Recipe.parse("block-drop@2-angular"), calibration=TEXTS)
    start = int(distances.argmin())
    assert candidate.achieved["dropped"]["attn"] == [start, start + 1]


def test_iterative_ranks_anew(llama):
    once = compress(llama, Recipe.parse("joint-drop@3-kl"), calibration=TEXTS)
    anew = compress(llama, Recipe.parse("joint-drop@3-kl-iterative"), calibration=TEXTS)
    for candidate in (once, anew):
        assert sum(map(len, candidate.achieved["dropped"].values())) == 3
    first = compress(llama, Recipe.parse("joint-drop@1-kl"), calibration=TEXTS)
    ((kind, [layer]),) = first.achieved["dropped"].items()
    order = rank.order(first, ("attn", "mlp"), TEXTS, "kl")
    second = next(place for place in order if place != (kind, layer))
    assert second[1] in anew.achieved["dropped"][second[0]]


def test_random_is_seeded(llama):
    one, again, other = (compress(llama, Recipe.parse("random@0.5"), seed=s) for s in (1, 1, 2))
    weights = [linears(m.anatomy, m.module).popitem()[1].weight for m in (one, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert one.achieved["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_calibration_keeps_no_sequence_in_memory(tiny):
    tokens = sequences(tiny, TEXTS * 3, length=16)
    width = tokens.shape[1]
    assert 8 <= width <= 16
    held = []
    for layer in walk(tiny, tokens):
        layer.watch({matrices_of(layer.block)[0]: lambda x: held.append(len(x))})
    assert held == [width] * len(tokens) * 3, "one sequence at a time"


def test_a_seed_of_the_recipe_goes_before_that_of_the_run(llama):
    def zeros(recipe, seed):
        model = compress(llama, Recipe.parse(recipe), seed=seed).module
        return {n: (p == 0) for n, p in model.named_parameters()}

    first, same, other = (
        zeros("random@0.5,seed=1", 5),
        zeros("random@0.5", 1),
        zeros("random@0.5,seed=1", 1),
    )
    assert all(torch.equal(first[n], same[n]) and torch.equal(first[n], other[n]) for n in first)


def test_damage_is_swept_once_for_a_model_and_kept(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNESCOPE_CACHE", str(tmp_path))
    named = llama.clone()
    swept = []
    plain = rank.damage
    monkeypatch.setattr(rank, "damage", lambda *a: swept.append(1) or plain(*a))
    texts = ["a few words", "and some more of them"]
    first = rank.importance(named, texts, "kl")
    again, other = rank.importance(named, texts, "kl"), rank.importance(named, texts, "var-r")
    assert len(swept) == 1
    for kind in rank.KINDS:
        np.testing.assert_array_equal(first[kind], again[kind])
        assert not np.array_equal(first[kind], other[kind])
    rank.importance(named, texts[:1], "kl")
    rank.importance(compress(named, Recipe.parse("mlp-drop@1")), texts, "kl")
    assert len(swept) == 3
