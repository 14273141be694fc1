"""Programs on quantised weights in other runtimes and in processes without adaptc."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import adaptc
from adaptc import LoraConfig
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from tests.support.oracle import quiet

SCHEMES = ["int8", "int4", "nf4", "int8_dynamic"]
FORMS: dict[str, Any] = {
    "adapted": lambda prog: prog,
    "merged": lambda prog: adaptc.merge(prog, dequantize=True),
    "requantized": lambda prog: adaptc.merge(prog, requantize=True),
    "residual": lambda prog: adaptc.merge(prog, keep="residual"),
}
#: torch copies its own tree specs by a class that it has deprecated
LEAF_SPECS = r".*isinstance\(treespec, LeafSpec\).*"


class Net(nn.Module):
    """Two quantised layers, with rows and columns of no power of two, and a plain one behind them."""

    def __init__(self, scheme: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down, self.head = nn.Linear(24, 37), nn.Linear(37, 11, bias=False), nn.Linear(11, 7)
        adaptc.quantize(self, scheme, exclude=["head"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.tanh(self.up(x))))


def inputs(batch: int, length: int) -> torch.Tensor:
    return torch.randn(batch, length, 24, generator=torch.Generator().manual_seed(batch + 10 * length))


@cache
def program(scheme: str) -> adaptc.AdaptedProgram:
    torch.manual_seed(5)
    config = LoraConfig(r=3, target_modules=["up", "down", "head"], init_lora_weights=False)
    free = ({0: Dim("batch", max=6), 1: Dim("length", max=32)},)
    return adaptc.compile(Net(scheme), config, example_inputs=(inputs(3, 5),), dynamic_shapes=free)


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_onnx(scheme: str, form: str, tmp_path: Path) -> None:
    import onnxruntime

    prog = FORMS[form](program(scheme))
    with quiet(LEAF_SPECS, ".*"):
        torch.onnx.export(prog, f=str(tmp_path / "net.onnx"), dynamo=True, output_names=["y"], verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    for size in ((3, 5), (1, 1), (5, 17)):
        (found,) = session.run(["y"], {session.get_inputs()[0].name: inputs(*size).numpy()})
        torch.testing.assert_close(torch.from_numpy(found), prog(inputs(*size)), rtol=1e-4, atol=1e-5)
    weights = [t for t in prog.state_dict.values() if isinstance(t, QuantizedTensor)]
    assert len(weights) == (0 if form == "merged" else 2)


@pytest.mark.long
def test_a_program_decomposes_to_plain_operators() -> None:
    """What exporters call. The program keeps its weights, and the result says nothing of schemes."""
    prog = program("nf4")
    weights = dict(prog.state_dict)
    plain = prog.run_decompositions()
    assert not any(isinstance(t, QuantizedTensor) for t in plain.state_dict.values())
    assert not any("adaptc_quantized" in (n.meta.get("custom") or {}) for n in plain.graph.nodes)
    torch.testing.assert_close(plain.module()(inputs(2, 3)), prog(inputs(2, 3)), rtol=1e-5, atol=1e-5)
    assert all(t is weights[n] for n, t in prog.state_dict.items())


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_executorch(scheme: str, tmp_path: Path) -> None:
    from executorch import exir, runtime

    prog = program(scheme)
    shifts = exir.EdgeCompileConfig(_core_aten_ops_exception_list=[torch.ops.aten.bitwise_right_shift.Tensor_Scalar])
    with quiet(".*"):
        exir.to_edge_transform_and_lower(prog, compile_config=shifts).to_executorch().save(str(tmp_path / "net.pte"))
    method = runtime.Runtime.get().load_program(str(tmp_path / "net.pte")).load_method("forward")
    for size in ((3, 5), (1, 1), (5, 17)):
        (found,) = method.execute([inputs(*size)])
        torch.testing.assert_close(found, prog(inputs(*size)), rtol=1e-4, atol=1e-5)


WITHOUT_ADAPTC = """
import sys, torch
given, *files = torch.load("inputs.pt")
for name, expected in files:
    found = [torch.export.load(f"{name}.pt2").module()(x) for x in given]
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)
assert not any(m.partition(".")[0] == "adaptc" for m in sys.modules)
"""


@pytest.mark.long
@pytest.mark.parametrize("scheme", SCHEMES)
def test_files_run_where_adaptc_is_not_imported(scheme: str, tmp_path: Path) -> None:
    given = [inputs(3, 5), inputs(1, 1), inputs(5, 17)]
    files: list[Any] = []
    for form, make in FORMS.items():
        prog = make(program(scheme))
        adaptc.save(prog, tmp_path / f"{form}.pt2")
        files.append((form, [prog(x) for x in given]))
    torch.save([given, *files], tmp_path / "inputs.pt")
    subprocess.run([sys.executable, "-I", "-W", "error", "-c", WITHOUT_ADAPTC], cwd=tmp_path, check=True)
    for form, make in FORMS.items():
        loaded, prog = adaptc.load(tmp_path / f"{form}.pt2"), make(program(scheme))
        assert torch.equal(loaded(given[0]), prog(given[0]))
