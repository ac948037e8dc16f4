"""The packaging: what is built is what is in the tree."""

import subprocess
import sys
import zipfile
from pathlib import Path

FOLDERS = ("probes", "analysis", "reports")


def test_the_wheel_holds_the_tree(root: Path, tmp_path):
    source = tmp_path / "source"
    tracked = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-co", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    for name in filter(None, tracked):
        if (root / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((root / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(source)],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("prunescope/")}
    tree = {
        f"prunescope/{f.relative_to(source)}"
        for folder in FOLDERS for f in (source / folder).rglob("*") if f.is_file()
    }  # fmt: skip
    assert packed == tree


def test_every_function_is_short_and_every_public_one_explained(root: Path):
    import ast

    for folder in FOLDERS:
        for file in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.FunctionDef):
                    where = f"{file.name}:{node.lineno} {node.name}"
                    assert node.end_lineno - node.lineno < 80, where
                    if not node.name.startswith("_") and node.col_offset == 0:
                        assert ast.get_docstring(node), where


def test_no_utils_and_no_base_classes(root: Path):
    names = {f.stem for folder in FOLDERS for f in (root / folder).rglob("*.py")}
    assert not names & {"utils", "helpers", "core", "base", "manager"}
