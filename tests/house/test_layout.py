"""The rules of layout: each is broken on purpose, and found."""

from __future__ import annotations

import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.house.layout import MAX_BYTES, MAX_FILES, MIN_LINES, faults, main, modules

LINES = "\n" * MIN_LINES


def source(root: Path, **files: str) -> dict[str, Path]:
    """Dotted name -> file, of a tree in which double underscores of names stand for folders."""
    for name, text in ({"program/__init__": "", "state/__init__": ""} | files).items():
        path = root / "adaptc" / f"{name.replace('__of__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return modules(root)


def found(root: Path, **files: str) -> list[str]:
    return list(faults(source(root, **files)))


@pytest.mark.long
def test_the_source_as_it_is_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0
    assert "keeps the rules" in capsys.readouterr().out
    assert len(modules()) > 400


def test_two_files_of_one_name_are_found(tmp_path: Path) -> None:
    (fault,) = found(tmp_path, program__of__scale=LINES, state__of__scale=LINES)
    assert fault == "two files are called scale: adaptc.program.scale, adaptc.state.scale"


def test_two_classes_of_one_name_are_found(tmp_path: Path) -> None:
    text = f"class Site: ...\nclass _Own: ...\n{LINES}"
    (fault,) = found(tmp_path, program__of__one=text, state__of__other=text)
    assert fault == "two classes are called Site: adaptc.program.one, adaptc.state.other"


def test_a_folder_of_too_many_files_is_found(tmp_path: Path) -> None:
    files = {f"program__of__file{i}": LINES for i in range(MAX_FILES - 1)}
    assert not found(tmp_path, **files)
    (fault,) = found(tmp_path, **files, program__of__more=LINES)
    assert f"program/ has {MAX_FILES + 1} files" in fault


def test_a_large_file_is_found(tmp_path: Path) -> None:
    (fault,) = found(tmp_path, program__of__large="#" * MAX_BYTES + LINES)
    assert f"large.py has {MAX_BYTES + MIN_LINES} bytes" in fault


def test_a_small_file_for_one_importer_is_found(tmp_path: Path) -> None:
    user = f"from adaptc.state.small import a\n{LINES}"
    (fault,) = found(tmp_path, program__of__user=user, state__of__small="a = 1\n")
    assert fault == "adaptc.state.small has 1 lines and one importer, adaptc.program.user: put it there"
    assert not found(tmp_path, program__of__user=user, program__of__two=f"from adaptc.state import small\n{LINES}")


def test_a_method_may_be_small(tmp_path: Path) -> None:
    assert not found(tmp_path, methods__of__tiny="a = 1\n", methods__of____init__="")


def test_an_attribute_of_another_module_is_not_set(tmp_path: Path) -> None:
    text = f"from adaptc.state.core import Core\nCore.made, Core.found = print, len\n{LINES}"
    faults_found = found(tmp_path, program__of__user=text, state__of__core=f"class Core: ...\n{LINES}")
    assert [f.split(" when")[0] for f in faults_found] == [
        "adaptc.program.user sets Core.made",
        "adaptc.program.user sets Core.found",
    ]


def test_the_top_level_has_what_the_project_is_made_of() -> None:
    """Files of other tools get there unseen by ``git add -A``."""
    root = Path(__file__).resolve().parents[2]
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        found = {name.partition("/")[0] for name in listed.stdout.splitlines()}
    else:  # a copy without git's folder has the project's files, and what a run of it makes
        ignored = [line.strip("/") for line in (root / ".gitignore").read_text().splitlines() if line]
        found = {p.name for p in root.iterdir() if not any(fnmatch(p.name, i) for i in ignored)}
    folders = {"adaptc", "passes", "kernels", "tests", "examples", ".ci"}
    pages = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE"}
    assert found == {*folders, *pages, "pyproject.toml", "Makefile", ".gitignore"}
