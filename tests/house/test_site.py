"""The site: links lead where they lead on GitHub, and building it fails on a broken link or a missing docstring."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.public import ROOT, Source
from tests.house.site.pages import guide_pages, reference_pages

COPIED = ("adaptc", "passes", "kernels", "tests", "examples")


def test_links_to_files_lead_to_their_pages(tmp_path: Path) -> None:
    (tmp_path / "examples" / "cpp").mkdir(parents=True)
    (tmp_path / "examples" / "cpp" / "main.cpp").write_text("int main() {}\n")
    (tmp_path / "examples" / "a.md").write_text(
        "[code](cpp/main.cpp) [home](../README.md#top) [folder](cpp) [gone](gone.md) [far](https://example.org/a.py)\n"
        "```text\n[code](cpp/main.cpp)\n```\n"
    )
    (tmp_path / "README.md").write_text("[guide](examples/a.md) [below](#here)\n")
    pages = guide_pages(tmp_path)
    assert pages["examples/a.md"] == (
        "[code](cpp/main.cpp.md) [home](../README.md#top) [folder](cpp/index.md) [gone](gone.md) "
        "[far](https://example.org/a.py)\n```text\n[code](cpp/main.cpp)\n```\n"
    )
    assert pages["README.md"] == "[guide](examples/a.md) [below](#here)\n"
    assert "int main() {}" in str(pages["examples/cpp/main.cpp.md"])
    assert "`main.cpp`" in str(pages["examples/cpp/index.md"])


def test_pictures_stay_pictures(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    contents = {"examples/points.svg": b"<svg/>\n", "examples/discs.png": b"\x89PNG\r\n\xff"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    text = "![points](examples/points.svg) ![discs](examples/discs.png)\n"
    (tmp_path / "README.md").write_text(text)
    assert guide_pages(tmp_path) == {"README.md": text, **contents}


def test_every_public_name_is_on_one_page() -> None:
    code = Source()
    pages = reference_pages(code)
    for package in (
        "adaptc",
        "adaptc.training",
        "adaptc.prefixes",
        "adaptc.engines",
        "adaptc.exporters",
        "adaptc.methods",
        "adaptc.debug",
    ):
        for public in code.names(package):
            assert [name for name, text in pages.items() if f"::: {public.path}\n" in text], public.path
            assert f"[{public.path}]" in pages["reference/index.md"]


def build(root: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a copy of the project."""
    subprocess.run(["make", "-s", "tree"], cwd=root, check=True)
    command = [sys.executable, "-m", "tests.house.site"]
    # Without the paths of this process, or the copy would be built by the tests of the original.
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the files that the site is made of."""
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
    for file in (*ROOT.glob("*.md"), ROOT / "LICENSE", ROOT / "Makefile"):
        shutil.copy(file, tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_site_is_built(copy: Path) -> None:
    done = build(copy)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in ("index.html", "examples/methods.html", "reference/functions.html", "passes/graph/ops.py.html"):
        assert (copy / "build" / "docs" / page).is_file()
    picture = (copy / "build" / "docs" / "examples" / "pictures.png").read_bytes()
    assert picture == (ROOT / "examples" / "pictures.png").read_bytes()
    text = (copy / "build" / "docs" / "reference" / "functions.html").read_text(encoding="utf-8")
    assert 'id="adaptc.swap"' in text
    assert ":class:`" not in text


LINKS = {
    "a file": ("examples/methods.md", "(prompts.md)", "(promts.md)", "promts.md"),
    "a heading": ("examples/training.md", "(#trl)", "(#trll)", "#trll"),
    "a public name": ("adaptc/debug.py", "Look into", "[Look][adaptc.look] into", "adaptc.look"),
}
DOCSTRINGS = {
    "a parameter": (
        "adaptc/api/reporting.py",
        "        changes: whether",
        "        change: whether",
        "Args: does not describe changes",
    ),
    "a class": (
        "adaptc/errors.py",
        '    """An error for a pass that left an invalid program: a bug in the pass, never in the model."""\n',
        "    pass\n",
        "adaptc.PassError: no docstring",
    ),
}


def plant(root: Path, file: str, old: str, new: str) -> None:
    text = (root / file).read_text(encoding="utf-8")
    assert old in text
    (root / file).write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.slow
def test_links_to_nothing_fail_the_build(copy: Path) -> None:
    for file, old, new, _ in LINKS.values():
        plant(copy, file, old, new)
    done = build(copy)
    assert done.returncode != 0
    for *_, said in LINKS.values():
        assert said in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("what", list(DOCSTRINGS))
def test_a_missing_docstring_fails_the_build(what: str, copy: Path) -> None:
    *planted, said = DOCSTRINGS[what]
    plant(copy, *planted)
    done = build(copy)
    assert done.returncode != 0
    assert said in done.stdout
