"""Documentation is run: docstring examples, the README's Python, its tree and its commands."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

FOLDERS = ("probes", "analysis", "reports")


def test_docstring_examples(root: Path):
    tried = 0
    for folder in FOLDERS:
        for file in (root / folder).rglob("*.py"):
            if "__" not in file.stem:
                module = importlib.import_module(f"prunescope.{folder}.{file.stem}")
                result = doctest.testmod(module)
                assert result.failed == 0, file
                tried += result.attempted
    assert tried >= 1


def readme(root: Path) -> str:
    return (root / "README.md").read_text("utf-8")


def test_the_readmes_tree_is_the_tree(root: Path):
    text = readme(root)
    named = set(re.findall(r"^\s+([a-z_0-9]+\.py) ", text, re.M))
    there = {f.name for folder in FOLDERS for f in (root / folder).glob("*.py")} - {"__init__.py"}
    assert named == there


def test_the_readme_names_every_verb_recipe_and_twin(root: Path):
    from prunescope.probes.recipe import METHODS
    from prunescope.probes.twins import TWINS

    text = readme(root)
    for name in (
        "make demo",
        "make test",
        *METHODS,
        *TWINS,
        "prunescope diagnose",
        "prunescope compare",
        "prunescope compress",
        "prunescope report",
        "prunescope list",
    ):
        assert name in text, name


@pytest.mark.smollm2
def test_the_readmes_python_runs(root: Path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", readme(root), re.S)
    assert blocks
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert (tmp_path / "runs" / "readme" / "report.html").exists()


def test_ci_runs_the_readmes_test_command(root: Path):
    assert "exec make test" in (root / ".ci" / "run").read_text()
    assert "\nmake test " in readme(root)


def test_pictures_of_the_readme_exist(root: Path):
    for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", readme(root)):
        assert (root / name).is_file(), name
