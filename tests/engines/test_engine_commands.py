"""The commands `adaptc check` and `adaptc convert`: their exit codes, reports and outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from adaptc.cli import app
from tests.engines.adapter_directories import adapter_directory, model_directory, write_directory

pytestmark = pytest.mark.usefixtures("no_progress_bars")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_check_ends_with_one_where_the_engine_misreads(tmp_path: Path) -> None:
    good, bad = write_directory(tmp_path / "good"), write_directory(tmp_path / "bad", {"use_rslora": True})
    done = run("check", good, "--for", "sglang")
    assert (done.exit_code, "takes it as it is meant" in done.stdout) == (0, True)
    done = run("check", bad, "--for", "sglang", "--json")
    assert (done.exit_code, json.loads(done.stdout)["verdict"]) == (1, "another meaning")
    done = run("check", tmp_path / "nothing", "--for", "sglang")
    assert (done.exit_code, done.stdout, "no adapter directory" in done.stderr) == (1, "", True)
    assert run("check", good).exit_code == 2
    done = run("check", good, "--for", "llama.cpp", "--model", model_directory())
    assert done.exit_code == 0


def test_check_runs_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom adaptc.cli import app\n"
        f"app(['check', {str(write_directory(tmp_path))!r}, '--for', 'vllm'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_convert_writes_what_check_takes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("convert", adapter_directory("patterns"), out, "--for", "sglang")
    assert (done.exit_code, f"wrote {out}" in done.stdout.replace("\n", "")) == (0, True)
    assert run("check", out, "--for", "sglang").exit_code == 0
    done = run("convert", adapter_directory("patterns"), out, "--for", "sglang")
    assert (done.exit_code, "--force replaces it" in done.stderr) == (1, True)
    done = run("convert", adapter_directory("patterns"), out, "--for", "vllm", "--rank", 8, "--force", "--json")
    assert (done.exit_code, json.loads(done.stdout)["rank"]) == (0, 8)
    done = run("convert", adapter_directory("dora"), tmp_path / "dora", "--for", "vllm")
    assert (done.exit_code, "adaptc merge MODEL ADAPTER" in done.stderr) == (1, True)
    done = run("convert", adapter_directory("loha"), tmp_path / "loha", "--for", "vllm", "--model", model_directory())
    assert (done.exit_code, "relative error" in done.stdout) == (0, True)
    gguf = tmp_path / "lora.gguf"
    done = run("convert", adapter_directory("patterns"), "-o", gguf, "--for", "llama.cpp", "--model", model_directory())
    assert (done.exit_code, gguf.read_bytes()[:4]) == (0, b"GGUF")
