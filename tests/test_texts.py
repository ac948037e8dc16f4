"""Texts that a user names: files, JSONL rows, datasets."""

import json

import pytest
from prunescope.probes.texts import ROWS, TextError, read_texts


def rows(file, count, field="text"):
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps({field: f"text {i}"}) + "\n" for i in range(count)))
    return file


def test_lines_rows_and_datasets(tmp_path, shared_data):
    (tmp_path / "a.txt").write_text("one\n\n two \n", "utf-8")
    assert read_texts(str(tmp_path / "a.txt")) == ["one", " two "]
    assert read_texts(str(rows(tmp_path / "b.jsonl", 3))) == ["text 0", "text 1", "text 2"]
    assert len(read_texts(str(shared_data / "c4.jsonl"))) == 150
    folder = rows(tmp_path / "set" / "train.jsonl", 200).parent  # as `datasets` reads a folder
    assert read_texts(str(folder)) == [f"text {i}" for i in range(ROWS)]
    rows(folder / "test.jsonl", 2)
    assert read_texts(f"{folder}::test") == ["text 0", "text 1"]


def test_what_cannot_be_read_says_why(tmp_path):
    def bad(match, source):
        with pytest.raises(TextError, match=match):
            read_texts(str(source), "--calibration")

    bad(
        r"--calibration .*: no such file, and no name of a dataset \(NAME:CONFIG:SPLIT\)",
        "nowhere.txt",
    )
    bad("no dataset could be loaded by that name", "nobody/nothing:en")
    (tmp_path / "empty.txt").write_text("\n")
    bad("no text in it", tmp_path / "empty.txt")
    (tmp_path / "raw.txt").write_bytes(b"\xff\xfe\x00")
    bad("not UTF-8", tmp_path / "raw.txt")
    bad(
        r"c.jsonl:1: a field 'text' is needed; there is question",
        rows(tmp_path / "c.jsonl", 1, "question"),
    )
    (tmp_path / "d.jsonl").write_text("{")
    bad(r"d.jsonl:1: not valid JSON", tmp_path / "d.jsonl")
    folder = rows(tmp_path / "other" / "train.jsonl", 2, "content").parent
    bad(r"row 1: a field 'text' is needed; there is content", folder)
