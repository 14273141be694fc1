"""Programs and adapters for other runtimes on a full disk: an error of adaptc, and nothing has changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import resource, sys, warnings
from pathlib import Path

sys.path.insert(0, {root!r})
warnings.simplefilter("ignore")
import torch
import adaptc

folder, suffix, adapter_suffix, options = Path({folder!r}), {suffix!r}, {adapter_suffix!r}, {options!r}
export, save = adaptc.exporters.export_{runtime}, adaptc.exporters.save_{runtime}_adapter
model = torch.nn.Sequential(torch.nn.Linear(300, 301), torch.nn.Tanh(), torch.nn.Linear(301, 7))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = model

    def forward(self, x):
        return self.layers(x)


config = adaptc.LoraConfig(r=64, target_modules=["0", "2"], init_lora_weights=False)
program = adaptc.compile(Net(), config, example_inputs=(torch.randn(3, 300),))
file = export(program, folder / f"model{{suffix}}", **options)
adapter = save(program, folder / f"adapter{{adapter_suffix}}", model=file)


def content():
    return {{str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}}


before = content()
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
for write in (
    lambda: export(program, file, **options),
    lambda: export(program, folder / f"new{{suffix}}", **options),
    lambda: save(program, adapter, model=file),
    lambda: save(program, folder / f"new{{adapter_suffix}}", model=file),
):
    try:
        write()
    except adaptc.CheckpointError as error:
        assert "could not write" in str(error), str(error)
    else:
        sys.exit(5)
    assert content() == before
print("all refused")
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("runtime", "suffix", "adapter_suffix", "options"),
    [
        ("onnx", ".onnx", ".onnx_adapter", {}),
        ("openvino", ".xml", ".safetensors", {}),
        ("executorch", ".pte", ".ptd", {"max_size": 20}),
    ],
)
def test_a_full_disk_is_an_error(
    tmp_path: Path, runtime: str, suffix: str, adapter_suffix: str, options: dict[str, int]
) -> None:
    fields = {"root": os.getcwd(), "folder": str(tmp_path), "runtime": runtime, "suffix": suffix}
    code = CODE.format(**fields, adapter_suffix=adapter_suffix, options=options)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "all refused" in done.stdout
