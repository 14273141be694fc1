"""The rules of the house are enforced: each is broken on purpose in a copy of the sources, and lint must say so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the project's sources and settings."""
    for name in ("adaptc", "passes", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def imports(tree: Path) -> tuple[int, str]:
    subprocess.run(["make", "-s", "tree"], cwd=tree, check=True)
    done = subprocess.run(
        [BIN / "lint-imports", "--config", tree / "pyproject.toml", "--no-cache"],
        cwd=tree / "build" / "tree",
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def ruff(tree: Path) -> tuple[int, str]:
    done = subprocess.run(
        [BIN / "ruff", "check", "--no-cache", "--output-format", "concise", "."],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def plant(tree: Path, file: str, line: str) -> None:
    """Put a line behind the imports of the future."""
    path = tree / file if file.startswith("passes") else tree / "adaptc" / file
    text = path.read_text(encoding="utf-8")
    mark = "from __future__ import annotations\n"
    assert mark in text
    path.write_text(text.replace(mark, f"{mark}\n{line}\n", 1), encoding="utf-8")


def test_the_sources_as_they_are_pass(tree: Path) -> None:
    code, said = imports(tree)
    assert code == 0, said
    assert "0 broken" in said
    code, said = ruff(tree)
    assert code == 0, said


UPWARD = {
    "a pass of methods": ("passes/graph/ops.py", "from adaptc.methods import ModelFacts"),
    "capture of program": ("capture/capture.py", "import adaptc.program.adapted_program"),
    "runtime of binding's user": ("runtime/executor.py", "from adaptc.state.core import ProgramCore"),
    "the protocol of analysis": ("passes/protocol/trace.py", "from adaptc.passes.analysis.sites import Site"),
    "hidden from running code": (
        "adapter_files/directory.py",
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from adaptc.api.adapt_model import compile",
    ),
    "hidden in a function": ("tables.py", "def late():\n    from adaptc.reports.coverage import CoverageReport"),
    "of a neighbour on the same floor": (
        "methods/lora_family/lora.py",
        "from adaptc.adapter_files.format import MemoryMapped",
    ),
}


@pytest.mark.parametrize("name", list(UPWARD))
def test_an_upward_import_is_found(tree: Path, name: str) -> None:
    file, line = UPWARD[name]
    plant(tree, file, line)
    code, said = imports(tree)
    assert code != 0
    assert "BROKEN" in said


def test_a_circle_is_found(tree: Path) -> None:
    plant(tree, "binding/binding.py", "import adaptc.binding.bind")
    code, said = imports(tree)
    assert code != 0
    assert "No circles, at any depth BROKEN" in said


def test_the_facade_is_for_users(tree: Path) -> None:
    plant(tree, "verification/verify.py", "import adaptc")
    code, said = imports(tree)
    assert code != 0
    assert "facade but the command line BROKEN" in said


def test_a_private_module_stays_in_its_package(tree: Path) -> None:
    plant(tree, "targets/plan_layers.py", "from adaptc.methods._shared.registry import CONFIGS")
    code, said = imports(tree)
    assert code != 0
    assert "leading underscore stay in their package BROKEN" in said


RULES = {
    "SLF001": ("reports/coverage.py", "def look(program):\n    return program._run"),
    "TID252": ("state/merge_program.py", "from .core import ProgramCore"),
    "PLC0415": ("binding/bind.py", "def late():\n    import json\n\n    return json"),
    "TID253": ("binding/bind.py", "import transformers"),
}


@pytest.mark.parametrize("rule", list(RULES))
def test_a_broken_rule_is_found(tree: Path, rule: str) -> None:
    plant(tree, *RULES[rule])
    code, said = ruff(tree)
    assert code != 0
    assert rule in said


def test_lint_runs_them_all() -> None:
    done = subprocess.run(["make", "-n", "lint"], cwd=ROOT, capture_output=True, text=True, check=True)
    for tool in ("ruff check", "ruff format --check", "pyright", "lint-imports"):
        assert tool in done.stdout
