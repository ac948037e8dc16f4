"""What is concluded from the histories: planted truths are found, and nothing where nothing is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from prunescope.analysis import decoding, decoding_findings, schema

PROMPTS, STEPS = 40, 32


def steps_of(
    kl=None, *, tokens=None, other=None, tv=0.1, flip=0.0, margin=1.0, entropy=1.0, entropy_candidate=1.0,
    var_p=0.5, attrs=None, texts=None,
):  # fmt: skip
    """A `/steps` group from `(prompt, step, 4)` KL and `(prompt, step)` token ids."""
    kl = np.full((PROMPTS, STEPS, 4), 0.1) if kl is None else kl
    shape = kl.shape[:2]
    tokens = np.broadcast_to(np.arange(shape[1]), shape) if tokens is None else tokens
    other = tokens if other is None else other
    token = np.stack([tokens, other], -1)

    def wide(x):
        return np.broadcast_to(
            np.asarray(x, np.float32).reshape(np.shape(x) + (1,) * (2 - np.ndim(x))), shape
        )

    def history(x):
        return np.array(np.broadcast_to(wide(x)[..., None], (*shape, 4)))

    words = (
        texts if texts is not None else np.vectorize(lambda i: f" w{i}", otypes=[object])(tokens)
    )
    arrays = {
        "kl": kl.astype(np.float32), "kl_reverse": kl.astype(np.float32), "js": kl / 4, "tv": history(tv),
        "var_p": history(var_p), "var_r": history(var_p), "flip": history(flip),
        "entropy_candidate": history(entropy_candidate), "margin": wide(margin), "entropy": wide(entropy),
        "cosine": np.ones((*kl.shape, 3)), "angular": np.zeros((*kl.shape, 3)), "token": token,
        "token_text": np.stack([words, words], -1), "no_stop": np.zeros((shape[0], 2)),
        "text": np.full((shape[0], 2), "t", dtype=object), "prompt_text": np.full(shape[0], "p", dtype=object),
    }  # fmt: skip
    coords = {
        "prompt": np.arange(shape[0]), "step": np.arange(shape[1]), "history": list(schema.HISTORIES),
        "space": list("hzp"), "model": list(schema.MODELS),
    }  # fmt: skip
    about = {"temperature": 1.0, "sampled": 0, "steps": shape[1]} | (attrs or {})
    return schema.dataset("steps", arrays, coords, about)


def test_factors_are_ratios_of_sums():
    kl = np.empty((PROMPTS, STEPS, 4))
    kl[..., 0], kl[..., 1], kl[..., 2], kl[..., 3] = 0.1, 0.3, 1.2, 0.9
    found = decoding.factors(steps_of(kl))
    assert found["cache"].value == pytest.approx(3, rel=1e-5)
    assert found["tokens"].value == pytest.approx(4, rel=1e-5)
    assert found["compounding"].value == pytest.approx(12, rel=1e-5)
    by_step = decoding.factors_by_step(steps_of(kl))
    np.testing.assert_allclose(by_step.value.sel(factor="compounding"), 12, rtol=1e-5)


def test_curves_are_means_over_those_still_writing_and_sequence_kl_is_their_running_sum():
    rng = np.random.default_rng(0)
    kl = rng.gamma(2, 0.1, (PROMPTS, STEPS, 4))
    kl[:10, 20:] = np.nan
    steps = steps_of(kl)
    found = decoding.curves(steps)
    np.testing.assert_allclose(found.value, np.nanmean(kl, 0), rtol=1e-5)
    assert found.n.values[25].tolist() == [30] * 4
    assert (found.low <= found.value).all()
    assert (found.value <= found.high).all()
    total = decoding.sequence_kl(steps)
    assert float(total.value[-1]) == pytest.approx(np.nansum(kl[..., 1]) / PROMPTS, rel=1e-5)


@pytest.mark.parametrize("law", ["constant", "linear", "geometric", "saturating"])
def test_a_planted_law_of_growth_is_found(law):
    t = np.arange(STEPS)
    curve = {
        "constant": 0.3 + 0 * t, "linear": 0.1 + 0.05 * t, "geometric": 0.05 * np.exp(0.12 * t),
        "saturating": 1 - 0.9 * np.exp(-t / 4),
    }[law]  # fmt: skip
    rng = np.random.default_rng(1)
    kl = np.zeros((PROMPTS, STEPS, 4))
    kl[..., 1] = curve * rng.gamma(200, 1 / 200, (PROMPTS, STEPS))
    found = decoding.growth(steps_of(kl), "forced")
    assert found.best == law or (law == "constant" and found.gain.value < decoding_findings.CLEAR)
    if law != "constant":
        assert found.gain.low > 0.5
    told = decoding_findings._growth("x", steps_of(kl))
    assert (f"follows a {law} law" in told.claim) == (law != "constant")


def test_too_few_prompts_tell_no_law():
    assert decoding.growth(steps_of(np.full((4, STEPS, 4), 0.1)), "forced") is None


def parted_at(times, steps=STEPS):
    """Token rows that part at the given steps; -1: never."""
    tokens = np.tile(np.arange(steps), (len(times), 1))
    other = tokens.copy()
    for row, t in zip(other, times, strict=True):
        if t >= 0:
            row[t:] += 1000
    return tokens, other


def test_survival_is_kaplan_meier_by_hand():
    tokens, other = parted_at([0, 2, 2, -1, 3], steps=6)
    tokens[3, 1:] = other[3, 1:] = -1  # this text ends after one token: censored at 1
    steps = steps_of(np.full((5, 6, 4), 0.1), tokens=tokens, other=other)
    time, parts = decoding.divergence(steps)
    assert time.tolist() == [0, 2, 2, 1, 3]
    assert parts.tolist() == [True, True, True, False, True]
    found = decoding.survival(steps)
    # 5 at risk: one parts at token 1; the ended one leaves; 3 at risk at 3: two part; the last at 4
    np.testing.assert_allclose(found.observed, [1, 0.8, 0.8, 0.8 / 3, 0, 0, 0], atol=1e-12)
    assert found.median == 3
    assert found.parted == 4


def test_the_predicted_band_and_half_life_are_products():
    steps = steps_of(tv=0.1)
    found = decoding.survival(steps)
    np.testing.assert_allclose(found.upper, 0.9 ** np.arange(STEPS + 1), rtol=1e-5)
    np.testing.assert_allclose(found.lower, (0.9 / 1.1) ** np.arange(STEPS + 1), rtol=1e-5)
    assert found.half_life.value == 7  # 0.9^7 < 1/2 < 0.9^6
    assert math.isinf(decoding.survival(steps_of(tv=1e-4)).half_life.value)


def test_calibrated_partings_lie_in_the_band_and_others_do_not():
    rng = np.random.default_rng(2)
    count = 400
    tv = np.clip(rng.uniform(0, 0.25, (count, STEPS)), 0, 1)
    kl = np.full((count, STEPS, 4), 0.1)

    def bins(chance):
        events = rng.random(tv.shape) > chance
        times = np.where(events.any(1), events.argmax(1), -1)
        tokens, other = parted_at(times)
        return decoding.calibration(steps_of(kl, tokens=tokens, other=other, tv=tv))

    for found in bins(1 - tv / 1.05 / (1 - tv / 2)):  # between the two ends of the band
        assert found.observed.low <= found.upper
        assert found.observed.high >= found.lower
    assert any(b.observed.high < b.lower for b in bins(1 - 3 * tv))


def test_parting_makes_free_jump_and_not_forced():
    times = [5, 8, 10, 3, -1, 7, 6, 9, 12, 4]
    tokens, other = parted_at(times)
    kl = np.full((len(times), STEPS, 4), 0.05)
    for row, t in zip(kl, times, strict=True):
        if t >= 0:
            row[t + 1 :, 2] = 6.0
            row[t + 1 :, 3] = 5.5
    steps = steps_of(kl, tokens=tokens, other=other)
    found = decoding.jump(steps)
    assert found.prompts == 9
    assert found.free_before.value == pytest.approx(0.05, rel=1e-5)
    assert found.free_after.value == pytest.approx(6, rel=1e-5)
    assert found.forced_after.value == pytest.approx(0.05, rel=1e-5)
    claim = decoding_findings._jump("x", steps).claim
    assert "free KL jumps" in claim
    assert "forced KL stays" in claim
    assert "The other text explains most of the jump" in claim


def test_flips_are_told_by_margin_and_kind_of_token():
    rng = np.random.default_rng(3)
    margin = rng.uniform(0, 4, (PROMPTS, STEPS))
    flip = (margin < 1).astype(float)
    words = np.array([" cat", "7", ",", " the", "ing"], dtype=object)[
        rng.integers(0, 5, (PROMPTS, STEPS))
    ]
    steps = steps_of(flip=flip, margin=margin, var_p=0.5, texts=words)
    found = {(f.by, f.group): f for f in decoding.flips(steps)}
    quarters = [f.rate.value for (by, _), f in found.items() if by == "margin"]
    assert quarters[0] > 0.9
    assert max(quarters[2:]) == 0
    kinds = {group for by, group in found if by == "token"}
    assert kinds == {
        "first token of a word",
        "digits",
        "punctuation",
        "function word",
        "inside a word",
    }
    small = decoding.explained(steps)  # logit shift √(2 · 0.5) = 1: every flip, nothing else
    assert small.flips.value == 1
    assert small.others.value == 0
    assert decoding.explained(steps_of(flip=0.0)) is None


@pytest.mark.parametrize(
    ("text", "kind"),
    [(" 12", "digits"), (" the", "function word"), ("the", "inside a word"), (" dog", "first token of a word"),
     ("Dog", "first token of a word"), ("...", "punctuation"), ("\n", "white space")],
)  # fmt: skip
def test_kinds_of_tokens(text, kind):
    assert decoding.token_class(text) == kind


def test_loops_repetition_and_collapsed_entropy():
    assert decoding.loop(np.array([9, 8, 7, 1, 2, 1, 2, 1, 2])) == (2.0, 3.0)
    assert decoding.loop(np.array([5, 5, 5, 5])) == (1.0, 0.0)
    assert math.isnan(decoding.loop(np.arange(20))[0])
    assert math.isnan(decoding.loop(np.array([1, 2, 1, 2, 1, 2, 3]))[0])  # it got out of it
    assert decoding.repetition(np.array([1, 2, 3, 4] * 3)) == pytest.approx(1 - 4 / 9)
    assert decoding.repetition(np.array([1, 2, 3, 4])) == 0
    tokens, other = parted_at([4] * PROMPTS)
    other[:, 10:] = np.array([1, 2])[np.arange(STEPS - 10) % 2]
    entropy = np.ones((PROMPTS, STEPS))
    entropy[:, 15:] = 0.01
    steps = steps_of(tokens=tokens, other=other, entropy_candidate=entropy)
    found = decoding.degeneration(steps, "candidate")
    assert (found.loop == 2).all()
    assert (found.onset == 10).all()
    assert (found.collapse == 15).all()
    assert np.isnan(decoding.degeneration(steps, "dense").loop).all()
    claim = decoding_findings._loops("x", steps).claim
    assert "40 of 40 texts of x end in a loop, beginning 6 steps after the texts part" in claim


def test_nothing_is_told_of_a_candidate_that_changes_nothing():
    assert decoding_findings.tell("x", steps_of(np.zeros((PROMPTS, STEPS, 4)), tv=0.0), None) == []


def test_unmeasured_histories_are_not_told_as_numbers():
    kl = np.full((PROMPTS, STEPS, 4), 0.1)
    kl[..., 0] = np.nan
    told = decoding_findings._compounding("x", steps_of(kl))
    assert "was not measured" in told.claim
    assert "nan" not in told.claim
