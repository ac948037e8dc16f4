"""Causes: planted shares are found, intervals cover them, and sentences say no more."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr
from prunescope.analysis import cause_findings, causes, schema

PROMPTS, LAYERS = 40, 6


def patches(weights, extra=0.0, noise=0.05, seed=0):
    """A cell in which every changed sublayer does its weight's share of 2 nat, alone and missing.

    `extra` is done only by all of them together.
    """
    rng = np.random.default_rng(seed)
    scale = 2 * (1 + noise * rng.standard_normal(PROMPTS))
    weight = np.zeros((LAYERS, 2))
    for (layer, site), value in weights.items():
        weight[layer, schema.SITES.index(site)] = value
    alone = scale[:, None, None] * weight * (1 + noise * rng.standard_normal((PROMPTS, LAYERS, 2)))
    whole = alone.sum((1, 2)) + extra * scale
    swaps = np.stack([whole[:, None, None] - alone, alone], -1)
    rest = (
        whole[:, None]
        - alone.sum(2).cumsum(1)
        - extra * scale[:, None] * (np.arange(LAYERS) == LAYERS - 1)
    )
    depth = np.stack([rest, rest], -1)
    figures = {
        "kl": whole,
        "depth_kl": depth,
        "swap_kl": swaps,
        "part_kl": np.outer(whole, [0, 1, 0, 1, 0.3, 0.6]),
    }
    arrays = dict(figures)
    for name, values in figures.items():
        arrays[name.replace("kl", "flip")] = np.zeros_like(values)
        arrays[name.replace("kl", "log_p")] = -1 - values
    arrays["log_p_dense"] = np.full(PROMPTS, -1.0)
    arrays["part_share"] = np.tile([0.1, 0.9, 0.6, 0.4, 0.2, 0.8], (PROMPTS, 1))
    arrays["changed"] = (weight > 0).astype(int)
    coords = {
        "prompt": np.arange(PROMPTS), "layer": np.arange(LAYERS), "site": list(schema.SITES),
        "span": list(schema.SPANS), "swap": list(schema.SWAPS), "part": list(schema.PARTS),
    }  # fmt: skip
    return schema.dataset("patches", arrays, coords, {"answered": 1})


def test_planted_shares_are_found():
    data = patches({(1, "attn"): 0.1, (3, "mlp"): 0.6, (4, "attn"): 0.3})
    ranked = causes.ranking(data, "log_p")
    assert [(c.layer, c.site) for c in ranked] == [(3, "mlp"), (4, "attn"), (1, "attn")]
    for cause, share in zip(ranked, (0.6, 0.3, 0.1), strict=True):
        for found in (cause.noise, cause.denoise, cause.share):
            assert found.low - 0.01 <= share <= found.high + 0.01
    assert causes.ahead(data, "kl", ranked[0], ranked[1]).low > 0.2
    run = causes.culprits(data, "log_p")
    assert (run.first, run.last) == (3, 3)
    assert run.share.value == pytest.approx(0.6, abs=0.05)
    assert causes.culprits(data, "log_p", least=0.8).first == 3
    assert causes.culprits(data, "log_p", least=0.8).last == 4
    curve = causes.by_depth(data, "kl")["all"]
    assert [round(x.value, 1) for x in curve] == [0, 0.1, 0.1, 0.7, 1, 1]
    assert causes.interaction(data, "kl").value == pytest.approx(1)
    told = " ".join(f.claim for f in cause_findings.tell("cell", data, None, None))
    assert "MLP 3 is to blame most" in told
    assert "surely ahead" in told
    assert "not surely" not in told


def test_what_only_the_combination_does_is_no_sublayers_fault():
    data = patches({(1, "attn"): 0.2, (3, "mlp"): 0.2}, extra=0.6)
    assert causes.interaction(data, "kl").high < 0.5
    assert causes.culprits(data, "kl").first == LAYERS - 1
    told = " ".join(f.claim for f in cause_findings.tell("cell", data, None, None))
    assert "the rest comes only of their combination" in told
    assert "not surely ahead" in told


def test_no_damage_blames_nobody():
    data = patches({(1, "attn"): 0.5})
    for name in data.data_vars:
        if str(name).endswith("kl"):
            data[name] = data[name] * 0
        if str(name).endswith("log_p"):
            data[name] = data[name] * 0 - 1
    assert causes.measurable(data) == []
    found = cause_findings.tell("cell", data, None, None)
    assert [f.level for f in found] == ["note"]
    assert "no layer can be blamed" in found[0].claim
    assert cause_findings.tell("cell", patches({}), None, None) == []


def test_a_single_changed_sublayer_needs_no_ranking():
    found = cause_findings.tell("cell", patches({(2, "mlp"): 1.0}), None, None)
    assert not any("to blame most" in f.claim for f in found)
    assert "layer 2 of 6" in found[0].claim


def memory(curve):
    kl = np.outer(1 + 0.05 * np.random.default_rng(1).standard_normal(PROMPTS), curve)
    coords = {"prompt": np.arange(PROMPTS), "cut": np.arange(len(curve))}
    return schema.dataset("memory", {"kl": kl, "flip": kl * 0}, coords)


@pytest.mark.parametrize(
    ("curve", "words"),
    [
        ([1, 1, 0.4, 0.2], "the first 2 of 3 layers"),
        ([0.5, 0.5, 0.5, 0.5], "adds nothing"),
        ([0.2, 0.3, 0.4, 0.5], "its own memory suits"),
    ],
)
def test_memory_is_told(curve, words):
    (found,) = cause_findings.tell("cell", None, memory(curve), None)
    assert words in found.claim
    assert found.value == pytest.approx(curve[-1] / curve[0])


def repairs(rates):
    rng = np.random.default_rng(2)
    draw = rng.random(300)
    score = np.stack([draw < rate for rate in rates.values()], -1).astype(float)
    coords = {"item": np.arange(300), "arm": list(rates), "task": ("item", ["t"] * 300)}
    attrs = {
        "recipes": dict.fromkeys(rates, "mlp-drop@layers=2"),
        "places": {arm: ["mlp.1"] for arm in rates if arm not in ("none", "all")},
    }
    return schema.dataset("repairs", {"score": score}, coords, attrs)


@pytest.mark.parametrize(
    ("blamed", "words"),
    [(0.8, "more than as many"), (0.4, "not surely more"), (0.2, "less than as many")],
)
def test_repairs_are_told(blamed, words):
    data = repairs({"none": 0.1, "blamed": blamed, "random": 0.4, "cosine": 0.5, "all": 0.9})
    (found,) = cause_findings.tell("cell", None, None, data)
    assert words in found.claim
    assert found.value == pytest.approx((blamed - 0.1) / 0.8, abs=0.1)
    assert "`mlp-drop@layers=2`" in found.claim
    assert json.loads(data.attrs["places"])["blamed"] == ["mlp.1"]


def test_intervals_are_over_prompts():
    wide, narrow = (causes.ranking(patches({(3, "mlp"): 0.6, (1, "attn"): 0.4}, noise=n), "kl")[0]
                    for n in (0.5, 0.02))  # fmt: skip
    assert wide.share.high - wide.share.low > 3 * (narrow.share.high - narrow.share.low)
    assert isinstance(patches({(0, "attn"): 1.0}), xr.Dataset)
