"""The command line, as a user meets it: real processes on a tiny model."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xarray as xr
from prunescope.probes import sandbox
from prunescope.reports.cli import main
from prunescope.reports.progress import Progress

COMMAND = [sys.executable, "-c", "from prunescope.reports.cli import main; main()"]


def run(*arguments, **options):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=environment, **options
    )


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    import architectures

    folder = tmp_path_factory.mktemp("model") / "tiny"
    model = architectures.build("llama")
    model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


CODE = json.dumps(
    {
        "task": "HumanEval", "id": "h/0", "style": "completion", "prompt": "def f(x):\n",
        "test": "assert f(2) == 4", "entry_point": "f", "canonical_solution": "    return 2 * x",
    }
)  # fmt: skip
SMALL = ("--tasks", "plurals", "--limit", "6", "--steps", "4")


@pytest.fixture(scope="module")
def study(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "out"
    done = run(
        "diagnose", tiny_folder, "-r", "mlp-drop@1", "-r", "rtn@int4-g16", *SMALL, "--out", out
    )
    assert done.returncode == 0, done.stderr
    return out, done


def test_diagnose_writes_what_the_readme_says(study):
    out, done = study
    assert done.stdout.strip() == str(out / "report.html")
    assert sorted(p.name for p in (out / "cells").iterdir()) == ["mlp-drop@1.nc", "rtn@int4-g16.nc"]
    assert {p.suffix for p in (out / "figures").iterdir()} == {".svg"}
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["cells"]) == ["mlp-drop@1", "rtn@int4-g16"]
    with xr.open_datatree(out / "cells" / "mlp-drop@1.nc") as cell:
        assert set(cell.children) == {
            "shifts", "output", "shape", "scores", "steps", "temperatures", "patches", "memory", "cost",
            "summary",
        }  # fmt: skip
        versions = json.loads(cell.attrs["versions"])
        assert versions["torch"]
        assert cell.attrs["schema"] == "1"
        assert len(cell.attrs["weights"]) == len(cell.attrs["prompts"]) == 64
        assert json.loads(cell.attrs["achieved"])["dropped"] == {
            "mlp": [json.loads(cell.attrs["achieved"])["dropped"]["mlp"][0]]
        }
        assert cell["scores"].sizes["item"] == 12
    assert "mlp-drop@1: states, every layer" in done.stderr


def test_the_same_command_reuses_what_is_there(study, tiny_folder):
    out, _ = study
    before = {p: p.stat().st_mtime_ns for p in (out / "cells").iterdir()}
    done = run(
        "diagnose", tiny_folder, "-r", "mlp-drop@1", "-r", "rtn@int4-g16", *SMALL, "--out", out
    )
    assert done.returncode == 0, done.stderr
    assert "all 2 cells are there already" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in (out / "cells").iterdir()} == before


def test_another_recipe_joins_the_study(study, tiny_folder):
    out, _ = study
    done = run("diagnose", tiny_folder, "-r", "magnitude@0.2", *SMALL, "--out", out)
    assert done.returncode == 0, done.stderr
    assert list(json.loads((out / "summary.json").read_text())["cells"]) == [
        "mlp-drop@1",
        "rtn@int4-g16",
        "magnitude@0.2",
    ]


def test_texts_can_be_drawn_and_another_way_of_decoding_is_another_study(
    study, tiny_folder, tmp_path
):
    drawn = ("--sampled", "--temperature", "0.7")
    done = run("diagnose", tiny_folder, "-r", "mlp-drop@1", *SMALL, *drawn, "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    with xr.open_datatree(tmp_path / "o" / "cells" / "mlp-drop@1.nc") as cell:
        assert cell["steps"].attrs["decoding"] == "sampled at T = 0.7, seed 24652"
    done = run("diagnose", tiny_folder, "-r", "mlp-drop@1", *SMALL, *drawn, "--out", study[0])
    assert done.returncode == 2
    assert "sampled False there, True asked" in done.stderr


def test_code_runs_only_when_allowed_and_prompts_go_through_the_chat_template(
    tiny_folder, tmp_path
):
    from transformers import AutoTokenizer

    try:
        sandbox.require()
    except sandbox.SandboxError as error:
        pytest.skip(str(error))
    chat = tmp_path / "chat"
    shutil.copytree(tiny_folder, chat)
    tokenizer = AutoTokenizer.from_pretrained(chat)
    tokenizer.chat_template = "{% for m in messages %}ASK {{ m.content }} SAY{% endfor %}"
    tokenizer.save_pretrained(chat)
    (tmp_path / "humaneval.jsonl").write_text(CODE)
    done = run(
        "diagnose", chat, "-r", "mlp-drop@1", "--data", tmp_path, "--tasks", "humaneval,plurals",
        "--limit", "6", "--steps", "4", "--causes", "0", "--chat", "--allow-code-execution", "--out", tmp_path / "o",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with xr.open_datatree(tmp_path / "o" / "cells" / "mlp-drop@1.nc") as cell:
        scores = cell["scores"].to_dataset().load()
        request = json.loads(cell.attrs["request"])
    assert request["chat"]
    assert request["allow_code_execution"]
    asked = scores.prompt_text.values[scores.format.values == "generation"]
    assert [str(p).startswith("ASK ") for p in asked] == [False] + [True] * 6
    assert not any(
        "ASK" in str(p) for p in scores.prompt_text.values[scores.format.values == "choice"]
    )


def test_steps_past_the_context_are_refused(tiny_folder, tmp_path):
    long = ("--tasks", "plurals", "--limit", "6", "--steps", "4000")
    done = run("diagnose", tiny_folder, "-r", "mlp-drop@1", *long, "--out", tmp_path / "o")
    assert done.returncode == 2
    assert "passes the context" in done.stderr
    assert not (tmp_path / "o").exists()


def test_report_renders_again_from_several_runs(study, tmp_path):
    out, _ = study
    done = run("report", out, out, "--out", tmp_path / "again.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "again.html").read_text()
    assert "mlp-drop@1 (out)" in page


def test_compress_saves_and_compare_reads_it(tiny_folder, tmp_path):
    done = run("compress", tiny_folder, "-r", "attn-drop@1", "--out", tmp_path / "candidate")
    assert done.returncode == 0, done.stderr
    assert re.search(r"attn-drop@1.*: 9\d\.\d% of the parameters, 0\.0% of them zero", done.stderr)
    done = run("compare", tiny_folder, tmp_path / "candidate", *SMALL, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (cell,) = (tmp_path / "out" / "cells").iterdir()
    with xr.open_datatree(cell) as data:
        assert "shifts" in data.children
        assert float(data["output"].kl.max()) > 0
    done = run(
        "diagnose", tmp_path / "candidate", "-r", "rtn@int8", *SMALL, "--out", tmp_path / "more"
    )
    assert done.returncode == 0, "a candidate can be diagnosed in turn: " + done.stderr


def test_recover_trains_and_compare_says_what_came_back(tiny_folder, tmp_path):
    cut, back, tuned = (tmp_path / name for name in ("cut", "back", "tuned"))
    recipe = "neurons-reverse@0.5,target=plurals"
    done = run("compress", tiny_folder, "-r", recipe, "--limit", "6", "--out", cut)
    assert done.returncode == 0, done.stderr
    assert (cut / "neurons.nc").is_file()
    for source, out in ((cut, back), (tiny_folder, tuned)):
        done = run(
            "recover", source, "--on", "kinds", "--steps", "10", "--limit", "6", "--out", out
        )
        assert done.returncode == 0, done.stderr
        assert "loss of texts held out" in done.stderr
        assert not out.with_name(f"{out.name}.training").exists()
    asked = ("--tasks", "kinds,plurals", "--limit", "6", "--steps", "4", "--causes", "0")
    done = run("compare", tiny_folder, cut, back, tuned, *asked, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "report.html").read_text()
    assert "What training brought back" in page
    assert "before and after training (lora, 10 steps)" in page
    many = ("--tasks", "kinds", "--steps", "4", "--causes", "0")
    done = run("compare", tiny_folder, back, *many, "--out", tmp_path / "other")
    assert done.returncode == 2
    assert "have ranked the neurons of" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("diagnose", "MODEL", "-r", "mpl-drop@1", "--out", "OUT"), "did you mean 'mlp-drop@3'"),
        (("diagnose", "MODEL", "-r", "mlp-drop@9", "--out", "OUT"), "1 to 2 can be dropped"),
        (("diagnose", "MODEL", "-r", "magnitude@1.5", "--out", "OUT"), "between 0 and 1"),
        (
            ("diagnose", "nowhere/at/all", "-r", "rtn@int8", "--out", "OUT"),
            "no such file or folder",
        ),
        (
            ("diagnose", "MODEL", "-r", "rtn@int8", "--tasks", "plural", "--out", "OUT"),
            "nearest: plurals",
        ),
        (
            ("diagnose", "MODEL", "-r", "rtn@int8", "--data", "nodata", "--out", "OUT"),
            "--data nodata: no such folder",
        ),
        (
            ("diagnose", "MODEL", "-r", "rtn@int8", "--prompts", "EMPTY", "--out", "OUT"),
            "no text in it",
        ),
        (
            ("diagnose", "MODEL", "-r", "rtn@int8", "--prompts", "none.txt", "--out", "OUT"),
            "no such file",
        ),
        (
            ("diagnose", "MODEL", "-r", "rtn@int8", "--temperature", "0", "--out", "OUT"),
            "must be above 0",
        ),
        (("diagnose", "MODEL", "-r", "rtn@int8", "--limit", "0", "--out", "OUT"), "at least 1"),
        (("diagnose", "MODEL", "-r", "rtn@int8", "--causes", "-1", "--out", "OUT"), "0 (not done)"),
        (
            (
                "diagnose",
                "MODEL",
                "-r",
                "rtn@int8",
                "--causes",
                "0",
                "--repair",
                "2",
                "--out",
                "OUT",
            ),
            "--repair gives back what --causes blames",
        ),
        (
            ("diagnose", "MODEL", "-r", "rtn@int8", "--calibration", "nowhere.txt", "--out", "OUT"),
            "no name of a dataset",
        ),
        (("diagnose", "MODEL", "-r", "bitsandbytes@fp4", "--out", "OUT"), "not nf4 or int8"),
        (("diagnose", "MODEL", "-r", "torchao@int4", "--out", "OUT"), "which 64 does not divide"),
        (
            ("diagnose", "MODEL", "-r", "rtn@int8", "--dtype", "int3", "--out", "OUT"),
            "not one of float32",
        ),
        (
            ("diagnose", "MODEL", "-r", "rtn@int8", "--device", "warp:9", "--out", "OUT"),
            "cannot be used",
        ),
        (("diagnose", "MODEL", "-r", "rtn@int8", "-r", "rtn@int8", "--out", "OUT"), "given twice"),
        (
            (
                "diagnose",
                "MODEL",
                "-r",
                "rtn@int8",
                "--data",
                "BAD",
                "--tasks",
                "bad",
                "--out",
                "OUT",
            ),
            "bad.jsonl:2",
        ),
        (("diagnose", "MODEL", "-r", "rtn@int8", "--out", "FULL"), "holds something else"),
        (
            (
                "diagnose",
                "MODEL",
                "-r",
                "rtn@int8",
                "--data",
                "CODE",
                "--tasks",
                "humaneval",
                "--out",
                "OUT",
            ),
            "give --allow-code-execution to run them in a sandbox",
        ),
        (
            ("diagnose", "MODEL", "-r", "rtn@int8", "--tasks", "plurals", "--chat", "--out", "OUT"),
            "has no chat template; leave --chat out",
        ),
        (("diagnose", "MODEL", "--out", "OUT"), "Missing option"),
        (("compress", "MODEL", "-r", "rtn@int8", "--out", "FULL"), "not empty"),
        (("report", "FULL", "--out", "x.html"), "no study.json"),
        (
            ("recover", "MODEL", "--on", "kinds", "--method", "prompt", "--out", "OUT"),
            "not one of lora",
        ),
        (
            ("recover", "MODEL", "--on", "kinds", "--limit", "999", "--out", "OUT"),
            "to rank neurons by",
        ),
        (("recover", "MODEL", "--on", "kind", "--out", "OUT"), "nearest: kinds"),
        (
            (
                "diagnose",
                "MODEL",
                "-r",
                "neurons-reverse@0.1,target=kinds",
                "--tasks",
                "kinds",
                "--out",
                "OUT",
            ),
            "score fewer (--limit)",
        ),
        (("list", "recipe"), "not one of recipes"),
    ],
)
def test_unusable_input_ends_with_status_2_before_any_work(
    tiny_folder, tmp_path, arguments, message, monkeypatch, capfd
):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "theirs.txt").write_text("keep me")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "bad.jsonl").write_text('{"question": "q", "answer": "a"}\n{"question": \n')
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "humaneval.jsonl").write_text(CODE)
    names = {
        "CODE": tmp_path / "code",
        "MODEL": tiny_folder,
        "OUT": tmp_path / "out",
        "EMPTY": tmp_path / "empty.txt",
        "FULL": tmp_path / "full",
        "BAD": tmp_path / "bad",
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["prunescope", *(str(names.get(a, a)) for a in arguments)])
    with pytest.raises(SystemExit) as ended:  # in this process: it takes the imports once
        main()
    error = capfd.readouterr().err
    assert ended.value.code == 2, error
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["theirs.txt"]


def test_a_random_model_gets_every_figure_too(study):
    out, _ = study
    drawn = {picture.stem.split("-")[0] for picture in (out / "figures").glob("*.svg")}
    assert {"theory", "validity", "layers"} <= drawn


def test_a_folder_with_another_study_is_left_alone(study, tiny_folder):
    out, _ = study
    before = sorted(p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file())
    done = run("diagnose", tiny_folder, "-r", "mlp-drop@1", *SMALL, "--seed", "7", "--out", out)
    assert done.returncode == 2
    assert "holds another study (seed 24652 there, 7 asked)" in done.stderr
    assert sorted(p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()) == before


@pytest.fixture
def interruptible():
    """As in the foreground of a terminal, wherever the tests run."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_keeps_finished_cells_and_the_same_command_resumes(
    interruptible, tiny_folder, tmp_path
):
    out = tmp_path / "out"
    recipes = [x for n in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6) for x in ("-r", f"magnitude@{n}")]
    arguments = ["diagnose", str(tiny_folder), *recipes, "--tasks", "counting", "--out", str(out)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*COMMAND, *arguments], stderr=subprocess.PIPE, text=True, env=environment
    )
    for _ in range(600):
        if list(out.glob("cells/magnitude*.nc")) or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "finished cells are kept" in error
    kept = {p.name: p.stat().st_mtime_ns for p in out.glob("cells/*.nc")}
    assert 1 <= len(kept) < 6
    assert not list(out.glob("cells/.*")), "nothing half-written stays"
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("cells/*.nc"))) == 6
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("cells/*.nc") if p.name in kept} == kept


def test_a_run_in_the_background_goes_on_ignoring_ctrl_c(interruptible):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Progress():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_swallowed_ctrl_c_is_raised_again(interruptible):
    with Progress() as progress, progress.task("work") as tick:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            tick(0.5)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_help_of_every_verb_suffices():
    top = run("--help").stdout
    for verb in ("diagnose", "compare", "compress", "recover", "report", "list"):
        assert verb in top
        text = run(verb, "--help").stdout
        assert "Exit status" in text
        assert len(text.splitlines()) > 8
    options = run("diagnose", "--help").stdout
    for option in (
        "--recipe",
        "--tasks",
        "--data",
        "--prompts",
        "--limit",
        "--steps",
        "--temperature",
        "--seed",
        "--dtype",
        "--device",
        "--out",
    ):
        assert option in options
    assert run("--version").stdout.startswith("0.")


def test_list_has_one_line_each():
    text = run("list").stdout
    for name in (
        "attn-drop@5",
        "rtn@int4-g64",
        "capitals",
        "addition",
        "kl_reverse",
        "third_cumulant",
    ):
        assert name in text
    assert "capitals" not in run("list", "recipes").stdout


def test_failures_that_are_not_the_users_end_with_status_1(study, tmp_path):
    out, _ = study
    done = run("report", out, "--out", "/proc/no/report.html")
    assert done.returncode == 1
    assert "PRUNESCOPE_DEBUG=1" in done.stderr


def test_study_paths_are_relative_to_where_the_user_is(tiny_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("The cat sat on the mat.\nParis is\n")
    done = run(
        "diagnose",
        tiny_folder,
        "-r",
        "rtn@int4-g16",
        *SMALL,
        "--prompts",
        "prompts.txt",
        "--calibration",
        "prompts.txt",
        "--out",
        "here",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    with xr.open_datatree(Path(tmp_path / "here" / "cells" / "rtn@int4-g16.nc")) as cell:
        assert cell["output"].sizes["prompt"] == 2
