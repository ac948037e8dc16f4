"""The report: complete, escaped, offline, small, and the same data for programs."""

import json
import re
from html.parser import HTMLParser

import pytest
from prunescope.analysis import diagnose
from prunescope.reports import render
from prunescope.reports.figures import draw
from test_analysis import make_cell


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    cells = {"mlp-drop@3": make_cell(), "rtn@int4": make_cell("rtn@int4")}
    file = render(cells, folder / "report.html")
    return cells, file, file.read_text("utf-8")


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.stack, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "link"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_well_formed_and_opens_with_the_verdict(rendered):
    reader = Reader()
    reader.feed(rendered[2])
    assert reader.stack == []
    text = " ".join("".join(reader.text).split())
    assert text.index("keeps multiple choice") < text.index("What survives, task by task")


def test_every_picture_says_what_it_shows(rendered):
    reader = Reader()
    reader.feed(rendered[2])
    images = [a for t, a in reader.tags if t == "img"]
    assert len(images) == 7  # retention, theory, validity; layers and decoding of two cells
    for image in images:
        assert len(image["alt"]) > 40
        assert image["src"].startswith("data:image/svg+xml;base64,")


def test_nothing_comes_from_the_network_and_it_is_small(rendered):
    page = rendered[2]
    assert len(page) < 3_000_000
    assert not re.search(r'(src|href)="(?!data:|#|answers/)', page)
    assert "@import" not in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    assert 'name="viewport"' in page


def test_model_text_is_escaped(rendered):
    page = rendered[2]
    for raw in ("<script", "<img src=x", "<b>prompt"):
        assert raw not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "{{ 7 * 7 }}" in page


def test_the_summary_is_json_with_every_finding(rendered):
    cells, file, _ = rendered
    summary = json.loads((file.parent / "summary.json").read_text())
    assert [f["claim"] for f in summary["findings"]] == [f.claim for f in diagnose(cells)]
    assert set(summary["cells"]) == set(cells)
    assert summary["cells"]["rtn@int4"]["provenance"]["recipe"] == "rtn@int4"


def test_figures_are_files_too_and_the_same_every_time(rendered):
    cells, file, _ = rendered
    names = {p.name for p in (file.parent / "figures").iterdir()}
    pictures = draw(cells)
    assert names == {f"{p.name}.svg" for p in pictures}
    assert {p.name: p.svg for p in draw(cells)} == {p.name: p.svg for p in pictures}


def test_a_cell_with_fewer_groups_still_renders(tmp_path):
    import xarray as xr

    whole = make_cell()
    for group in ("shifts", "scores", "steps", "cost", "output"):
        part = {n: c.to_dataset() for n, c in whole.children.items() if n != group}
        cell = xr.DataTree.from_dict(
            {"/": whole.to_dataset(), **{f"/{n}": d for n, d in part.items()}}
        )
        assert render({"x": cell}, tmp_path / group / "report.html").exists()


def test_many_cells_stand_in_rows_of_four(tmp_path):
    cells = {f"a-cell-of-a-long-name-{i}@0.5,target=counting": make_cell() for i in range(6)}
    (picture,) = (p for p in draw(cells) if p.name == "retention")
    wide = float(re.search(rb'width="([0-9.]+)pt"', picture.svg)[1])
    assert wide < 12 * 72


def test_solved_examples_are_left_out_of_the_answers():
    from prunescope.probes.items import without_examples

    shots = "1 + 1 = 2\n2 + 2 = 4\n"
    assert without_examples([f"{shots}3 + 4 =", f"{shots}3 + 5 ="]) == ["3 + 4 =", "3 + 5 ="]
    assert without_examples([shots]) == [shots]
    assert without_examples([shots, shots]) == [shots, shots]


def test_every_answer_of_both_models_is_a_page_away(rendered):
    cells, file, page = rendered
    links = re.findall(r'href="(answers/[^"]+)"', page)
    assert len(links) == len(cells)
    for link, cell in zip(links, cells.values(), strict=True):
        text = (file.parent / link).read_text("utf-8")
        reader = Reader()
        reader.feed(text.replace('<input type="radio"', "<br"))
        assert reader.stack == []
        rows = re.findall(r'<tr class="item (\w+)"', text)
        assert len(rows) == cell["scores"].sizes["item"]
        dense, candidate = cell["scores"].score.values.T == 1
        assert rows.count("lost") == int((dense & ~candidate).sum()) > 0
        assert rows.count("kept") == int((dense & candidate).sum())
        assert f'href="../{file.name}"' in text
        for raw in ("<script", "<img src=x", "<b>prompt"):
            assert raw not in text
