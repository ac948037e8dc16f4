import json

import pytest
from prunescope.probes.items import TaskError
from prunescope.reports.imported import read


def sample(n, right, **more):
    return {
        "doc_id": n, "doc_hash": f"h{n}", "prompt_hash": f"p{n}", "target": "0",
        "arguments": {"gen_args_0": {"arg_0": f"Q{n}", "arg_1": " a"}, "gen_args_1": {"arg_0": f"Q{n}", "arg_1": " b"}},
        "resps": [[["-1.0", "False"]], [["-2.0", "False"]]], "filtered_resps": [["-1.0", "False"]],
        "filter": "none", "acc": 1 - right, "acc_norm": right, **more,
    }  # fmt: skip


def save(folder, task, rows):
    folder.mkdir(exist_ok=True)
    file = folder / f"samples_{task}_2026-01-01T00-00-00.000000.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in rows), "utf-8")
    return file


@pytest.fixture
def folders(tmp_path):
    files = [
        save(tmp_path / "dense", "arc_easy", [sample(n, 1.0) for n in range(20)]),
        save(tmp_path / "small", "arc_easy", [sample(n, float(n < 10)) for n in reversed(range(25))]),
    ]  # fmt: skip
    for side, right in (("dense", 1.0), ("small", 0.0)):
        rows = []
        for n in range(6):
            written = sample(n, right, resps=[["so 6"]], exact_match=right)
            del written["acc"], written["acc_norm"]
            rows += [{**written, "filter": "strict-match", "exact_match": 0.0},
                     {**written, "filter": "flexible-extract"}]  # fmt: skip
        files.append(save(tmp_path / side, "gsm8k", rows))
    return tmp_path, files


def test_scores_are_paired_by_document(folders):
    folder, files = folders
    cells = read(files, folder / "dense")
    assert list(cells) == ["small"]
    scores = cells["small"]["scores"].to_dataset()
    part = scores.isel(item=scores.task.values == "arc_easy")
    assert part.sizes["item"] == 20
    assert part.format.values.tolist() == ["choice"] * 20
    assert part.chance.values.tolist() == [0.5] * 20
    assert part.score.values.tolist() == [[1.0, float(n < 10)] for n in range(20)]
    sums = scores.isel(item=scores.task.values == "gsm8k")
    assert sums.score.values.tolist() == [[1.0, 0.0]] * 6, "the number that was found anywhere"
    assert set(sums.format.values) == {"generation"}


def test_the_command_writes_cells_and_a_report(folders, tmp_path, monkeypatch, capsys):
    from prunescope.reports import cli

    folder, files = folders
    out = tmp_path / "out"
    argv = [
        "prunescope",
        "import-lm-eval",
        *map(str, files),
        "--dense",
        str(folder / "dense"),
        "--out",
        str(out),
    ]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert (out / "cells" / "small.nc").is_file()
    assert "arc_easy" in (out / "report.html").read_text("utf-8")


def test_what_cannot_be_paired_is_refused(folders):
    folder, files = folders
    with pytest.raises(TaskError, match="none of the files lies there"):
        read(files, folder / "elsewhere")
    with pytest.raises(TaskError, match="a candidate's are needed too"):
        read([f for f in files if f.parent.name == "dense"], folder / "dense")
    with pytest.raises(TaskError, match=r"samples_TASK_DATE"):
        read([folder / "x.jsonl"], folder)
    bad = save(folder / "bad", "arc_easy", [{"doc_id": 1}])
    with pytest.raises(TaskError, match=r":1: a sample needs"):
        read([*files, bad], folder / "dense")
    other = save(folder / "other", "arc_easy", [sample(0, 1.0, doc_hash="x")])
    with pytest.raises(TaskError, match="doc_hash differs"):
        read([*files, other], folder / "dense")
