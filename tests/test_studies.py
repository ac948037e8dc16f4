"""Studies: what they find in cells whose truth is known, and nothing where there is nothing."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import synthetic
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from prunescope.analysis import (
    advice,
    correlation,
    forecast,
    matched,
    open_study,
    rankings,
    schema,
    study_findings,
)  # fmt: skip
from prunescope.analysis.summary import described, figures, stored, summarise
from prunescope.probes import Recipe, compress, load, measure
from prunescope.reports import study_figures, studyfile
from prunescope.reports.cli import main
from prunescope.reports.engines import Here
from prunescope.reports.progress import Progress
from prunescope.reports.request import Request, default_prompts
from prunescope.reports.study_page import render_study
from prunescope.reports.sweep import sweep
from scipy import stats

GENERATION = "retention_generation"


# --- correlation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "drives", ["output_kl", "step_angular_h", "local_var_p", "subspace_disagree"]
)
def test_the_only_figure_that_drives_collapse_is_recovered(drives):
    ranked = correlation.links(synthetic.study(drives=drives), GENERATION)
    assert ranked[0].figure == drives
    assert [link.figure for link in ranked if link.p_value < 0.05] == [drives]
    assert ranked[0].spearman.high < -0.8
    assert ranked[0].given_amount.value < -0.8
    assert ranked[0].given_method.value < -0.8


@pytest.mark.parametrize("seed", range(5))
def test_a_study_in_which_nothing_drives_it_finds_nothing(seed):
    ranked = correlation.links(synthetic.study(drives=None, seed=seed), GENERATION)
    assert len(ranked) == len(figures())
    assert min(link.p_value for link in ranked) > 0.05
    (claim,) = [f for f in study_findings.tell(synthetic.study(drives=None, seed=seed))
                if f.evidence.endswith("correlation") and f.detail["outcome"] == GENERATION]  # fmt: skip
    assert claim.claim.startswith("None of")


def test_correlations_are_those_of_scipy():
    data = synthetic.study(cells=40, seed=3)
    link = next(k for k in correlation.links(data, GENERATION) if k.figure == "step_kl")
    assert link.spearman.value == pytest.approx(
        stats.spearmanr(data.step_kl, data[GENERATION]).statistic
    )
    assert link.pearson.value == pytest.approx(
        stats.pearsonr(np.log(data.step_kl), data[GENERATION]).statistic
    )
    x, y, a = (stats.rankdata(data[n]) for n in ("step_kl", GENERATION, "compression"))
    rest = [v - np.polyval(np.polyfit(a, v, 1), a) for v in (x, y)]
    assert link.given_amount.value == pytest.approx(stats.pearsonr(*rest).statistic)
    for m in np.unique(data.method):
        x[data.method == m] -= x[data.method == m].mean()
        y[data.method == m] -= y[data.method == m].mean()
    assert link.given_method.value == pytest.approx(stats.pearsonr(x, y).statistic)


def test_more_compression_is_worse_is_no_explanation():
    data = synthetic.study(cells=120, drives=None)
    rng = np.random.default_rng(1)
    amount = data["compression"].values
    data["output_kl"] = ("cell", np.exp(3 * amount + 0.3 * rng.normal(size=120)))
    data[GENERATION] = ("cell", 1 - amount + 0.05 * rng.normal(size=120))
    link = next(k for k in correlation.links(data, GENERATION) if k.figure == "output_kl")
    assert link.spearman.value < -0.85
    assert link.given_amount.low < 0 < link.given_amount.high


def test_a_difference_between_models_is_no_effect_of_the_figure():
    data = synthetic.study(cells=80, drives=None, models=2)
    second = data.model.values == "model 1"
    for name, shift in (("output_kl", 20.0), (GENERATION, -0.5)):
        data[name] = ("cell", data[name].values + shift * second)
    link = next(k for k in correlation.links(data, GENERATION) if k.figure == "output_kl")
    assert link.spearman.value < -0.4
    assert link.p_value > 0.05


def test_bootstrap_samples_are_as_large_as_the_data_and_draw_models_first():
    (block,) = correlation.weights(np.repeat(["a", "b", "c"], [5, 7, 9]), draws=200)
    assert set((block[:, :5].sum(1) / 5).tolist()) <= {0.0, 1.0, 2.0, 3.0}
    (one,) = correlation.weights(np.repeat(["a"], 11), draws=50)
    assert (one.sum(1) == 11).all()


@given(st.integers(0, 10**6))
def test_the_interval_holds_the_value_and_ranks_ignore_monotone_changes(seed):
    data = synthetic.study(cells=24, seed=seed, noise=0.3)
    first, second = data[["output_kl", GENERATION]], data[["output_kl", GENERATION]].copy()
    second["output_kl"] = first.output_kl**3
    links = [
        correlation.links(d.assign(compression=data["compression"]), GENERATION)
        for d in (first, second)
    ]
    assert links[0][0].spearman == links[1][0].spearman
    assert links[0][0].spearman.low <= links[0][0].spearman.value <= links[0][0].spearman.high


def test_contrasts_say_which_of_two_follows_more_closely():
    data = synthetic.study(drives="output_angular_p")
    found = correlation.contrast(data, GENERATION, "output_angular_p", "output_angular_h")
    assert found is not None
    assert found.difference.low > 0.3
    same = correlation.contrast(data, GENERATION, "output_angular_p", "output_angular_p")
    assert same is not None
    assert tuple(same.difference) == (0, 0, 0)
    assert correlation.contrast(data, GENERATION, "output_angular_p", "nothing") is None


def test_too_few_cells_say_nothing():
    data = synthetic.study(cells=5)
    assert correlation.links(data, GENERATION) == []
    assert matched.shapes(data) == []
    assert [f for f in study_findings.tell(data) if "correlation" in f.evidence] == []


# --- forecast ------------------------------------------------------------------------------------


def test_the_cause_foretells_what_bytes_do_not():
    tried = {t.model: t for t in forecast.trials(synthetic.study(), GENERATION)}
    assert tried["kl"].error.value < 0.08 < tried["amount"].error.value
    assert tried["kl"].gain.low > 0
    assert tried["logistic"].gain.low > 0
    assert tried["kl"].accuracy > 0.7
    assert tried["amount"].gain == (0, 0, 0)


def test_with_several_models_they_are_left_out_too():
    tried = forecast.trials(synthetic.study(models=3), GENERATION)
    assert {t.left_out for t in tried} == {"method", "model"}


def test_where_nothing_foretells_it_no_gain_is_claimed():
    tried = {t.model: t for t in forecast.trials(synthetic.study(drives=None), GENERATION)}
    assert not tried["kl"].gain.low > 0
    claims = [
        f.claim
        for f in study_findings.tell(synthetic.study(drives=None))
        if "forecast" in f.evidence
    ]
    assert all("not measurably better" in c for c in claims)


def test_held_out_cells_are_not_learned_from():
    data = synthetic.study()
    mine = data.method.values == "rtn"
    before = {t.model: t.predicted[mine] for t in forecast.trials(data, GENERATION)}
    data[GENERATION] = ("cell", np.where(mine, 0.123, data[GENERATION].values))
    after = {t.model: t.predicted[mine] for t in forecast.trials(data, GENERATION)}
    for model in forecast.MODELS:
        np.testing.assert_allclose(before[model], after[model])


def test_intervals_hold_as_many_new_cells_as_they_say():
    data, new = synthetic.study(), synthetic.study(cells=300, seed=9)
    held = []
    for i in range(300):
        row = {n: float(new[n][i]) for n in forecast.FEATURES}
        told = forecast.forecast(data, row, GENERATION)
        if told.covered:
            held.append(
                told.retention.low <= np.clip(new[GENERATION][i], 0, 1) <= told.retention.high
            )
    assert len(held) > 200
    assert np.mean(held) > 0.8


def test_a_candidate_outside_of_the_study_is_refused():
    far = dict.fromkeys(forecast.FEATURES, 100000.0)
    told = forecast.forecast(synthetic.study(), far, GENERATION)
    assert not told.covered
    assert np.isnan(told.retention.value)
    assert told.distance > 1


@pytest.mark.parametrize(("cells", "said"), [(6, "at least 12 cells"), (60, "no output_kl")])
def test_what_no_forecast_can_be_learned_from(cells, said):
    data = synthetic.study(cells=cells)
    with pytest.raises(forecast.ForecastError, match=said):
        forecast.usable(data if cells < 12 else data.drop_vars("output_kl"), GENERATION)
    with pytest.raises(forecast.ForecastError, match="the candidate has no"):
        forecast.forecast(synthetic.study(), {}, GENERATION)


# --- pruning against quantization ----------------------------------------------------------------


def test_matched_damage_finds_what_was_planted_and_nothing_else():
    plain = synthetic.study(cells=100)
    found = matched.match(plain, "output_kl", GENERATION)
    assert found is not None
    assert found.difference.low < 0 < found.difference.high
    lifted = plain.copy()
    lifted[GENERATION] = lifted[GENERATION] + 0.2 * (lifted.kind == "quantization")
    found = matched.match(lifted, "output_kl", GENERATION)
    assert found is not None
    assert found.difference.low > 0.1
    assert found.difference.value == pytest.approx(0.2, abs=0.08)


def test_kinds_that_share_no_range_are_not_compared():
    data = synthetic.study()
    data["output_kl"] = ("cell", data.output_kl.values * np.where(data.kind == "pruning", 1e6, 1.0))
    assert matched.match(data, "output_kl", GENERATION) is None
    assert matched.match(data, "decode_speed", GENERATION) is None
    notes = {f.detail["axis"]: f.claim for f in study_findings.tell(data) if f.level == "note"}
    assert "no 3 of each in a range that both reach" in notes["output_kl"]
    data["decode_speed"] = ("cell", np.where(data.kind == "pruning", 1.5, 1.0))
    notes = {f.detail["axis"]: f.claim for f in study_findings.tell(data) if f.level == "note"}
    assert "0 quantized cells that write faster" in notes["decode_speed"]


def test_shapes_at_equal_damage():
    data = synthetic.study(cells=100)
    rng = np.random.default_rng(0)
    data["shape_kurtosis"] = (
        "cell",
        rng.normal(size=100) + 3.0 * (data.kind.values == "quantization"),
    )
    data["shape_common"] = ("cell", np.log(data.output_kl.values) + 0.1 * rng.normal(size=100))
    found = {s.figure: s.difference for s in matched.shapes(data)}
    assert found["shape_kurtosis"].low > 2
    assert found["shape_common"].low < 0 < found["shape_common"].high


# --- what to drop, what to do --------------------------------------------------------------------


def scored(folder, name, ranking, wrong, count=2):
    """A cell that dropped `count` sublayers and writes these of twenty items wrong."""
    dense, other = np.ones(20), np.ones(20)
    other[list(wrong)] = 0
    coords = {
        "task": ("item", np.full(20, "plurals")), "format": ("item", np.full(20, "generation")),
        "chance": ("item", np.zeros(20)), "twin": ("item", np.full(20, "")), "model": list(schema.MODELS),
    }  # fmt: skip
    scores = schema.dataset("scores", {"score": np.stack([dense, other], -1)}, coords)
    recipe = f"{name}@{count}" + (f"-{ranking}" if ranking != "cosine" else "")
    cell = schema.tree(
        {"scores": scores}, {"model": "m", "recipe": recipe, "achieved": {"dropped": {"attn": [1]}}}
    )
    cell["summary"] = summarise(cell)
    schema.write(cell, folder / "cells" / f"{recipe}.nc")


def test_a_better_ranking_is_found_and_an_equal_one_is_not(tmp_path):
    for count in (1, 2):
        scored(tmp_path, "attn-drop", "cosine", range(12), count)
        scored(tmp_path, "attn-drop", "kl", range(2), count)
        scored(tmp_path, "attn-drop", "var-r", [*range(11), 12], count)
    study = open_study(tmp_path)
    assert sorted(study.ranking.values) == ["cosine"] * 2 + ["kl"] * 2 + ["var-r"] * 2
    better, alike = rankings.rankings(study)
    assert (better.ranking, better.settings, better.wins, better.items) == ("kl", 2, 2, 20)
    assert better.difference.value == pytest.approx(0.5)
    assert better.difference.low > 0
    assert better.p_value < 0.05
    assert (alike.ranking, alike.same, alike.difference.value) == ("var-r", 2, 0)
    assert alike.p_value > 0.5
    claims = [f.claim for f in study_findings.tell(study) if f.evidence == "/scores, rankings"]
    assert claims[0].endswith("it keeps more.")
    assert claims[1].endswith("not told apart.")


def test_advice_goes_no_further_than_the_first_amount_that_harms():
    data = synthetic.study(cells=10)
    data = data.isel(cell=slice(0, 4)).assign_coords(
        method=("cell", ["wanda"] * 4), recipe=("cell", list("abcd"))
    )
    data["compression"] = ("cell", [0.1, 0.2, 0.3, 0.4])
    data[GENERATION] = ("cell", [1.0, 0.85, 0.5, 1.0])
    data[f"{GENERATION}_low"] = ("cell", [0.96, 0.8, 0.4, 0.97])
    (reach,) = [r for r in advice.reaches(data) if r.outcome == GENERATION]
    assert (reach.intact, reach.kept, reach.tried) == ("a", "b", 4)
    assert reach.intact_saved == pytest.approx(0.1)


# --- summaries, files, page ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "achieved", "expected"),
    [
        ("attn-drop@5-kl", {"dropped": {"attn": [1]}}, ("attn-drop", "5-kl", "kl", "pruning", 5, -1)),
        ("mlp-drop@3-var-r-iterative", {"dropped": {"mlp": [1]}}, ("mlp-drop", "3-var-r-iterative", "var-r-iterative", "pruning", 3, -1)),
        ("random@0.5,seed=7", {"sparsity": 0.5}, ("random", "0.5", "", "pruning", 0, 7)),
        ("rtn@int4-g64", {"bits": 4}, ("rtn", "int4-g64", "", "quantization", 0, -1)),
        ("attn-drop@2+rtn@int8", {"dropped": {"attn": [1]}, "bits": 8}, ("attn-drop+rtn", "2+int8", "", "pruning and quantization", 0, -1)),
        ("some/checkpoint", {}, ("some/checkpoint", "", "", "other", 0, -1)),
    ],
)  # fmt: skip
def test_recipes_are_described(recipe, achieved, expected):
    told = described(recipe, achieved)
    assert (
        tuple(told[k] for k in ("method", "amount", "ranking", "kind", "count", "seed")) == expected
    )


def test_storage_counts_what_a_file_would_hold():
    plain = {"parameters": 100.0, "nonzero": 100.0, "bytes": 400.0, "bytes_packed": 400.0}
    assert stored(plain, None) == 200
    assert stored({**plain, "nonzero": 50.0}, None) == pytest.approx(50 * 2 + 100 / 8)
    assert stored({**plain, "bytes_packed": 20 * 4 + 80 * 0.5}, 4) == pytest.approx(
        20 * 2 + 80 * 0.5
    )
    assert stored({**plain, "nonzero": 99.0}, None) == 200


def test_a_study_is_written_read_and_shown(tmp_path):
    data = synthetic.study()
    synthetic.write(data, tmp_path)
    again = open_study(tmp_path).sortby("recipe")
    first = data.sortby("recipe")
    for name in first.data_vars:
        np.testing.assert_allclose(again[name].values, first[name].values)
    assert again.to_dataframe().shape[0] == 60
    names = {p.name for p in study_figures.draw(data)}
    assert names == {"damage", f"forest-{GENERATION}", "forest-retention_choice", f"forecast-{GENERATION}", "forecast-retention_choice", "kinds"}  # fmt: skip
    page = render_study(tmp_path, tmp_path / "report.html").read_text()
    for finding in study_findings.tell(data):
        if finding.level == "verdict":
            assert finding.claim.split("(")[0].replace("&", "&amp;") in page
    told = json.loads((tmp_path / "summary.json").read_text())
    assert len(told["cells"]) == 60
    assert (
        len(xr.Dataset.from_dataframe(__import__("pandas").read_csv(tmp_path / "cells.csv")).recipe)
        == 60
    )


def test_model_text_on_the_page_is_escaped(tmp_path):
    data = synthetic.study(cells=10)
    data = data.assign_coords(recipe=("cell", ["<script>alert(1)</script>"] * 10))
    synthetic.write(data, tmp_path)
    assert "<script>" not in render_study(tmp_path, tmp_path / "r.html").read_text()


def test_a_folder_without_cells_and_a_group_that_is_none(tmp_path):
    with pytest.raises(schema.SchemaError, match="no finished cell"):
        open_study(tmp_path)
    synthetic.write(synthetic.study(cells=2), tmp_path)
    with pytest.raises(schema.SchemaError, match="is no group"):
        open_study(tmp_path, "outputs")


# --- a forecast for a candidate ------------------------------------------------------------------


@pytest.fixture
def studied(tmp_path, llama):
    """A study of a tiny model whose cells lie around what rounding it to 4 bits does."""
    folder = tmp_path / "model"
    llama.module.save_pretrained(folder)
    llama.tokenizer.save_pretrained(folder)
    request = Request(str(folder))
    dense = load(folder)
    cell = measure(
        dense,
        compress(dense, Recipe.parse("rtn@int4-g16")),
        prompts=default_prompts(),
        layerwise=False,
    )
    row = summarise(cell)
    figures = dict(zip(row.figure.values.tolist(), row.value.values.tolist(), strict=True))
    data = synthetic.study()
    spread = np.random.default_rng(0).normal(0, 1, 60)
    for name in forecast.FEATURES:
        data[name] = ("cell", figures[name] * np.exp(spread))
    data[GENERATION] = ("cell", 1 / (1 + np.exp(spread)))
    data = data.assign_coords(model=("cell", [str(folder)] * 60))
    synthetic.write(data, tmp_path / "study", request=asdict(request))
    return tmp_path / "study"


def test_a_candidate_that_was_never_scored_is_foretold(studied, capsys, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["prunescope", "forecast", "rtn@int4-g16", "--study", str(studied)]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    first, second = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("rtn@int4-g16, free generation: expected retention 0.")
    assert "learned from 60 cells" in first
    assert "multiple choice" in second


def test_a_candidate_far_from_the_study_is_refused_with_status_1(studied, capsys, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["prunescope", "forecast", "random@0.9", "--study", str(studied)]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "outside what the study covers" in capsys.readouterr().out


@pytest.mark.parametrize(("candidate", "said"), [("no/such/model/x", "no such"), ("rnt@int8", "no recipe"), ("rtn@int8", "no finished cell")])  # fmt: skip
def test_a_forecast_that_cannot_be_is_a_usage_error(
    studied, capsys, monkeypatch, candidate, said, tmp_path
):
    folder = tmp_path / "empty" if said == "no finished cell" else studied
    monkeypatch.setattr("sys.argv", ["prunescope", "forecast", candidate, "--study", str(folder)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


# --- the real model ------------------------------------------------------------------------------


@pytest.mark.smollm2
def test_a_study_of_smollm2(tmp_path):
    file = tmp_path / "s.toml"
    file.write_text(
        'recipes = ["attn-drop@1", "magnitude@0.5", "neurons-{reverse,salience-reverse}@0.1,target=plurals,multiple=64"]\n'
        'tasks = ["plurals", "capitals"]\nlimit = 8\nsteps = 4\ncauses = 0\nskip = ["layers", "decoding", "speed"]\n'
    )
    with Progress() as progress:
        assert (
            sweep(
                studyfile.plans(studyfile.read(file), tmp_path / "out"),
                [lambda: Here(progress)],
                progress,
            )
            == []
        )
    study = open_study(tmp_path / "out").set_index(cell="recipe")
    light, heavy = study.sel(cell="attn-drop@1"), study.sel(cell="magnitude@0.5")
    assert light.output_kl < 0.1 < 1 < heavy.output_kl
    assert light[GENERATION] > 0.8 > 0.2 > heavy[GENERATION]
    assert 0.005 < light["compression"] < 0.01
    assert 0.2 < heavy["compression"] < 0.5
    assert 0 < light.shape_common < 1 < light.shape_rank
    assert list(study.kind.values) == ["pruning"] * 4
    text = render_study(tmp_path / "out", tmp_path / "report.html").read_text()
    assert "Neurons cut out" in text
    assert "For choosing" in text


def test_the_page_says_whether_recovery_pays_where_it_was_tried(tmp_path):
    from test_recovery import study as trained

    cells = trained()
    for name, cell in cells.items():
        schema.write(cell, tmp_path / "model" / "cells" / f"{name}.nc")
    page = render_study(tmp_path, tmp_path / "report.html").read_text()
    assert "Whether recovery pays" in page
    assert "brings back written answers: retention 0.30 before, 0.80 after" in page
    schema.write(cells["cut"], tmp_path / "other" / "cells" / "cut.nc")
    alone = render_study(tmp_path / "other", tmp_path / "alone.html").read_text()
    assert "Whether recovery pays is not asked" in alone
