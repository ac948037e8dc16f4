"""What training brought back: planted gains are found, and the control tells them from the training's."""

import numpy as np
import pytest
from prunescope.analysis import diagnose, recovery, schema
from prunescope.reports import render
from test_analysis import make_cell
from test_neuron_findings import TASKS, scores_of


def cell(name, kept, weights, shift=1.0, **recovered):
    made = make_cell(name, kl_scale=shift)
    made["scores"] = scores_of(dict.fromkeys(TASKS, kept), seed=5)
    achieved = {"recovered": {"method": "lora", "trained": 40, **recovered}} if recovered else {}
    groups = {n: c.to_dataset() for n, c in made.children.items()}
    told = {"recipe": name, "weights": "dense", "candidate_weights": weights, "achieved": achieved}
    return schema.tree(groups, told)


def study(before=0.3, after=0.8):
    return {
        "cut": cell("cut", before, "w1"),
        "cut-back": cell("cut-back", after, "w2", shift=0.5, **{"from": "w1"}),
        "tuned": cell("tuned", 1.0, "w3", **{"from": "dense"}),
        "lone": cell("lone", 0.5, "w4", **{"from": "elsewhere"}),
    }


def test_pairs_are_found_by_their_weights():
    found = {p.after: p for p in recovery.pairs(study())}
    assert {n: p.before for n, p in found.items()} == {
        "cut-back": "cut",
        "tuned": None,
        "lone": None,
    }
    assert recovery.is_control(found["tuned"], study())
    assert not recovery.is_control(found["cut-back"], study())


def test_what_came_back_is_found_with_its_interval():
    told = recovery.tell(study())
    (scores,) = [f for f in told if f.where == "cut-back" and f.evidence == "/scores, recovery"]
    assert scores.value == pytest.approx(0.5, abs=0.02)
    assert scores.interval[0] > 0.35
    assert "brings back written answers: retention 0.30 before, 0.80 after" in scores.claim
    (spaces,) = [f for f in told if f.evidence == "/output, recovery"]
    assert spaces.value < 1
    assert set(spaces.detail["ratios"]) == {"1 − cos h", "1 − cos z", "1 − cos p", "KL"}
    assert any(f.evidence == "/steps, recovery" for f in told)


def test_the_control_is_told_apart():
    (control,) = [f for f in recovery.tell(study()) if f.where == "tuned"]
    assert control.claim.startswith("Control: the dense model itself")
    assert control.value == pytest.approx(0)
    assert not [f for f in recovery.tell(study()) if f.where == "lone"]


@pytest.mark.parametrize(("after", "words"), [(0.3, "does not measurably change"), (0.05, "costs")])
def test_no_more_is_claimed_than_came_back(after, words):
    told = recovery.tell(study(after=after))
    (scores,) = [f for f in told if f.where == "cut-back" and f.evidence == "/scores, recovery"]
    assert f" {words} written answers" in scores.claim


def test_mean_retention_is_over_tasks_that_say_something():
    before, after = scores_of({"one": 0.5}), scores_of({"one": 0.9})
    before["score"][np.flatnonzero(before.task.values == "two"), 0] = 0
    was, now, change, n = recovery.regained(before, after, "generation")
    assert (was, now, n) == (pytest.approx(2.5 / 3), pytest.approx(2.9 / 3), 180)
    assert change.value == pytest.approx(now - was)
    assert recovery.regained(before, after, "choice") is None


def test_the_report_tells_it(tmp_path):
    cells = study()
    page = render(cells, tmp_path / "report.html").read_text("utf-8")
    assert page.count("What training brought back") == 1
    for finding in diagnose(cells):
        if finding.evidence.endswith("recovery"):
            assert page.count(finding.claim.split(":", maxsplit=1)[0]) >= 1
