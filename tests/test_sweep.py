"""Sweeps: study files, workers that fail or die, and a study killed at any moment."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import architectures
import numpy as np
import pytest
import xarray as xr
from prunescope.analysis import open_study, schema
from prunescope.analysis.places import PlaceError, place, write_text
from prunescope.probes.recipe import RecipeError
from prunescope.reports import studyfile
from prunescope.reports.engines import Beside, Here, Remote, Trouble, WorkerDied, workers
from prunescope.reports.estimate import estimate
from prunescope.reports.progress import Progress
from prunescope.reports.request import StudyError, check_empty
from prunescope.reports.study_page import render_study
from prunescope.reports.sweep import failures, sweep

COMMAND = [sys.executable, "-c", "from prunescope.reports.cli import main; main()"]


@pytest.fixture(scope="module")
def two_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "gpt2"):
        model = architectures.build(name)
        model.module.save_pretrained(folder / name)
        model.tokenizer.save_pretrained(folder / name)
    return folder


def study(folder: Path, models: str, recipes: str, **more: str) -> Path:
    file = folder / "study.toml"
    lines = {"models": models, "recipes": recipes, "tasks": '["plurals"]', "limit": "3", "steps": "2",
             "causes": "0", "skip": '["speed"]', **more}  # fmt: skip
    file.write_text("".join(f"{k} = {v}\n" for k, v in lines.items()))
    return file


def command(*arguments, **options):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=environment, **options
    )


# --- study files ---------------------------------------------------------------------------------


def test_amounts_multiply_out_and_only_chance_is_seeded():
    patterns = [
        "{attn,mlp}-drop@{1,2}",
        "random@{0.1,2:4}",
        "neurons-random@0.2,target=kinds",
        "attn-drop@1",
    ]
    assert studyfile.cells(patterns, [3, 5]) == [
        "attn-drop@1", "attn-drop@2", "mlp-drop@1", "mlp-drop@2",
        "random@0.1,seed=3", "random@0.1,seed=5", "random@2:4,seed=3", "random@2:4,seed=5",
        "neurons-random@0.2,target=kinds,seed=3", "neurons-random@0.2,target=kinds,seed=5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("recipies = ['rtn@int8']", "did you mean 'recipes'"),
        ("recipes = ['rtn@{int8']", "braces that do not close"),
        ("recipes = 'rtn@int8'", "must be a list of texts"),
        ("recipes = ['rtn@int8']\nlimit = 'ten'", "limit is 'ten'; it must be a whole number"),
        ("recipes = ['rtn@int8']\nlimit = true", "limit is True; it must be a whole number"),
        ("recipes = ['rtn@int8']\nseeds = [1.5]", "seeds is [1.5]; it must be a list of whole"),
        ("recipes = ['rtn@int8']\nskip = [1]", "a list of texts"),
        ("recipes = []", "no recipes"),
        ("recipes = [", "cannot be read as TOML"),
        ("recipes = ['rtn@int8']\nmodels=['a','b']\ncandidates=['c']", "forms of one model"),
        ("recipes = ['rtn@int8']\nmodels=['a/b','a_b']", "the same folder"),
    ],
)  # fmt: skip
def test_a_study_file_that_is_wrong_says_what_to_do(tmp_path, line, said):
    (tmp_path / "s.toml").write_text(line)
    with pytest.raises(StudyError, match=re.escape(said)):
        studyfile.read(tmp_path / "s.toml")


def test_a_recipe_that_is_wrong_and_a_file_that_is_not_there(tmp_path):
    (tmp_path / "s.toml").write_text("recipes = ['rnt@int8']")
    with pytest.raises(RecipeError, match="did you mean"):
        studyfile.read(tmp_path / "s.toml")
    with pytest.raises(StudyError, match="no such study file"):
        studyfile.read(tmp_path / "t.toml")


def test_paths_are_those_beside_the_file_and_hyphens_are_underscores(tmp_path):
    (tmp_path / "mine.txt").write_text("one line\n")
    (tmp_path / "s.toml").write_text(
        "recipes = ['rtn@int8']\nprompts = 'mine.txt'\ncalibration = 'c4:en:train'\nallow-code-execution = true"
    )
    (request,) = studyfile.read(tmp_path / "s.toml").values()
    assert request.prompts == str(tmp_path / "mine.txt")
    assert request.calibration == "c4:en:train"
    assert request.allow_code_execution
    assert request.model == "smollm2"


@pytest.mark.parametrize(
    ("file", "cells"), [("neurons.toml", 5 * 10 * 3 + 2 * 2 * 3), ("neurons-cost.toml", 5)]
)
def test_the_neurons_examples_are_orders_by_ratios_by_seeds(
    root, shared_data, tmp_path, file, cells
):
    requests = studyfile.read(root / "docs" / "examples" / file, data=str(shared_data))
    plans = studyfile.plans(requests, tmp_path / "out")
    assert len(plans["smollm2"].recipes) == cells


@pytest.mark.parametrize("file", ["smollm2.toml"])
def test_the_examples_are_what_the_readme_says(root, shared_data, tmp_path, file):
    requests = studyfile.read(root / "docs" / "examples" / file, data=str(shared_data))
    plans = studyfile.plans(requests, tmp_path / "out")
    names = plans["smollm2"].request.names()
    assert len(names) >= 40
    assert {n.partition("@")[0] for n in names} >= {"attn-drop", "magnitude", "wanda", "sparsegpt", "rtn", "gptq", "awq"}  # fmt: skip
    assert not (tmp_path / "out").exists()


# --- cells ---------------------------------------------------------------------------------------


def test_models_times_recipes_with_failures_written_down(two_models, tmp_path):
    recipes = '["mlp-drop@{1,99}", "rtn@int8"]'
    file = study(tmp_path, f'["{two_models}/llama", "{two_models}/gpt2"]', recipes)
    out = tmp_path / "out"
    done = command("sweep", file, "--out", out, "--workers", "2")
    assert done.returncode == 1, done.stderr
    assert done.stdout.strip() == str(out / "report.html"), done.stderr
    found = failures(out)
    assert sorted((f.model[-4:], f.cell, f.kind) for f in found) == [
        ("gpt2", "mlp-drop@99", "RecipeError"), ("lama", "mlp-drop@99", "RecipeError"),
    ]  # fmt: skip
    assert "failed: " in done.stderr
    table = open_study(out)
    assert sorted(table.recipe.values) == ["mlp-drop@1"] * 2 + ["rtn@int8"] * 2
    assert set(table.kind.values) == {"pruning", "quantization"}
    assert (table.output_kl.values > 0).all()
    frame = table.to_dataframe()
    assert {"output_kl", "compression", "shape_rank"} <= set(frame)
    lazy = open_study(out, "output")
    assert lazy.kl.chunks is not None
    assert lazy.sizes["cell"] == 4
    one = schema.read(Path(str(table.file.values[0])))["output"].kl
    mine = lazy.kl.isel(cell=0).values[: one.shape[0], : one.shape[1]]
    np.testing.assert_array_equal(mine, one.values)
    text = (out / "report.html").read_text()
    assert "mlp-drop@99" in text
    assert "2 failed" in text
    again = command("report", out, "--out", tmp_path / "again.html")
    assert again.returncode == 0, again.stderr


def test_a_study_that_is_killed_goes_on_and_recomputes_nothing(two_models, tmp_path):
    file = study(
        tmp_path,
        f'["{two_models}/llama"]',
        '["mlp-drop@1", "attn-drop@1", "magnitude@{0.1,0.2,0.3}"]',
    )
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*COMMAND, "sweep", str(file), "--out", str(out)], stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    deadline = time.time() + 240
    while not list(out.glob("*/cells/[!.]*.nc")):
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {f: f.stat().st_mtime_ns for f in out.glob("*/cells/[!.]*.nc")}
    (folder,) = {f.parent for f in finished}
    torn = [folder / ".writing-1-rtn@int8.nc", folder.parent / ".writing-2-study.json"]
    for file_of_the_killed in torn:
        file_of_the_killed.write_bytes(b"half")
    assert open_study(out).sizes["cell"] == len(finished) < 5
    done = command("sweep", file, "--out", out)
    assert done.returncode == 0, done.stderr
    assert open_study(out).sizes["cell"] == 5
    assert not any(f.exists() for f in torn)
    assert {f: f.stat().st_mtime_ns for f in finished} == finished
    assert "dense: tasks" not in done.stderr
    again = command("sweep", file, "--out", out)
    assert "all cells are there already" in again.stderr


def test_a_dry_run_prints_every_cell_and_makes_none(two_models, tmp_path):
    file = study(tmp_path, f'["{two_models}/llama"]', '["mlp-drop@{1,2}"]')
    done = command("sweep", file, "--out", tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "mlp-drop@2" in done.stdout
    assert "2 cells, 2 to be made" in done.stdout
    assert not (tmp_path / "out").exists()


def test_estimates_rest_on_finished_cells_where_there_are_some(two_models, tmp_path):
    file = study(tmp_path, f'["{two_models}/llama"]', '["mlp-drop@{1,2}", "wanda@0.5"]')
    plans = studyfile.plans(studyfile.read(file), tmp_path / "out")
    (name,) = plans
    rough = estimate(name, plans[name])
    assert {r.basis for r in rough} == {"rough: from sizes"}
    assert rough[2].seconds > rough[0].seconds > 0
    (folder,) = [plans[name].folder]
    seconds = schema.dataset("cost", {"seconds": [4.0, 3.0]}, {"work": ["a", "b"]})
    schema.write(schema.tree({"cost": seconds}, {}), plans[name].cell("mlp-drop@1"))
    known = estimate(name, plans[name])
    assert [(r.state, r.seconds) for r in known] == [
        ("done", 7.0),
        ("to be made", 7.0),
        ("to be made", 7.0),
    ]
    assert folder.exists()


class Fragile:
    """Dies of its first cell so many times, over all workers; else as `Here`."""

    deaths = 0

    def __init__(self, progress):
        self.here = Here(progress)

    def do(self, what, name):
        if name == "mlp-drop@1" and Fragile.deaths > 0:
            Fragile.deaths -= 1
            raise WorkerDied("killed for the test")
        return self.here.do(what, name)

    def close(self):
        pass


@pytest.mark.parametrize(("deaths", "failed"), [(1, []), (9, ["mlp-drop@1"])])
def test_a_worker_that_dies_is_replaced_and_its_cell_tried_again(
    two_models, tmp_path, deaths, failed
):
    file = study(tmp_path, f'["{two_models}/llama"]', '["mlp-drop@1", "rtn@int8"]')
    plans = studyfile.plans(studyfile.read(file), tmp_path / "out")
    Fragile.deaths = deaths
    with Progress() as progress:
        found = sweep(plans, [lambda: Fragile(progress)] * 2, progress)
    assert [f.cell for f in found] == failed
    assert open_study(tmp_path / "out").sizes["cell"] == 2 - len(failed)


def test_a_real_process_that_is_killed_is_noticed(two_models, tmp_path):
    file = study(tmp_path, f'["{two_models}/llama"]', '["mlp-drop@1"]')
    (plan,) = studyfile.plans(studyfile.read(file), tmp_path / "out").values()
    worker = Beside(1, tmp_path / "logs" / "w.log")
    worker.process.kill()
    with pytest.raises(WorkerDied, match=r"signal 9.*out of memory"):
        worker.do(plan, None)
    worker.close()


def test_logits_that_are_not_finite_fail_their_cell_only(two_models, tmp_path, monkeypatch):
    from prunescope.probes import prune

    file = study(tmp_path, f'["{two_models}/llama"]', '["magnitude@0.5", "rtn@int8"]')
    plans = studyfile.plans(studyfile.read(file), tmp_path / "out")
    monkeypatch.setattr(prune, "magnitude", lambda matrix, _share: matrix * float("nan"))
    with Progress() as progress:
        (failure,) = sweep(plans, [lambda: Here(progress)], progress)
    assert (failure.cell, failure.kind) == ("magnitude@0.5", "CellError")
    assert "not finite" in failure.reason
    (kept,) = (tmp_path / "out").glob("*/failed/*.json")
    assert "trace" in json.loads(kept.read_text())
    monkeypatch.undo()
    with Progress() as progress:
        assert sweep(plans, [lambda: Here(progress)], progress) == []
    assert not kept.exists()


def test_a_model_that_cannot_be_loaded_fails_all_of_its_cells(two_models, tmp_path):
    file = study(tmp_path, f'["{two_models}/llama"]', '["mlp-drop@1", "rtn@int8"]')
    plans = studyfile.plans(studyfile.read(file), tmp_path / "out")

    class Broken(Here):
        def do(self, what, name):
            return Trouble("LoadError", "no weights")

    with Progress() as progress:
        found = sweep(plans, [lambda: Broken(progress)], progress)
    assert [f.cell for f in found] == ["mlp-drop@1", "rtn@int8"]
    again = studyfile.plans(studyfile.read(file), tmp_path / "out")
    with Progress() as progress:
        assert sweep(again, [lambda: Here(progress)], progress) == []
    assert failures(tmp_path / "out") == []


def test_a_folder_that_no_sweep_wrote_is_left_alone(two_models, tmp_path):
    file = study(tmp_path, f'["{two_models}/llama"]', '["mlp-drop@1"]')
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(StudyError, match="holds something else"):
        studyfile.plans(studyfile.read(file), tmp_path / "out")


def test_a_folder_with_nothing_but_an_unfinished_file_is_ours(tmp_path):
    """A process killed while it wrote its first file can be started again."""
    (tmp_path / ".writing-1-study.json").write_text("{")
    check_empty(tmp_path)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StudyError, match="holds something else"):
        check_empty(tmp_path)


def test_workers_that_cannot_be():
    with pytest.raises(StudyError, match="at least 1"):
        workers("local", 0, Path(), None, cpus=1, gpus=0)
    with pytest.raises(StudyError, match="not one of local, ray"):
        workers("slurm", 1, Path(), None, cpus=1, gpus=0)


# --- places --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["memory://studies/one", "file://{}/studies"])
def test_results_lie_wherever_fsspec_reaches(two_models, tmp_path, where):
    out = place(where.format(tmp_path))
    file = study(tmp_path, f'["{two_models}/llama"]', '["mlp-drop@1", "rtn@int8"]')
    plans = studyfile.plans(studyfile.read(file), out)
    with Progress() as progress:
        assert sweep(plans, [lambda: Here(progress)], progress) == []
        assert sweep(plans, [lambda: Here(progress)], progress) == []
    (plan,) = plans.values()
    assert plan.missing() == []
    assert open_study(str(out)).sizes["cell"] == 2
    assert open_study(str(out), "output").kl.sizes["cell"] == 2
    page = render_study(out, out / "report.html")
    assert "mlp-drop@1" in page.read_text()
    assert (out / "cells.csv").exists()


def test_threads_that_write_one_file_at_once_do_not_take_each_others(tmp_path):
    """Two workers that begin with one model write its `study.json` at the same moment."""
    file = tmp_path / "study.json"

    def one(who: int) -> None:
        for _ in range(100):
            write_text(file, str(who) * 10_000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(8)))
    assert len(set(file.read_text())) == 1
    assert file.stat().st_size == 10_000
    assert [f.name for f in tmp_path.iterdir()] == ["study.json"]


def test_a_place_that_nothing_reads_is_named():
    with pytest.raises(PlaceError, match="nosuch://"):
        place("nosuch://bucket/x")


# --- Ray -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_on_a_ray_cluster_a_killed_worker_costs_one_try(two_models, tmp_path):
    ray = pytest.importorskip("ray")
    file = study(
        tmp_path, f'["{two_models}/llama", "{two_models}/gpt2"]', '["mlp-drop@1", "rtn@int8"]'
    )
    plans = studyfile.plans(studyfile.read(file), tmp_path / "out")
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _system_config={"worker_niceness": 0},
    )
    killed = []

    class Watched(Remote):
        """Its process is killed under its first cell."""

        def do(self, what, name):
            if name == "mlp-drop@1" and not killed:
                killed.append(self._ray.get(self._actor.__ray_call__.remote(lambda _: os.getpid())))
                os.kill(killed[0], signal.SIGKILL)
            return super().do(what, name)

    try:
        with Progress() as progress:
            found = sweep(plans, [lambda: Watched(1, 0)] * 2, progress)
    finally:
        ray.shutdown()
    assert killed
    assert found == []
    assert open_study(tmp_path / "out").sizes["cell"] == 4
    with xr.open_datatree(next((tmp_path / "out").glob("*/cells/[!.]*.nc"))) as cell:
        assert "output" in cell.children
