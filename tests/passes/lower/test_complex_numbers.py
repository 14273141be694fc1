"""Complex numbers written as pairs of real ones: equal values, nothing complex left, and what stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

import adaptc
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.lower.complex_numbers import SplitComplex

generator = torch.Generator().manual_seed(0)


class Calls(nn.Module):
    """A module that calls a function of its inputs and of a complex buffer."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn
        self.register_buffer("rotary", torch.randn(7, 3, dtype=torch.complex128, generator=generator))

    def forward(self, x: Tensor, angle: Tensor) -> Any:
        return self.fn(x, angle, self.rotary)


def as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))


def as_real(x: Tensor) -> Tensor:
    return torch.view_as_real(x).flatten(-2)


def polar(angle: Tensor) -> Tensor:
    return torch.polar(angle.abs() + 1, angle)


def without_autocast(x: Tensor, angle: Tensor) -> Tensor:
    """As Z-Image turns its queries: the product is in a block of its own."""
    rotary = polar(angle)
    with torch.amp.autocast("cuda", enabled=False):
        turned = torch.view_as_real(as_complex(x) * rotary.unsqueeze(1)).flatten(2)
    return turned + as_real(rotary)[:, None]


FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "rotary": lambda x, angle, _: as_real(as_complex(x) * polar(angle)[:, None]),
    "rotary in another dtype": lambda x, angle, _: as_real(
        as_complex(x.float()) * polar(angle).to(torch.complex64)[:, None]
    ).type_as(x),
    "a complex buffer": lambda x, angle, rotary: as_real(as_complex(x) * rotary[1:5].transpose(0, 1)[:, 2]),
    "times a real tensor": lambda x, angle, _: as_real(angle[:, None] * as_complex(x) * 0.5),
    "times a complex number": lambda x, angle, _: as_real(as_complex(x) * (0.5 - 2j)),
    "times a number that is complex": lambda x, angle, _: as_real(angle * (0.5 - 2j)),
    "plus numbers": lambda x, angle, _: as_real((as_complex(x) + 1.5) - (2 - 3j)),
    "without autocast": lambda x, angle, _: without_autocast(x, angle),
    "sums": lambda x, angle, _: as_real(torch.sub(as_complex(x), polar(angle)[:, None], alpha=3) + -as_complex(x)),
    "moves": lambda x, angle, _: as_real(
        torch.cat([as_complex(x).permute(1, 0, 2)[1:], as_complex(x).view(-1, x.shape[1], 3).transpose(0, 1)], 0)
        .contiguous()
        .unsqueeze(1)
        .expand(-1, 2, -1, -1)
        .squeeze(1)
        .clone()
    ),
    "looked up": lambda x, angle, rotary: as_real(rotary[angle.abs().sum(-1).long() % 7] * 1.5),
    "conjugates": lambda x, angle, _: as_real(as_complex(x).conj() * polar(angle)[:, None].conj().resolve_conj()),
    "parts": lambda x, angle, _: (as_complex(x).real, polar(angle).imag, as_complex(x).abs()),
    "of two parts": lambda x, angle, _: as_real(torch.complex(angle, 2 * angle)),
}


def exported(fn: Callable[..., Any]) -> tuple[ExportedProgram, tuple[Tensor, Tensor]]:
    rows, length = Dim("rows"), Dim("length")
    inputs = (
        torch.randn(5, 4, 6, dtype=torch.float64, generator=generator),
        torch.randn(5, 3, dtype=torch.float64, generator=generator),
    )
    shapes = {"x": {0: rows, 1: length}, "angle": {0: rows}}
    return torch.export.export(Calls(fn), inputs, dynamic_shapes=shapes), inputs


def complex_ops(graph: fx.Graph) -> list[fx.Node]:
    values = ((n, n.meta.get("val")) for n in graph.nodes if n.op == "call_function")
    return [n for n, v in values if isinstance(v, Tensor) and v.is_complex()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_pairs_compute_what_complex_numbers_do(name: str) -> None:
    program, inputs = exported(FUNCTIONS[name])
    lifted = LiftedProgram(program)
    result = SplitComplex(program.graph_module)(lifted.graph)
    assert result.count >= 1
    assert not result.notes
    assert not complex_ops(lifted.graph)
    made = lifted.finish()
    for given in (inputs, (torch.randn(3, 9, 6, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64))):
        wanted, found = program.module()(*given), made.module()(*given)
        tolerance = 1e-6 if "dtype" in name else 1e-14
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_sizes_of_complex_values_are_those_of_their_parts() -> None:
    program, inputs = exported(lambda x, angle, _: as_real(as_complex(x).reshape(-1, x.shape[1], 3) * 2))
    lifted = LiftedProgram(program)
    (size,) = (n for n in lifted.graph.nodes if n.target is torch.ops.aten.sym_size.int and n.args[1] == 1)
    (made,) = lifted.graph.find_nodes(op="call_function", target=torch.ops.aten.view_as_complex.default)
    (reader,) = [n for n in size.users if n is not made and made in n.all_input_nodes]
    with lifted.graph.inserting_before(reader):
        own = lifted.graph.call_function(torch.ops.aten.sym_size.int, (made, 1))
    own.meta["val"] = size.meta["val"]
    reader.replace_input_with(size, own)
    assert SplitComplex()(lifted.graph).count
    assert not complex_ops(lifted.graph)
    torch.testing.assert_close(lifted.finish().module()(*inputs), program.module()(*inputs))


def test_a_block_with_autocast_stays() -> None:
    def lowered(x: Tensor, angle: Tensor, _: Tensor) -> Tensor:
        with torch.amp.autocast("cpu", dtype=torch.bfloat16):
            return as_real(as_complex(x) * polar(angle)[:, None])

    program, _ = exported(lowered)
    lifted = LiftedProgram(program)
    before = [str(n.target) for n in lifted.graph.nodes]
    SplitComplex(program.graph_module)(lifted.graph)
    assert [str(n.target) for n in lifted.graph.nodes] == before


def test_gradients_are_those_of_complex_numbers() -> None:
    program, (x, angle) = exported(FUNCTIONS["rotary"])
    lifted = LiftedProgram(program)
    SplitComplex()(lifted.graph)
    found = [
        torch.autograd.grad(made.module()(a, b).square().sum(), (a, b))
        for made in (program, lifted.finish())
        for a, b in [(x.clone().requires_grad_(), angle.clone().requires_grad_())]
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "fn"),
    {
        "a Fourier transform": lambda x, angle, _: torch.fft.rfft(angle).abs(),
        "an output": lambda x, angle, _: as_complex(x) * 2,
        "an unknown op": lambda x, angle, _: as_real(as_complex(x).exp() * polar(angle)[:, None]),
        "a write": lambda x, angle, _: as_real((as_complex(x.clone()) * 1).mul_(2)),
    }.items(),
)
def test_what_is_not_known_stays_complex(name: str, fn: Callable[..., Any]) -> None:
    program, _ = exported(fn)
    lifted = LiftedProgram(program)
    before = [str(n.target) for n in lifted.graph.nodes]
    result = SplitComplex()(lifted.graph)
    assert result.count == 0
    assert result.notes
    assert [str(n.target) for n in lifted.graph.nodes] == before


def test_one_group_may_stay_where_another_is_written() -> None:
    program, inputs = exported(lambda x, angle, _: (as_real(as_complex(x) * 2), torch.fft.rfft(angle).abs()))
    lifted = LiftedProgram(program)
    assert SplitComplex()(lifted.graph).count == 2
    assert {"aten.view_as_complex.default"}.isdisjoint(str(n.target) for n in lifted.graph.nodes)
    torch.testing.assert_close(lifted.finish().module()(*inputs), program.module()(*inputs))


class Rotated(nn.Module):
    """A layer whose inputs are turned by complex numbers, as the rotary positions of Llama 4 turn queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(7, 6)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        return as_real(as_complex(self.q(x)) * polar(angle)[:, None])


@pytest.mark.long
def test_compiled_code_has_no_complex_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[str] = []

    def seen(function: Any) -> Any:
        def call(module: fx.GraphModule, *args: Any, **options: Any) -> Any:
            codes.append(module.code)
            return function(module, *args, **options)

        return call

    monkeypatch.setattr(torch._inductor, "standalone_compile", seen(torch._inductor.standalone_compile))
    monkeypatch.setattr(torch._inductor, "aot_compile", seen(torch._inductor.aot_compile))
    torch.manual_seed(0)
    net, given = Rotated().eval(), (torch.randn(5, 4, 7), torch.randn(5, 3))
    shapes = {"x": {0: Dim("rows"), 1: Dim("length")}, "angle": {0: Dim("rows")}}
    config = adaptc.LoraConfig(r=3, target_modules=["q"], init_lora_weights=False)
    program = adaptc.compile(net, config, example_inputs=given, dynamic_shapes=shapes)
    compiled = adaptc.compile(net, config, example_inputs=given, dynamic_shapes=shapes, backend="inductor")
    adaptc.swap(compiled, adaptc.save_adapter(program, tmp_path / "adapter"))
    adaptc.package(program, tmp_path / "program.pt2")
    packaged = adaptc.load_package(tmp_path / "program.pt2")
    for rows, length in ((5, 4), (3, 9)):
        x, angle = torch.randn(rows, length, 7), torch.randn(rows, 3)
        wanted = program(x, angle)
        torch.testing.assert_close(compiled(x, angle), wanted)
        torch.testing.assert_close(packaged(x, angle), wanted)
    assert len(codes) == 2  # of the code in this process, and of the package
    assert all("aten.cos" in code and "polar" not in code and "complex" not in code for code in codes)
