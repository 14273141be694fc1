"""Files of a model with experts, whose op transformers registers with the model's own code, load without that code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adaptc
from tests.support.families import FAMILIES

IDS = torch.arange(4, 16).view(2, 6)
LOADED = "import sys, torch, adaptc; print(adaptc.{}(sys.argv[1])(torch.arange(4, 16).view(2, 6)).logits.tolist())"
PLAIN = (
    "import sys, torch, transformers.integrations.moe; "
    "print(torch.export.load(sys.argv[1]).module()(torch.arange(4, 16).view(2, 6)).logits.tolist())"
)


@pytest.mark.long
def test_in_a_fresh_process(tmp_path: Path) -> None:
    config = adaptc.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)
    prog = adaptc.compile(FAMILIES["mixtral"].build(), config, example_inputs=(IDS,))
    assert "grouped_mm_fallback" in str(prog.graph)
    files = {
        LOADED.format("load"): adaptc.save(prog, tmp_path / "program.pt2"),
        LOADED.format("load_package"): adaptc.package(prog, tmp_path / "package.pt2"),
        PLAIN: adaptc.save(adaptc.merge(prog), tmp_path / "merged.pt2"),
    }
    want = prog(IDS).logits
    for code, path in files.items():
        done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), want, atol=1e-6, rtol=1e-4)
