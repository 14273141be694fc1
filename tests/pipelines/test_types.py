"""Type checkers know what ``adaptc.compile`` gives: a pipeline of the caller's class, or a program."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
USES = """
from torch import nn
from torch.export import ExportedProgram
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
import adaptc

def use(pipe: FluxPipeline, model: nn.Module, program: ExportedProgram) -> None:
    reveal_type(adaptc.compile(pipe, "lora.safetensors", backend="inductor"))
    reveal_type(adaptc.compile(model, adaptc.LoraConfig(), training=True))
    reveal_type(adaptc.compile(program, "directory"))
"""


@pytest.mark.long
def test_pyright_knows_pipelines_and_programs(tmp_path: Path) -> None:
    (tmp_path / "uses.py").write_text(USES, encoding="utf-8")
    (tmp_path / "lib" / "adaptc").mkdir(parents=True)
    for source in [*(ROOT / "adaptc").iterdir(), ROOT / "passes", ROOT / "kernels"]:
        (tmp_path / "lib" / "adaptc" / source.name).symlink_to(source)
    settings = {"include": ["uses.py"], "extraPaths": ["lib"]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [Path(sys.executable).parent / "pyright", "--project", tmp_path, "--pythonpath", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert re.findall(r'" is "(\w+)"', done.stdout) == ["FluxPipeline", "AdaptedProgram", "AdaptedProgram"], done.stdout
    assert "0 errors" in done.stdout
