"""What an installed adaptc looks like: its files, its names, what importing it costs, and how large its sources are."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import adaptc

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"adaptc": "adaptc", "passes": "adaptc/passes", "kernels": "adaptc/kernels"}
SUFFIXES = (".py", ".pyi")
MAX_BYTES = 20480


def _python(code: str, cwd: Path) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, check=True, capture_output=True, text=True).stdout


def _source_files() -> list[Path]:
    return sorted(f for folder in SOURCES for f in (ROOT / folder).rglob("*.py"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a wheel built from a source distribution, away from the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, source)
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = source / "out"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_every_folder_of_the_source_is_listed_as_a_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {folder: {f.parent for f in (ROOT / folder).rglob("*.py")} for folder in SOURCES}
    expected = {
        ".".join((target, *at.relative_to(ROOT / folder).parts)).replace("/", ".")
        for folder, target in SOURCES.items()
        for at in folders[folder]
    }
    assert set(listed) == expected


@pytest.mark.long
def test_wheel_holds_every_source_file_under_adaptc(wheel: list[str]) -> None:
    at = {ROOT / folder: target for folder, target in SOURCES.items()}
    files = {f: root for root in at for f in root.rglob("*") if f.suffix in SUFFIXES}
    expected = {f"{at[root]}/{f.relative_to(root).as_posix()}" for f, root in files.items()}
    assert {"adaptc/passes/__init__.py", "adaptc/kernels/__init__.py", "adaptc/methods/__init__.py"} <= expected
    assert {n for n in wheel if n.endswith(SUFFIXES)} == expected
    assert {"adaptc/py.typed", "adaptc/methods/_rooms_above.pyi"} <= {*wheel}


@pytest.mark.long
def test_wheel_installs_nothing_else_at_the_top(wheel: list[str]) -> None:
    top = {n.split("/")[0] for n in wheel}
    assert top == {"adaptc", f"adaptc-{adaptc.__version__}.dist-info"}


@pytest.mark.long
def test_subpackages_import_from_anywhere(tmp_path: Path) -> None:
    code = "import adaptc.passes, adaptc.kernels; print(adaptc.passes.__name__, adaptc.kernels.__name__)"
    assert _python(code, tmp_path).split() == ["adaptc.passes", "adaptc.kernels"]


def test_a_checkout_does_not_hide_the_kernels_of_hugging_face() -> None:
    """transformers imports names from that distribution, and a checkout has a folder of its name."""
    origin = str(importlib.metadata.distribution("kernels").locate_file("kernels"))
    for code in ("import kernels", "import adaptc.kernels, kernels", "import kernels, adaptc.kernels"):
        assert _python(f"{code}; print(kernels.__path__[0], callable(kernels.get_kernel))", ROOT).split() == [
            origin,
            "True",
        ]


def test_installed_version_is_the_one_in_the_source() -> None:
    assert importlib.metadata.version("adaptc") == adaptc.__version__


@pytest.mark.parametrize("name", adaptc.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(adaptc, name) is not None
    assert name in dir(adaptc)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = adaptc.no_such_name


def test_console_script_resolves() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="adaptc")
    assert callable(script.load())


def test_importing_adaptc_loads_only_the_standard_library(tmp_path: Path) -> None:
    """An import is quick because of what it leaves out. Seconds depend on the machine; a list of modules does not."""
    code = (
        "import sys, json; before = set(sys.modules); import adaptc;"
        "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"
    )
    loaded = set(json.loads(_python(code, tmp_path)))
    assert loaded - set(sys.stdlib_module_names) == {"adaptc"}


def test_source_files_are_small() -> None:
    large = {f.relative_to(ROOT).as_posix(): f.stat().st_size for f in _source_files() if f.stat().st_size > MAX_BYTES}
    assert not large, f"more than {MAX_BYTES} bytes; one idea each, so split these: {large}"
