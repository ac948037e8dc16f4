"""Who may import what: a folder is a level of dependency."""

import ast
from pathlib import Path

import pytest

ALLOWED = {
    "analysis": {"analysis": None},
    "probes": {"probes": None, "analysis": {"schema", "formulas", "places"}},
    "reports": {"reports": None, "probes": None, "analysis": None},
}
FOREIGN = {
    "analysis": {
        "torch",
        "transformers",
        "nnsight",
        "datasets",
        "matplotlib",
        "jinja2",
        "typer",
        "rich",
    },
    "probes": {"matplotlib", "jinja2", "typer", "rich"},
    "reports": {"nnsight", "datasets"},
}


def imports(source: str, folder: str) -> list[tuple[str, set[str]]]:
    """(top package or folder, names) of every import, relative ones resolved to their folder."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(a.name.split(".")[0], set()) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            names = {a.name for a in node.names}
            if node.level == 0:
                found.append((parts[0], names))
            elif node.level == 1:
                found.append((folder, names))
            else:
                found.append((parts[0], {parts[1]} if len(parts) > 1 else names))
    return found


def violations(source: str, folder: str) -> list[str]:
    bad = []
    for where, names in imports(source, folder):
        if where in FOREIGN[folder]:
            bad.append(where)
        if where in ALLOWED and where not in ALLOWED[folder]:
            bad.append(where)
        only = ALLOWED[folder].get(where)
        if only is not None and not names <= only:
            bad.append(f"{where}: {names - only}")
    return bad


@pytest.mark.parametrize("folder", list(ALLOWED))
def test_folders_import_in_one_direction(root: Path, folder):
    for file in (root / folder).rglob("*.py"):
        assert violations(file.read_text(), folder) == [], file


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("analysis", "import torch"),
        ("analysis", "from ..probes import load"),
        ("probes", "from ..analysis.findings import diagnose"),
        ("probes", "from ..reports import render"),
        ("reports", "from nnsight import NNsight"),
    ],
)
def test_the_check_can_fail(folder, line):
    assert violations(line, folder)


def test_nnsight_is_spoken_to_in_one_file_only(root: Path):
    users = [f.name for folder in ALLOWED for f in (root / folder).rglob("*.py")
             if any(where == "nnsight" for where, _ in imports(f.read_text(), folder))]  # fmt: skip
    assert users == ["trace.py"]


def test_no_pickles_and_no_remote_code_by_default(root: Path):
    for folder in ALLOWED:
        for file in (root / folder).rglob("*.py"):
            text = file.read_text()
            assert "torch.load(" not in text
            assert "import pickle" not in text
            assert "trust_remote_code=True" not in text.replace(
                "with `trust_remote_code=True`", ""
            ), file
