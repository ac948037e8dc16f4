"""The kernels against plain float64, over the ranges that are promised, and their laws."""

import math
import shutil
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prunescope.probes import reduction
from prunescope.probes.kernels import FIGURES, Readout, compare_logits, compare_many, compare_states
from prunescope.probes.reduction import leaders

TOLERANCE, SMALLEST = 1e-4, 1e-8
SIGNED = {"third_cumulant", "validity", "parallel_p"}


def errors(z, y, T=1.0, compiled=False):
    """Worst relative error of each figure where its true value is at least SMALLEST.

    A sum of terms of both signs can be small beside its terms; such figures are held to the
    tolerance down to a thousandth of their natural scale, which no input of the ranges undercuts by
    chance often.
    """
    ours, truth = compare_logits(z, y, temperature=T, compiled=compiled), reference.figures(z, y, T)
    scales = {
        "third_cumulant": truth["var_p"] ** 1.5, "validity": truth["var_p"] ** 0.5 / T,
        "parallel_p": truth["orthogonal_p"],
    }  # fmt: skip
    worst = {}
    for name in FIGURES:
        true = truth[name]
        scale = true.abs()
        if name in SIGNED:
            scale = torch.maximum(scale, 0.003 * scales[name])
        counted = true.abs() >= SMALLEST
        if name == "validity":
            counted &= truth["var_p"] >= SMALLEST
        error = ((ours[name] - true).abs() / scale)[counted]
        worst[name] = float(error.max()) if len(error) else 0.0
    return worst


def assert_exact(z, y, T=1.0, compiled=False):
    bad = {n: e for n, e in errors(z, y, T, compiled).items() if not e <= TOLERANCE}
    assert not bad


def rows(vocab, spread, shift, seed, common=0.0, count=3):
    torch.manual_seed(seed)
    z = torch.randn(count, vocab).clamp(-3, 3) / 3 * spread
    d = (torch.randn(count, vocab) * shift).clamp(-30, 30)
    return z, z + d + common


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("vocab", [49_152, 151_936, 262_144])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_exact_over_the_promised_ranges(vocab, temperature, dtype):
    for spread in (1.0, 10.0, 100.0):
        for shift in (1e-4, 1e-2, 1.0, 30.0):
            z, y = rows(
                vocab, spread, shift, seed=vocab, common=20.0 if shift < 1 else 0.0, count=2
            )
            assert_exact(z.to(dtype), y.to(dtype), temperature)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "fused"])
def test_exact_where_only_the_largest_token_moved(compiled):
    """All others shift by the normaliser alone, far less than c itself: c needs more than float32."""
    for seed in (0, 3, 4):
        z, _ = rows(49_152, 0.05, 1.0, seed)
        z[:, 0] += 3.7
        y = z.clone()
        y[:, 0] += 0.3
        assert_exact(z, y, 2.23, compiled)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    vocab=st.integers(11, 3000), spread=st.floats(0.01, 100), shift=st.floats(1e-4, 10),
    temperature=st.floats(0.1, 5), common=st.floats(-30, 30), peak=st.floats(0, 60),
    seed=st.integers(0, 2**20),
)  # fmt: skip
def test_exact_on_random_rows(vocab, spread, shift, temperature, common, peak, seed):
    z, y = rows(vocab, spread, shift, seed, common)
    z[:, 0] += peak  # from flat to saturated
    y[:, 0] += peak
    assert_exact(z, y, temperature)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "fused"])
def test_exact_where_products_and_moments_all_but_cancel(compiled):
    """Rows that random draws found; float32 alone is off by 2e-3 and 1.3e-4."""
    across = rows(1030, 0.093, 0.07494, 49965, common=-8.5, count=8)
    assert_exact(*across, 0.97, compiled)
    skewless = rows(2352, 62.498326149461555, 9.257919807456457, 428)
    assert_exact(*skewless, 1.1188256299925035, compiled)
    saturated = rows(1090, 4.207, 1.11525, 143597, count=8)
    for x in saturated:
        x[:, 0] += 51.9
    assert_exact(*saturated, 4.73, compiled)
    z, d = rows(4096, 1.0, 1.0, 0)[0], torch.randn(3, 4096)
    d -= (d * z).sum(-1, keepdim=True) / (z * z).sum(-1, keepdim=True) * z * (1 - 1e-4)
    assert_exact(z, z + 0.1 * d, 1.0, compiled)


@pytest.mark.parametrize("peak", [20.0, 60.0, 100.0])
def test_saturated_rows_keep_their_small_shifts(peak):
    z, y = rows(5000, 1.0, 0.5, seed=3)
    z[:, 7], y[:, 7] = peak, peak + 0.25
    assert_exact(z, y)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_identical_rows_are_exactly_zero(temperature):
    z, _ = rows(4000, 10.0, 0.0, seed=0)
    for figures in (
        compare_logits(z, z.clone(), temperature=temperature),
        compare_states(z[:, :64], z[:, :64], torch.randn(500, 64), temperature=temperature),
    ):
        for name in set(FIGURES) - {"entropy", "entropy_candidate", "margin"}:
            expected = 1.0 if name in ("cosine_z", "cosine_p", "overlap") else 0.0
            assert bool((figures[name] == expected).all()), name


def test_a_common_shift_changes_no_probability():
    z, _ = rows(4000, 5.0, 0.0, seed=0)
    figures = compare_logits(
        z, z + 4.0
    )  # a power of two: z + 4 is z's neighbour in float32, rounded
    assert float(figures["kl"].max()) < 1e-12
    assert float(figures["tv"].max()) < 1e-6
    assert float(figures["flip"].max()) == 0


def test_ties_go_to_the_lower_token():
    z = torch.zeros(1, 5000)
    figures = compare_logits(z, z.clone())
    assert float(figures["flip"]) == 0
    assert float(figures["overlap"]) == 1
    assert float(figures["margin"]) == 0
    y = z.clone()
    y[0, 4999] = 1e-3
    assert float(compare_logits(z, y)["flip"]) == 1
    assert float(compare_logits(z, y)["overlap"]) == pytest.approx(0.9)


@settings(max_examples=40, deadline=None)
@given(
    vocab=st.integers(20, 4000),
    k=st.integers(1, 12),
    levels=st.integers(1, 50),
    seed=st.integers(0, 10**6),
)
def test_leaders_are_a_stable_sort(vocab, k, levels, seed):
    torch.manual_seed(seed)
    values = torch.randint(-levels, levels + 1, (3, vocab)).float()
    found, index = leaders(values, k)
    order = values.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(found, order.values[:, :k])
    assert torch.equal(index, order.indices[:, :k])


def test_tokens_masked_in_both_leave_the_vocabulary():
    z, y = rows(3000, 5.0, 0.5, seed=1)
    keep = torch.rand(3000) > 0.2
    expected = compare_logits(z[:, keep], y[:, keep])
    masked = compare_logits(z.masked_fill(~keep, -math.inf), y.masked_fill(~keep, -math.inf))
    for name in FIGURES:
        torch.testing.assert_close(masked[name], expected[name], rtol=1e-6, atol=1e-9)


def test_a_token_that_only_the_candidate_excludes_makes_kl_infinite():
    z, y = rows(3000, 1.0, 0.1, seed=1)
    y[:, 5] = -math.inf
    figures = compare_logits(z, y)
    assert bool(torch.isinf(figures["kl"]).all())
    p, q = z.double().softmax(-1), y.double().softmax(-1)
    torch.testing.assert_close(figures["tv"], 0.5 * (p - q).abs().sum(-1), rtol=1e-4, atol=0)
    assert bool(torch.isfinite(figures["kl_reverse"]).all())
    assert bool(torch.isnan(figures["cosine_z"]).all())


@settings(max_examples=40, deadline=None)
@given(
    shift=st.floats(1e-3, 20),
    spread=st.floats(0.1, 30),
    temperature=st.floats(0.2, 5),
    seed=st.integers(0, 10**6),
)
def test_laws(shift, spread, temperature, seed):
    z, y = rows(700, spread, shift, seed)
    there, back = (compare_logits(a, b, temperature=temperature) for a, b in ((z, y), (y, z)))
    small = 1e-9
    for name in ("js", "tv", "cosine_z", "cosine_p", "flip", "overlap", "var_uniform"):
        signed = 1e-6 if name == "cosine_z" else small  # a cosine can be small beside its terms
        torch.testing.assert_close(there[name], back[name], rtol=2e-4, atol=signed)
    torch.testing.assert_close(there["kl"], back["kl_reverse"], rtol=2e-4, atol=small)
    kl, tv, js = there["kl"], there["tv"], there["js"]
    assert bool((kl >= 0).all())
    assert bool((2 * tv**2 <= kl * (1 + 1e-4) + small).all()), "Pinsker"
    assert bool((js <= math.log(2)).all())
    assert bool((js <= tv * math.log(2) * (1 + 1e-4) + small).all())
    assert bool((tv <= 1).all())
    torch.testing.assert_close(there["entropy"], back["entropy_candidate"], rtol=1e-5, atol=small)


def test_temperature_only_rescales():
    z, y = rows(2000, 5.0, 0.5, seed=2)
    at_two = compare_logits(z, y, temperature=2.0)
    halved = compare_logits(z / 2, y / 2)
    for name in ("kl", "tv", "js", "cosine_p", "entropy"):
        torch.testing.assert_close(at_two[name], halved[name], rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(at_two["var_p"], 4 * halved["var_p"], rtol=1e-4, atol=0)


def test_the_theorems_hold_to_second_order():
    z, d = torch.randn(4, 3000) * 2, torch.randn(4, 3000)
    ratios = []
    for size in (0.2, 0.1, 0.05):
        figures = compare_logits(z, z + size * d)
        ratios.append((figures["kl_estimate"] / figures["kl"] - 1).abs().max())
        torch.testing.assert_close(
            figures["angular_z_corrected"], figures["angular_z"], rtol=0.1, atol=0
        )
    assert ratios[0] > 1.5 * ratios[1] > 1.5**2 * ratios[2], "the error shrinks with the shift"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("block", [None, 7])
def test_states_give_the_same_as_their_logits(bias, softcap, block):
    torch.manual_seed(0)
    h, other = torch.randn(20, 48), torch.randn(20, 48) * 0.1
    other = other + h
    norm = torch.nn.LayerNorm(48).requires_grad_(False)
    readout = Readout(torch.randn(600, 48), norm, torch.randn(600) if bias else None, softcap)

    def logits(x):
        z = norm(x) @ readout.weight.T + (readout.bias if bias else 0)
        return softcap * torch.tanh(z / softcap) if softcap else z

    found = compare_states(h, other, readout, block=block)
    expected = compare_logits(logits(h), logits(other))
    for name in FIGURES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("block", [None, 3])
def test_many_candidates_share_products_and_unmoved_rows_stay_exactly_zero(own, block):
    torch.manual_seed(0)
    h, weight = torch.randn(20, 48), torch.randn(600, 48)
    others = [h + 0.1 * torch.randn(20, 48) for _ in range(4)]
    others[1] = h.clone()
    others[2] = torch.where(torch.arange(20)[:, None] % 2 == 0, h, others[2])
    readout = Readout(weight)
    candidate = Readout(weight + 0.01 * torch.randn(600, 48)) if own else readout
    found = compare_many(h, others, readout, candidate, block=block)
    for other, figures in zip(others, found, strict=True):
        expected = compare_logits(h @ weight.T, other @ candidate.weight.T)
        for name in FIGURES:
            torch.testing.assert_close(figures[name], expected[name], rtol=2e-3, atol=2e-5)
    if not own:
        assert float(found[1]["kl"].max()) == 0
        assert float(found[2]["kl"][::2].max()) == float(found[2]["angular_z"][::2].max()) == 0
        assert float(found[2]["kl"][1::2].min()) > 0


def test_narrow_unembeddings_are_widened():
    torch.manual_seed(0)
    h, weight = torch.randn(5, 32), torch.randn(9000, 32).bfloat16()
    found = compare_states(h, h + 0.1, weight)
    expected = compare_logits(h @ weight.float().T, (h + 0.1) @ weight.float().T)
    torch.testing.assert_close(found["kl"], expected["kl"], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare_logits(torch.zeros(2, 30), torch.zeros(3, 30)), "same positions"),
        (lambda: compare_logits(torch.zeros(2, 5), torch.zeros(2, 5)), "more than top_k"),
        (lambda: compare_logits(torch.zeros(2, 30), torch.zeros(2, 30), temperature=0.0), "above 0"),
        (lambda: compare_logits(torch.full((2, 30), math.nan), torch.zeros(2, 30)), "NaN"),
        (lambda: compare_states(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(30, 4)), "states are"),
        (lambda: compare_states(torch.full((2, 4), math.nan), torch.zeros(2, 4), torch.zeros(30, 4)), "NaN"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_positions_give_no_figures():
    found = compare_logits(torch.zeros(0, 30), torch.zeros(0, 30))
    assert all(v.shape == (0,) for v in found.values())


HEADERS = Path(sysconfig.get_path("include")) / "Python.h"
COMPILER = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")) or not HEADERS.exists(),
    reason="torch.compile needs a C++ compiler and Python's headers",
)


@COMPILER
def test_fused_passes_are_as_exact_over_the_promised_ranges():
    for vocab in (49_152, 50_257):  # whole tiles, and a rest
        for temperature in (0.1, 1.0, 5.0):
            for spread in (1.0, 10.0, 100.0):
                for shift in (1e-4, 1e-2, 1.0, 30.0):
                    z, y = rows(vocab, spread, shift, vocab, 20.0 if shift < 1 else 0.0, count=2)
                    assert_exact(z, y, temperature, compiled=True)


@COMPILER
def test_fused_passes_keep_exact_zeros_and_saturated_rows():
    z, y = rows(49_152, 10.0, 0.5, seed=4)
    same = compare_logits(z, z.clone(), compiled=True)
    assert float(same["kl"].max()) == float(same["tv"].max()) == float(same["angular_z"].max()) == 0
    z[:, 7], y[:, 7] = 60.0, 60.25
    assert_exact(z, y, compiled=True)


def test_without_a_working_compiler_measuring_goes_on_unfused(monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(reduction, "_fused", broken)
    reduction.fusible.cache_clear()
    assert not reduction.fusible()
    assert "no compiler here" in caplog.text
    reduction.fusible.cache_clear()


@COMPILER
def test_a_working_compiler_is_found():
    assert reduction.fusible()


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_rows_on_several_threads_are_those_of_one(three_threads):
    z = torch.randn(40, 30_000)
    y = z + 0.3 * torch.randn_like(z)
    several = compare_logits(z, y)
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 3, "other threads keep their number"
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    one = compare_logits(z, y)
    assert all(torch.equal(one[name], several[name]) for name in one)
