"""The command line: files in, files out, errors in one line, and nothing heavy imported to print help."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import adaptc
from adaptc import LoraConfig
from adaptc.cli import app


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


class Files:
    """A program, and a second adapter for it with another rank and fewer sites."""

    def __init__(self, root: Path) -> None:
        torch.manual_seed(0)
        self.root, self.model, self.x = root, Net().eval(), torch.randn(4, 6)
        config = LoraConfig(r=3, target_modules=["layers.0", "layers.1", "layers.2"], init_lora_weights=False)
        self.own = adaptc.compile(self.model, config, example_inputs=self.x)
        self.program = adaptc.save(self.own, root / "program.pt2")
        config = LoraConfig(r=5, lora_alpha=20, target_modules=["layers.1"], init_lora_weights=False)
        self.other = adaptc.compile(self.model, config, example_inputs=self.x)
        self.adapter = adaptc.save_adapter(self.other, root / "adapter")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("cli"))


def call(*args: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "120"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def refused(*args: Any, said: str) -> None:
    """An error of adaptc is one line on stderr, and nothing is written."""
    result = call(*args, code=1)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert re.search(said, lines[0]), lines[0]
    assert "Traceback" not in result.output


def output(path: Path, x: Tensor) -> Tensor:
    return torch.export.load(path).module()(x)


def test_show_a_program(files: Files) -> None:
    out = call("show", files.program).stdout
    assert re.search(r"layers\.\{0\.\.2\} x3 +linear +apply +lora +3 +lora_A\.weight 3x6", out)
    assert re.search(r"head +no entry names it +head", out)
    assert adaptc.report(files.own).parameters_line() in out


def test_show_an_adapter_directory(files: Files) -> None:
    out = call("show", files.adapter).stdout
    assert f"LORA adapter in {files.adapter}: 2 tensors, 60 parameters, 240 B" in out
    assert re.search(r"lora_alpha +20\n", out)
    assert re.search(r"target_modules +layers\.1\n", out)
    assert re.search(r"layers\.1\.lora_B\.weight +6x5 +float32", out)
    assert "rslora" not in out  # at its default


def test_merge(files: Files, tmp_path: Path) -> None:
    result = call("merge", files.program, tmp_path / "m.pt2")
    assert "merged 3 weights (float32)" in result.stdout
    assert f"wrote {tmp_path / 'm.pt2'}" in result.stdout
    merged = output(tmp_path / "m.pt2", files.x)
    assert not torch.allclose(merged, files.model(files.x), atol=1e-3)
    torch.testing.assert_close(merged, files.own(files.x), rtol=1e-5, atol=1e-6)
    assert "The program has no adapter" in call("show", tmp_path / "m.pt2").stdout


def test_merge_another_adapter(files: Files, tmp_path: Path) -> None:
    call("merge", files.program, tmp_path / "m.pt2", "--adapter", files.adapter)
    torch.testing.assert_close(output(tmp_path / "m.pt2", files.x), files.other(files.x), rtol=1e-5, atol=1e-6)


def test_merge_is_safe_unless_told_otherwise(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "inf.pt2"
    program = adaptc.compile(files.model, files.own.binding.config, example_inputs=files.x)
    with torch.no_grad():
        program.state_dict["layers.1.lora_B.default.weight"].mul_(torch.inf)
    adaptc.save(program, path)
    refused("merge", path, tmp_path / "m.pt2", said="not finite")
    assert not (tmp_path / "m.pt2").exists()
    call("merge", path, tmp_path / "m.pt2", "--no-safe")
    assert not torch.isfinite(output(tmp_path / "m.pt2", files.x)).all()


def test_swap(files: Files, tmp_path: Path) -> None:
    before = files.program.read_bytes()
    out = call("swap", files.program, files.adapter, tmp_path / "s.pt2").stdout
    assert f"{files.adapter}: 1 of 3 sites, rank 5" in out
    assert "left at the base: layers.{0,2}.weight" in out
    swapped = adaptc.load(tmp_path / "s.pt2")
    assert torch.equal(swapped(files.x), files.other(files.x))
    assert files.program.read_bytes() == before


def test_unload(files: Files, tmp_path: Path) -> None:
    call("unload", files.program, tmp_path / "u.pt2")
    assert torch.equal(output(tmp_path / "u.pt2", files.x), files.model(files.x))


def test_unload_onto_itself(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "p.pt2"
    path.write_bytes(files.program.read_bytes())
    call("unload", path, path)
    assert torch.equal(output(path, files.x), files.model(files.x))


def test_export_adapter(files: Files, tmp_path: Path) -> None:
    call("export-adapter", files.program, tmp_path / "a", "--base-model", "some/model")
    program = adaptc.compile(files.model, str(tmp_path / "a"), example_inputs=files.x)
    torch.testing.assert_close(program(files.x), files.own(files.x))
    assert "some/model" in call("show", tmp_path / "a").stdout


def test_verify(files: Files) -> None:
    out = call("verify", files.program, "--runs", 4, "--seed", 11).stdout
    assert out.startswith("verified (seed 11)")
    assert "run 4: " in out
    assert re.search(r"merged equals adapted +pass", out)
    out = call("verify", files.program, "--atol", "1e-30", code=1).stdout
    assert "NOT verified: merged equals adapted" in out


def test_errors_are_one_line(files: Files, tmp_path: Path) -> None:
    refused("show", tmp_path / "none.pt2", said="there is no file")
    (tmp_path / "bad.pt2").write_bytes(b"no program")
    refused("show", tmp_path / "bad.pt2", said="cannot be read as an exported program")
    refused("show", tmp_path, said="holds no adapter")
    refused("swap", files.program, tmp_path / "none", tmp_path / "o.pt2", said="none")
    refused("unload", files.program, tmp_path / "no" / "o.pt2", said="does not exist")
    call("unload", files.program, tmp_path / "u.pt2")
    refused("merge", tmp_path / "u.pt2", tmp_path / "o.pt2", said="no adapter")
    refused("export-adapter", tmp_path / "u.pt2", tmp_path / "o", said="no adapter")
    assert not (tmp_path / "o.pt2").exists()


def test_warnings_are_one_line_too(files: Files, tmp_path: Path) -> None:
    directory = tmp_path / "newer"
    directory.mkdir()
    for file in files.adapter.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, "quantum": True}))
    result = call("swap", files.program, directory, tmp_path / "s.pt2")
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("warning: ")
    assert "quantum" in line


def test_version() -> None:
    assert call("--version").stdout == f"adaptc {adaptc.__version__}\n"


def test_unknown_options_are_usage_errors(files: Files) -> None:
    assert "No such option" in call("merge", files.program, "o.pt2", "--fast", code=2).stderr


def test_console_script_and_lazy_imports(tmp_path: Path) -> None:
    """A process of its own: help loads no torch, and an error comes back as the exit code."""
    code = (
        "import sys; from adaptc.cli import main; sys.argv[1:] = ['--help']\n"
        "try: main()\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("show", "merge", "swap", "unload", "export-adapter", "verify"):
        assert re.search(rf"\b{command}\b", done.stdout)
    assert done.stdout.strip().endswith("False")
    done = subprocess.run(
        [sys.executable, "-m", "adaptc.cli", "show", str(tmp_path / "none.pt2")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no file")
    assert len(done.stderr.strip().splitlines()) == 1


def test_faults_of_users_are_no_tracebacks(files: Files, tmp_path: Path) -> None:
    for option, bad in (("--seed", 2**64), ("--seed", -(10**30)), ("--runs", 10**30), ("--runs", 0), ("--atol", "x")):
        call("verify", files.program, option, bad, code=2)
    # A name that is no text, and a config with one: shown with escapes.
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    assert r"\udcff" in call("export-adapter", files.program, odd).stdout
    copy = tmp_path / "a"
    shutil.copytree(files.adapter, copy)
    file = copy / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "\udc80"}))
    assert "LORA" in call("show", copy).stdout
    refused("swap", files.program, copy, tmp_path / "o.pt2", said="can be written as UTF-8")


@pytest.mark.parametrize("change", [{"r": "3"}, {"r": 10**15}, {"lora_alpha": math.inf}, {"rank_pattern": {"x": None}}])
def test_faults_of_configs_are_one_line(files: Files, tmp_path: Path, change: dict[str, Any]) -> None:
    shutil.copytree(files.adapter, tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    refused("swap", files.program, tmp_path / "a", tmp_path / "o.pt2", said=next(iter(change)))
