"""Cuts of neurons across cells: what was planted is found, and nothing more."""

import json

import numpy as np
import pytest
import xarray as xr
from prunescope.analysis import diagnose, neuron_findings, neurons, schema
from prunescope.reports import render
from prunescope.reports.figures import draw

RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3)
TASKS = ("mine", "one", "two", "three")


def scores_of(kept, n=60, seed=0):
    """Items that the dense model has right; each task keeps the share that is given."""
    rng = np.random.default_rng(seed)
    task = np.repeat(TASKS, n)
    score = np.ones((len(task), 2))
    for name in TASKS:
        place = np.flatnonzero(task == name)
        score[rng.permutation(place)[round(kept.get(name, 1.0) * n) :], 1] = 0
    coords = {
        "item": np.arange(len(task)), "model": ["dense", "candidate"], "task": ("item", task),
        "format": ("item", np.full(len(task), "generation")), "chance": ("item", np.zeros(len(task))),
        "twin": ("item", np.full(len(task), "")), "prompt_text": ("item", task),
    }  # fmt: skip
    none = np.zeros_like(score)
    values = {"score": score, "no_answer": none, "no_stop": none, "repetition": none}
    return schema.dataset("scores", {**values, "text": none.astype(str)}, coords)


def cell(order, asked, kept, seed=1):
    told = {"order": order, "asked": asked, "cut": asked, "target": "mine", "seed": seed}
    groups = {"scores": scores_of(kept, seed=seed)}
    name = f"neurons-{order}@{asked},target=mine,seed={seed}"
    return name, schema.tree(groups, {"recipe": name, "achieved": {"neurons": told}})


def study(specific, rival, seeds=(1, 2, 3)):
    """Reverse keeps `specific`(ratio) of the target and all else, its rival the same of every task."""
    cells = []
    for seed in seeds:
        for asked in RATIOS:
            cells.append(cell("reverse", asked, specific(asked), seed))
            cells.append(cell("salience-reverse", asked, rival(asked), seed))
    return dict(cells)


def every(share):
    return dict.fromkeys(TASKS, share)


def test_specific_harm_is_found_and_told_from_importance():
    cells = study(lambda r: {"mine": 1 - 2 * r}, lambda r: every(1 - r))
    rows = neurons.contrasts(neurons.cuts(cells))
    assert [(r.order, r.rival, r.asked, r.seeds) for r in rows] == [
        ("reverse", "salience-reverse", a, 3) for a in RATIOS
    ]
    assert rows[-1].difference.value == pytest.approx(0.6, abs=0.02)
    assert rows[-1].difference.low > 0.4
    assert rows[-1].p_value < 0.01
    claims = [f.claim for f in neuron_findings.across(cells)]
    assert any("reverse, 30% cut, over 3 seeds" in c and "harms mine more" in c for c in claims)
    assert any(
        "salience-reverse" in c and "alike, so nothing here is specific" in c for c in claims
    )
    assert sum("told apart" in c and "not told apart" not in c for c in claims) >= 3


def test_selective_cuts_are_held_against_lot_and_importance():
    """Sparing the target more than lot does says little where importance alone does as well."""
    kept = {"selective": {"mine": 0.9}, "random": every(0.4), "salience": {"mine": 0.9}}
    cells = dict(
        cell(order, 0.2, every(0.4) | share, seed) for order, share in kept.items() for seed in (1, 2, 3)
    )  # fmt: skip
    by_lot, by_importance = neurons.contrasts(neurons.cuts(cells))
    assert (by_lot.rival, by_importance.rival) == ("random", "salience")
    assert by_lot.difference.value == pytest.approx(-0.5, abs=0.05)
    assert by_lot.p_value < 0.01
    assert by_importance.p_value > 0.05
    claims = [f.claim for f in neuron_findings.across(cells)]
    assert any(
        "neurons-selective spares mine more than neurons-random does, by 0.5" in c for c in claims
    )


def test_a_curve_that_does_not_fall_has_no_step():
    cells = study(lambda _: every(1.0), lambda r: {"mine": 1 - 3 * r})
    claims = [
        f.claim
        for f in neuron_findings.across(cells)
        if "stays above" in f.claim or "below" in f.claim
    ]
    assert [("the step at" in c) for c in claims if "neurons-reverse" in c] == [False]
    assert [("the step at" in c) for c in claims if "neurons-salience-reverse" in c] == [True]


def test_harm_that_is_alike_is_called_alike():
    cells = study(lambda r: every(1 - r), lambda r: every(1 - r))
    rows = neurons.contrasts(neurons.cuts(cells))
    assert all(r.p_value > 0.05 for r in rows)
    claims = [f.claim for f in neuron_findings.across(cells)]
    assert not any("harms mine more" in c or "harms mine less" in c for c in claims)
    assert sum("not told apart" in c for c in claims) == len(RATIOS)


def test_where_everything_is_destroyed_nothing_is_told_apart():
    cells = study(lambda _: every(0.05) | {"mine": 0.0}, lambda _: every(0.0))
    claims = [f.claim for f in neuron_findings.across(cells)]
    assert sum("it destroys both" in c for c in claims) == 2


def test_fewer_seeds_than_needed_are_said():
    cells = study(lambda r: {"mine": 1 - 2 * r}, lambda r: every(1 - r), seeds=(1,))
    claims = [f.claim for f in neuron_findings.across(cells)]
    assert all("where 3 are needed" in c for c in claims if "seed" in c)
    assert any("over 1 seed," in c for c in claims)


def test_the_harmless_ratio_and_the_step_are_found():
    cells = study(lambda r: {"mine": 1.0 if r < 0.12 else 0.2}, lambda _: every(1.0))
    table = neurons.grouped(neurons.cuts(cells))
    found = neurons.threshold("mine", "reverse", table["mine", "reverse"])
    assert found.harmless == 0.1
    assert found.change.value == pytest.approx(0.125)
    assert found.change.low <= 0.125 <= found.change.high
    assert found.drop == pytest.approx(-0.8, abs=0.02)
    whole = neurons.threshold("mine", "salience-reverse", table["mine", "salience-reverse"])
    assert whole.harmless == RATIOS[-1]


def test_a_target_that_the_dense_model_cannot_do_says_nothing():
    cells = study(lambda _: {"mine": 0.5}, lambda _: every(0.5))
    for tree in cells.values():
        data = tree["scores"].to_dataset()
        data["score"][np.flatnonzero(data.task.values == "mine")] = 0
        tree["scores"] = data
    assert neuron_findings.across(cells) == []


def test_cells_without_cuts_say_nothing_here():
    tree = schema.tree({"scores": scores_of({})}, {"recipe": "x", "achieved": {"bits": 4}})
    assert neurons.cuts({"x": tree}) == []
    assert neuron_findings.across({"x": tree}) == []


def neurons_of(layers=4, size=20):
    rng = np.random.default_rng(3)
    values = rng.normal(0, 0.1, (layers, size, 4))
    values[2, :, 0] += 1.0
    coords = {
        "layer": np.arange(layers), "neuron": np.arange(size), "texts": list(schema.TEXTS),
        "metric": ["normalised", "difference", "ratio", "standardised"],
    }  # fmt: skip
    return schema.dataset("neurons", {"selectivity": values}, coords)


def test_the_top_tenth_is_where_it_was_planted():
    share = neurons.share_by_layer(neurons_of(), "normalised")
    assert share.tolist() == [0, 0, 0.4, 0]


def test_the_report_draws_and_tells_them(tmp_path):
    cells = study(lambda r: {"mine": 1 - 2 * r}, lambda r: every(1 - r), seeds=(1,))
    name = next(iter(cells))
    cells[name]["neurons"] = xr.DataTree(neurons_of())
    names = {p.name for p in draw(cells)}
    assert "neurons" in names
    assert any(n.startswith("neurons-neurons-reverse") for n in names)
    page = render(cells, tmp_path / "report.html").read_text("utf-8")
    assert "Neurons cut out, target task and others" in page
    assert "harms mine more than the rest" in page
    assert page.count("harms mine more than the rest") == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["findings"]) == len(diagnose(cells))


def cost_of(share, speeds):
    """A candidate with a share of the dense model's parameters, so many times as fast, round by round."""
    rates = np.stack([np.full(len(speeds), 100.0), 100.0 * np.array(speeds)], -1)
    values = {
        **dict.fromkeys(("parameters", "nonzero", "bytes", "bytes_packed"), np.array([1e6, share * 1e6])),
        "peak_bytes": np.array([5e6, (0.2 + 0.8 * share) * 5e6]), "seconds": np.array([1.0]),
        "prefill_rate": rates, "decode_rate": rates[::-1] * [1.0, 0.9],
    }  # fmt: skip
    return schema.dataset("cost", values, {"model": ["dense", "candidate"], "work": ["speed"]})


def test_what_cuts_save_is_told_along_the_ratios():
    cells = study(lambda r: {"mine": 1 - r}, lambda r: every(1 - r))
    for tree in cells.values():
        cut = json.loads(tree.attrs["achieved"])["neurons"]["cut"]
        tree["cost"] = cost_of(1 - cut, [1 + cut, 1 + 2 * cut, 1 + 3 * cut])
    rows = neurons.savings(cells)
    assert [r.share for r in rows] == pytest.approx(RATIOS)
    assert {r.cells for r in rows} == {6}, "two orders, three seeds"
    for row in rows:
        assert row.parameters == pytest.approx(1 - row.share)
        assert row.memory == pytest.approx(1 - 0.8 * row.share)
        assert tuple(row.reads) == pytest.approx([1 + k * row.share for k in (2, 1, 3)])
        assert row.writes.value == pytest.approx(0.9 * (1 + 2 * row.share))
    told = [f.claim for f in neuron_findings.across(cells) if f.evidence == "/cost, neurons"]
    wanted = (
        "30% of the neurons cut: 70% of the parameters and 76% of the memory at its peak are left; it reads ×1.60 "
        "(1.30 to 1.90) and writes ×1.44 (1.17 to 1.71) as fast as the dense model, measured in turn over 6 cells "
        "(in brackets the range of the rounds)."
    )
    assert told == [wanted]
    assert any(p.name == "savings" for p in draw(cells))
    del cells[next(iter(cells))]["cost"]["peak_bytes"]
    assert len(neurons.savings(cells)) == len(RATIOS), "what was not measured is left out"
