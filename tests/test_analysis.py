"""Statistics, verdicts, hierarchy, theory and findings, on data whose truth is known."""

import json

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from prunescope.analysis import collapse, diagnose, hierarchy, schema, theory
from prunescope.analysis.statistics import (
    Interval,
    above_chance,
    bootstrap,
    holm,
    mcnemar,
    resamples,
)
from scipy import stats


def test_bootstrap_intervals_cover_at_about_their_level():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        x = rng.normal(1.0, 1.0, 60)
        found = bootstrap(lambda pick, x=x: x[pick].mean(-1), 60, draws=400, seed=trial)
        hits += found.low <= 1.0 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_resamples_stay_within_their_stratum_and_are_seeded():
    strata = np.array([0, 0, 0, 1, 1])
    picks = resamples(strata, draws=50, seed=1)
    assert (strata[picks] == strata).all()
    assert (picks == resamples(strata, draws=50, seed=1)).all()
    assert (picks != resamples(strata, draws=50, seed=2)).any()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_between_the_raw_p_and_bonferroni(p):
    found = holm(p)
    for raw, adjusted in zip(p, found, strict=True):
        assert raw <= adjusted + 1e-12
        assert adjusted <= min(1.0, raw * len(p)) + 1e-12
    order = np.argsort(p, kind="stable")
    assert np.all(np.diff(np.array(found)[order]) >= -1e-12)


def test_tests_are_exact():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(8, 1) == pytest.approx(2 * sum(stats.binom.pmf(k, 9, 0.5) for k in (0, 1)))
    assert above_chance(10, 40, 0.25) > 0.05 > above_chance(20, 40, 0.25)


def make_scores(dense, candidate, chance=0.0, format="generation", task="t", twin=""):
    n = len(dense)
    both = np.stack([dense, candidate], axis=1).astype(np.float32)
    zeros = np.zeros_like(both)
    coords = {
        "item": np.arange(n), "model": ["dense", "candidate"], "task": ("item", [task] * n), "format": ("item", [format] * n),
        "twin": ("item", [twin] * n), "chance": ("item", [chance] * n), "item_id": ("item", [f"{task}-{i}" for i in range(n)]),
        "prompt_text": ("item", ["<b>prompt</b>"] * n), "accepted": ("item", ["x"] * n),
    }  # fmt: skip
    text = np.array([["<script>alert(1)</script>", "fine & well"]] * n, dtype=object)
    values = {
        "score": both,
        "no_answer": zeros,
        "no_stop": zeros,
        "repetition": zeros,
        "text": text,
    }
    return schema.dataset("scores", values, coords)


def ones(right, n):
    return np.array([1.0] * right + [0.0] * (n - right))


@pytest.mark.parametrize(
    ("dense", "candidate", "chance", "expected"),
    [
        (ones(90, 100), ones(90, 100), 0.0, "intact"),
        (ones(90, 100), ones(0, 100), 0.0, "collapsed"),
        (ones(90, 100), ones(50, 100), 0.0, "degraded"),
        (ones(90, 100), ones(25, 100), 0.25, "degraded"),
        (ones(26, 100), ones(0, 100), 0.25, "uninformative"),
        (ones(1, 48), ones(0, 48), 0.0, "uninformative"),
        (ones(0, 48), ones(0, 48), 0.0, "uninformative"),
        (ones(40, 40), ones(6, 40), 0.25, "collapsed"),
    ],
)
def test_verdicts(dense, candidate, chance, expected):
    format = "choice" if chance else "generation"
    (row,) = collapse.retentions(make_scores(dense, candidate, chance, format))
    assert row.verdict == expected
    if expected != "uninformative":
        s, s2, c = dense.mean(), candidate.mean(), chance
        assert row.retention.value == pytest.approx((s2 - c) / (s - c))
        assert row.retention.low <= row.retention.value <= row.retention.high
    assert (row.lost, row.gained) == (
        int(((dense == 1) & (candidate == 0)).sum()),
        int(((dense == 0) & (candidate == 1)).sum()),
    )


@given(st.integers(0, 60), st.integers(0, 60))
def test_a_floor_never_collapses(right, kept):
    """Whatever the candidate does, a dense model that is not above chance gives no verdict."""
    dense, candidate = ones(right, 60), ones(kept, 60)
    informative = collapse.is_informative(dense, np.full(60, 0.25))
    found = collapse.verdict(Interval(0.0, 0.0, 0.0), informative)
    assert (found == "uninformative") == (stats.binom.sf(right - 1, 60, 0.25) >= 0.05)
    assert candidate.sum() == kept


def twins(keep_choice, keep_generation, n=100):
    rng = np.random.default_rng(0)
    dense = np.ones(n)
    halves = [
        make_scores(dense, (rng.random(n) < k).astype(float), c, f, "twin", "twin")
        for k, c, f in ((keep_choice, 0.25, "choice"), (keep_generation, 0.0, "generation"))
    ]
    joined = xr.concat(halves, dim="item")
    return joined.assign_coords(item=np.arange(2 * n))


def test_a_planted_discrepancy_is_found_and_an_absent_one_is_not():
    gap = collapse.discrepancy(twins(1.0, 0.3))
    assert gap is not None
    assert gap.difference.low > 0.5
    same = collapse.discrepancy(twins(0.925, 0.9))  # both keep about 0.9 above chance
    assert same is not None
    assert same.difference.low < 0 < same.difference.high
    assert collapse.discrepancy(make_scores(ones(9, 10), ones(9, 10))) is None


def make_angular(factors, prompts=12, tokens=5):
    rng = np.random.default_rng(1)
    base = np.exp(rng.normal(-4, 0.3, (prompts, tokens)))
    values = np.stack([base * f for f in np.cumprod(factors)], axis=-1)
    values[0, -1] = np.nan  # a shorter prompt
    return xr.DataArray(values, dims=("prompt", "token", "space"), coords={"space": list("hzp")})


def test_amplification_recovers_planted_factors():
    found = hierarchy.amplification(make_angular([1.0, 0.25, 12.0]))
    assert [(a.source, a.target) for a in found] == [("h", "z"), ("z", "p")]
    assert [a.factor.value for a in found] == pytest.approx([0.25, 12.0])
    assert all(a.factor.low == pytest.approx(a.factor.high) for a in found), (
        "the same in every prompt"
    )


def test_the_steepest_rise_is_found():
    kl = np.zeros((10, 4, 6, 2))
    kl[:, :, 3:] += 0.5
    kl[:, :, 3, 0] -= 0.4  # attention of layer 3: 0.1; its MLP: 0.5
    kl += np.random.default_rng(0).normal(0, 0.01, kl.shape)
    data = xr.DataArray(
        kl, dims=("prompt", "token", "layer", "site"), coords={"site": ["attn", "mlp"]}
    )
    found = hierarchy.steepest(data)
    assert (found.layer, found.site) == (3, "mlp")
    assert found.size.value == pytest.approx(0.4, abs=0.02)
    assert found.share == 1.0


def test_a_fit_sees_a_power_law_and_a_factor():
    x = np.geomspace(1e-6, 1, 200)
    exact = theory.fit("3", x, x)
    assert exact is not None
    assert (exact.slope, exact.r2, exact.spearman, exact.within, exact.error) == pytest.approx(
        (1, 1, 1, 1, 0)
    )
    thrice = theory.fit("3", x, 3 * x)
    assert thrice is not None
    assert (thrice.slope, thrice.within, thrice.error) == pytest.approx((1, 0, 2))
    square = theory.fit("3", x, x**2)
    assert square is not None
    assert square.slope == pytest.approx(2)
    assert theory.fit("3", x[:3], x[:3]) is None


def make_cell(name="mlp-drop@3", layers=4, prompts=6, tokens=5, kl_scale=1.0):
    """A cell with every group, its figures from real logits of random shifts."""
    import reference
    import torch

    torch.manual_seed(len(name))
    h = torch.randn(prompts, tokens, layers, 2, 1, 16)
    other = h + kl_scale * 0.3 * torch.randn(prompts, tokens, layers, 2, 2, 16)
    h = h.expand_as(other)
    weight = torch.randn(90, 16)
    truth, angles = (
        reference.figures(h @ weight.T, other @ weight.T),
        reference.angle(h.double(), other.double()),
    )
    plain = {n: truth[n].numpy().astype(np.float32) for n in schema.SCHEMA["shifts"] if n in truth}
    spaced = {
        n: torch.stack([angles[n], truth[f"{n}_z"], truth[f"{n}_p"]], -1).numpy().astype(np.float32)
        for n in ("cosine", "angular", "parallel", "orthogonal")
    }
    coords = {"prompt": np.arange(prompts), "token": np.arange(tokens), "space": list("hzp")}
    inner = {"layer": np.arange(layers), "site": ["attn", "mlp"], "effect": ["local", "propagated"]}
    attrs = {"temperature": 1.0, "lens": "norm"}
    output = {n: v[:, :, -1, -1, -1] for n, v in (plain | spaced).items()}
    cost = {n: np.array([100.0, 60.0]) for n in ("parameters", "nonzero", "bytes", "bytes_packed")}
    groups = {
        "shifts": schema.dataset("shifts", plain | spaced, coords | inner, attrs),
        "output": schema.dataset("output", output, coords, attrs),
        "scores": twins(1.0, 0.1),
        "steps": steps_of_cell(),
        "cost": schema.dataset("cost", cost, {"model": ["dense", "candidate"]}),
    }
    return schema.tree(groups, {"recipe": name, "model": "tiny", "versions": {"numpy": "2"}})


def steps_of_cell(prompts=12, steps=8):
    """`/steps` of texts that part, with texts that would be code if a page did not escape them."""
    import test_decoding

    kl = np.random.default_rng(5).gamma(2, 0.1, (prompts, steps, 4))
    tokens, other = test_decoding.parted_at([i % steps for i in range(prompts)], steps=steps)
    data = test_decoding.steps_of(kl, tokens=tokens, other=other)
    data["token_text"][:, 1, 1] = "<img src=x onerror=alert(1)>"
    data["token_text"][:, 2, 0] = "a\nb"
    data["prompt_text"][:] = "{{ 7 * 7 }}"
    return data


def shifts_of(size, prompts=12, tokens=40, layers=3, spread=0.0):
    """`/shifts`-like figures of exactly Gaussian dz, but for a cubic term of known size."""
    rng = np.random.default_rng(1)
    shape = (prompts, tokens, layers, 2)
    validity = rng.uniform(0.01, size, shape)
    kl = rng.lognormal(-3, 1, shape)
    dims = ("prompt", "token", "layer", "site")
    estimate = kl * (1 + spread * validity)
    coords = {"layer": np.arange(layers), "site": ["attn", "mlp"]}
    values = {"kl": kl, "var_p": 2 * estimate, "var_r": 2 * estimate, "validity": validity}
    angular = np.stack([kl, 2 * kl, 6 * kl], axis=-1)
    angular[:, :, -1] *= [1.0, 5.0, 1.0]
    data = xr.Dataset({n: (dims, v) for n, v in values.items()}, coords)
    spaced = xr.DataArray(angular, dims=(*dims, "space"), coords={"space": list("hzp")})
    return data.assign(angular=spaced, orthogonal=np.sqrt(2 * spaced))


def test_the_place_where_second_order_stops_is_found():
    found = theory.limit(shifts_of(3.0, spread=1.0), 1.0)  # a factor of 2 is exceeded from 1 on
    assert found.validity.low <= found.validity.value <= found.validity.high
    assert found.validity.value == pytest.approx(1.0, abs=0.1)
    assert found.beyond == pytest.approx(2 / 3, abs=0.05)
    assert found.error.value == pytest.approx(1.5, rel=0.1)


def test_second_order_that_holds_everywhere_has_no_limit():
    found = theory.limit(shifts_of(0.5, spread=1.0), 1.0)
    assert np.isnan(found.validity.value)
    assert found.beyond == 0
    assert theory.limit(shifts_of(1.0, prompts=1, tokens=3), 1.0) is None


def test_every_site_has_its_own_fit():
    data = shifts_of(1.0)
    data["var_p"] = data.var_p.where(data.layer != 1, 10 * data.var_p)
    found = theory.by_site(data, 1.0)
    assert (found.within.sel(theorem="3", layer=[0, 2]) == 1).all()
    assert (found.within.sel(theorem="3", layer=1) == 0).all()
    np.testing.assert_allclose(found.slope, 1, atol=0.01)


def test_the_departure_is_a_median_over_positions():
    data = shifts_of(1.0, spread=0.5).isel(layer=0, site=0)
    found = theory.departure(data, 1.0)
    assert found.validity.value == pytest.approx(float(data.validity.median()))
    assert found.error.value == pytest.approx(0.5 * float(data.validity.median()), rel=1e-6)
    assert found.error.low < found.error.value < found.error.high


def test_amplification_at_every_layer():
    found = hierarchy.amplification_by_layer(shifts_of(1.0).angular)
    assert found["mean"].sel(step="h->z").isel(layer=0).values == pytest.approx([2, 2])
    assert found["mean"].sel(step="z->p").isel(layer=2).values == pytest.approx([0.6, 0.6])
    assert (found.low <= found["mean"] + 1e-12).all()
    assert (found["mean"] <= found.high + 1e-12).all()


def test_findings_name_what_was_planted():
    cell = make_cell()
    found = diagnose(cell)
    verdict = next(f for f in found if f.level == "verdict")
    assert verdict.claim.startswith("mlp-drop@3 keeps multiple choice (retention 1.00")
    assert (
        "degrades free generation (0.1" in verdict.claim
        or "destroys free generation (0.1" in verdict.claim
    )
    assert verdict.interval is not None
    assert verdict.n == 100
    for f in found:
        json.dumps(f.plain())
        assert f.where.startswith("mlp-drop@3")
        if f.interval is not None and f.level != "note":
            assert f.interval[0] <= f.value <= f.interval[1] or "share" in f.detail
    estimate = next(f for f in found if f.evidence == "/output/kl, /output/flip")
    assert estimate.value == pytest.approx(float(cell["output"].kl.mean()), rel=1e-5)


def test_cells_are_compared_only_as_far_as_they_differ():
    cells = {"a": make_cell("a", kl_scale=1.0), "bb": make_cell("bb", kl_scale=0.2)}
    (across,) = [f for f in diagnose(cells) if f.where == "all cells"]
    assert "from least to most damage: bb, a. a is surely ahead of bb" in across.claim
    twice = {"a": make_cell("a"), "b": make_cell("b")}
    (across,) = [f for f in diagnose(twice) if f.where == "all cells"]
    assert "is not surely ahead" in across.claim or across.interval[0] > 0


def test_a_cell_is_written_whole_and_read_back(tmp_path):
    cell = make_cell()
    schema.write(cell, tmp_path / "deep" / "cell.nc")
    back = schema.read(tmp_path / "deep" / "cell.nc")
    for name in cell.children:
        xr.testing.assert_allclose(back[name].to_dataset(), cell[name].to_dataset())
    with xr.open_datatree(tmp_path / "deep" / "cell.nc") as plain:
        assert plain["shifts"].kl.attrs["units"] == "nat"
        assert plain["scores"].to_dataset().to_dataframe().shape[0] == 400
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["cell.nc"], (
        "nothing is left beside it"
    )


def test_the_schema_is_kept():
    with pytest.raises(schema.SchemaError, match="/output/klx is not declared"):
        schema.dataset("output", {"klx": np.zeros((1, 1))}, {})
    with pytest.raises(schema.SchemaError, match="holds <U1, declared kind 'f'"):
        schema.dataset("output", {"kl": np.array([["a"]])}, {})
    good = schema.dataset("output", {"kl": np.zeros((1, 2))}, {})
    with pytest.raises(schema.SchemaError, match="declared"):
        schema.check_group("output", good.transpose("token", "prompt"))
    with pytest.raises(schema.SchemaError, match="not a group"):
        schema.check_group("outputs", good)
    for variables in schema.SCHEMA.values():
        for row in variables.values():
            assert row.long_name
            assert row.dims


def test_files_of_another_kind_are_refused(tmp_path):
    (tmp_path / "x.nc").write_text("no netCDF")
    with pytest.raises(schema.SchemaError, match="cannot be read as netCDF"):
        schema.read(tmp_path / "x.nc")
    cell = make_cell()
    cell.attrs["schema"] = "0"
    cell.to_netcdf(tmp_path / "old.nc", engine="h5netcdf")
    with pytest.raises(schema.SchemaError, match="schema version '0'"):
        schema.read(tmp_path / "old.nc")


def test_formulas_agree_with_their_definitions():
    from prunescope.analysis import formulas

    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 8))
    for size in (1e-6, 1e-2, 1.0, 5.0):
        y = x + size * rng.normal(size=x.shape)
        d = y - x
        alpha = (d * x).sum(-1) / (x * x).sum(-1)
        rho = np.linalg.norm(d - alpha[:, None] * x, axis=-1) / np.linalg.norm(x, axis=-1)
        cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        np.testing.assert_allclose(
            formulas.angular_exact(1 + alpha, rho), 1 - cosine, rtol=1e-6, atol=1e-15
        )
        np.testing.assert_allclose(formulas.angular_paper(rho), rho**2 / 2)
        if size == 1e-2:
            np.testing.assert_allclose(
                formulas.angular_corrected(alpha, rho),
                formulas.angular_exact(1 + alpha, rho),
                rtol=1e-2,
            )
    assert formulas.kl_estimate(2.0, 2.0) == formulas.angular_p_estimate(2.0, 2.0) == 0.25
    assert formulas.validity(np.array([2.0, 0.0]), np.array([-3.0, 0.0])).tolist() == [0.5, 0.0]
