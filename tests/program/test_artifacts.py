"""Merged and unloaded programs are files that run where adaptc is not installed, and say the same there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig
from adaptc.passes.adapt.merging.merge_pass import Merge
from adaptc.passes.adapt.unload import Unload
from tests.support.pass_checks import attach, export, inject_all, random_values

#: imports fail for adaptc; then every program is run on its inputs, and what it returns is saved
SCRIPT = """
import importlib.abc, json, sys, warnings

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "adaptc":
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
try:
    import adaptc
except ModuleNotFoundError:
    pass
else:
    sys.exit("adaptc could be imported")

import torch
torch.set_num_threads(1)
warnings.filterwarnings("error")
warnings.filterwarnings("ignore", message="The given buffer is not writable")
warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
for path in sys.argv[1:]:
    program = torch.export.load(path)
    inputs = torch.load(path + ".in")
    program.graph.lint()
    program.validate()
    assert not any("adaptc" in (n.meta.get("custom") or {}) for n in program.graph.nodes), "a region is left"
    assert not any("lora" in k for k in program.state_dict), list(program.state_dict)
    torch.save(program.module()(*inputs), path + ".out")
print(json.dumps(sorted(m for m in sys.modules if m.startswith("adaptc"))))
"""


def run_apart(paths: list[Path]) -> None:
    """Run the files in a fresh process that has no adaptc and does not see this directory."""
    command = [sys.executable, "-I", "-c", SCRIPT, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=paths[0].parent, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == []


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.conv = nn.Conv1d(6, 9, 3, padding="same", groups=3)
        self.lin = nn.Linear(9, 7)
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight
        self.back = nn.Linear(7, 6, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.conv(self.embed(ids).mT).mT
        return self.head(self.back(torch.tanh(self.lin(h))))


IDS = torch.tensor([[1, 12, 3, 5], [0, 5, 7, 7], [2, 2, 1, 9]])
CONFIG = {
    "r": 3,
    "init_lora_weights": False,
    "lora_bias": False,
    "target_modules": ["embed", "conv", "lin", "head"],
    "modules_to_save": ["back"],
}


def by_passes(kind: str) -> Any:
    program = export(Net(), IDS[:2])
    fqns = ["embed.weight", "conv.weight", "lin.weight", "head.weight"]
    attachments = [attach(program, f) for f in fqns]
    adapted, done, _ = inject_all(program, attachments)
    values = random_values(program, attachments)
    return Merge(done, values)(adapted).program if kind == "merged" else Unload()(adapted).program


def by_api(kind: str, **options: Any) -> Any:
    program = adaptc.compile(Net(), LoraConfig(**CONFIG), example_inputs=IDS[:2], **options)
    return adaptc.merge(program) if kind == "merged" else adaptc.unload(program)


MAKERS: dict[str, Callable[[str], Any]] = {
    "passes": by_passes,
    "compile": by_api,
    "training": lambda kind: by_api(kind, training=True),
}


def saved_plainly(program: Any, path: Path) -> None:
    torch.export.save(program, path)


def saved_by_adaptc(program: Any, path: Path) -> None:
    adaptc.save(program, path)


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("maker", list(MAKERS))
def test_files_run_without_adaptc(maker: str, tmp_path: Path) -> None:
    paths, expected = [], []
    for kind in ("merged", "unloaded"):
        for save in (saved_plainly, saved_by_adaptc):
            torch.manual_seed(6)
            program = MAKERS[maker](kind)
            inputs = (IDS if maker != "passes" else IDS[1:],)
            path = tmp_path / f"{kind}-{save.__name__}.pt2"
            save(program, path)
            torch.save(inputs, f"{path}.in")
            paths.append(path)
            expected.append(program.module()(*inputs).detach())
    run_apart(paths)
    for path, out in zip(paths, expected, strict=True):
        assert torch.equal(torch.load(f"{path}.out"), out)
    assert not torch.allclose(expected[0], expected[2], rtol=1e-2, atol=1e-2)
