"""A program file is all that another process needs: nothing there was imported, captured or registered before."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import adaptc
from tests.support.families import FAMILIES

LOAD = """
import sys, torch, adaptc
assert "transformers" not in sys.modules
inputs = torch.load(sys.argv[1])
for path in sys.argv[2:]:
    torch.save(adaptc.load(path)(**inputs).logits.detach(), path + ".logits")
"""


@pytest.mark.long
def test_a_process_without_transformers_imported_loads_a_transformers_program(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    program = adaptc.compile(
        family.build(), adaptc.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    inputs = family.inputs(2, 7)
    adapted, merged = tmp_path / "adapted.pt2", tmp_path / "merged.pt2"
    adaptc.save(program, adapted)
    adaptc.save(adaptc.merge(program), merged)
    torch.save(inputs, tmp_path / "inputs.pt")
    arguments = [str(tmp_path / "inputs.pt"), str(adapted), str(merged)]
    subprocess.run([sys.executable, "-W", "ignore", "-c", LOAD, *arguments], check=True, timeout=300)
    here = program(**inputs).logits
    assert torch.equal(torch.load(f"{adapted}.logits"), here)
    torch.testing.assert_close(torch.load(f"{merged}.logits"), here, rtol=1e-4, atol=1e-4)


def test_a_saved_program_has_the_usual_permissions_and_no_trace_of_where_it_was_written(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 3))
    program = adaptc.compile(model, adaptc.LoraConfig(r=2, target_modules=["0"]), example_inputs=torch.randn(4, 5))
    umask = os.umask(0o022)
    try:
        path = adaptc.save(program, tmp_path / "small.pt2")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    with zipfile.ZipFile(path) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {"archive"}
    assert [p.name for p in tmp_path.iterdir()] == ["small.pt2"]
