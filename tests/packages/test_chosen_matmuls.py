"""Packages whose base products were chosen: torch's own op in C++, nothing of adaptc in them, told in the report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import ConfigError, LoraConfig
from adaptc.passes.lower.choose_products import MatmulChoice
from adaptc.passes.protocol.matmul_op import ALL_ROW_CLASSES, LINEAR, ONEDNN, onednn_supports
from adaptc.tuning import compiled_matmuls as compiled_products
from tests.support.archives import read_records
from tests.support.rounding import assert_close_to_rounding

#: what is compiled once serves all tests of the file
pytestmark = pytest.mark.long

WHY, NOTHING = "measured: faster here, at no rows slower", "nothing else was measured here"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid = nn.Linear(7, 13), nn.Linear(13, 11).bfloat16()
        self.down = nn.Linear(11, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.mid(torch.tanh(self.up(x)).bfloat16()).float())


def example(n: int) -> Tensor:
    return torch.randn(n, 3, 7, generator=torch.Generator().manual_seed(n))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[adaptc.AdaptedProgram, Path]:
    torch.manual_seed(1)
    program = adaptc.compile(
        Net(), LoraConfig(r=3, target_modules=["up", "mid", "down"], init_lora_weights=False), example_inputs=example(2)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ADAPTC_PRODUCTS")

        def choose(out: int, width: int, dtype: torch.dtype) -> MatmulChoice:
            compiled_products.register_lowerings()
            can = onednn_supports(dtype)  # as whoever measures finds
            return (
                MatmulChoice(ONEDNN, ALL_ROW_CLASSES, WHY, (0.5, 0.75, 0.9, 1.0))
                if can
                else MatmulChoice(LINEAR, (), NOTHING)
            )

        patch.setattr(compiled_products, "choose_without_python", choose)
        path = adaptc.package(program, tmp_path_factory.mktemp("products") / "p.pt2")
    return program, path


FRESH = """
import sys, torch
sys.modules["adaptc"] = None
path, out = sys.argv[1:]
run = torch._inductor.aoti_load_package(path)
inputs = torch.load(out)
torch.save([run(x) for x in inputs], out)
"""


def test_torch_alone_runs_it(made: tuple[adaptc.AdaptedProgram, Path], tmp_path: Path) -> None:
    program, path = made
    inputs = [example(n) for n in (1, 2, 5, 100)]
    out = tmp_path / "out.pt"
    torch.save(inputs, out)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH, str(path), str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for x, found in zip(inputs, torch.load(out), strict=True):
        assert_close_to_rounding(found, program(x), torch.bfloat16)  # there is a layer of it in the middle
    code = b"".join(data for name, data in read_records(path).items() if "data/aotinductor" in name)
    assert b"adaptc::" not in code
    assert (b"aoti_torch_cpu__linear_pointwise" in code) == onednn_supports(torch.float32)


def test_the_report_tells_what_was_chosen(made: tuple[adaptc.AdaptedProgram, Path]) -> None:
    program, path = made
    runner = adaptc.load_package(path)
    adaptc.swap(program, program.binding)
    assert_close_to_rounding(runner(example(9)), program(example(9)), torch.bfloat16)
    report = adaptc.report(runner)
    can = onednn_supports(torch.float32)
    kind, why = (ONEDNN, WHY) if can else (LINEAR, NOTHING)
    assert f"matmuls: 2 by {kind} at any rows ({why})" in str(report)
    assert "matmuls: 1 by linear at any rows (another machine may have no half precision)" in str(report)
    assert [(p["kind"], p["count"]) for p in report.to_dict()["products"]] == [(kind, 2), (LINEAR, 1)]
    assert not any("adaptc" in str(n.target) for n in program.graph.nodes)


def test_a_value_without_a_meaning(made: tuple[adaptc.AdaptedProgram, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="products='fast' is not one of measured, plain"):
        adaptc.package(made[0], tmp_path / "p.pt2", products="fast")
    assert not list(tmp_path.iterdir())
