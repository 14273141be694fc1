"""Layers of packages on quantised weights: which are computed on the codes, and that they compute the same."""

from __future__ import annotations

import operator
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import profile

import adaptc
from adaptc import LoraConfig
from adaptc.passes.quantized.bitsandbytes_kernels import _multiplies
from adaptc.passes.quantized.expand_quantized import ExpandQuantized

#: (scheme, dtype of the weight) -> the op by which a layer of 64 inputs and 48 outputs is computed
KERNELS: dict[tuple[str, torch.dtype], str] = {
    ("int8_dynamic", torch.float32): "_int_mm",
    ("int8_dynamic", torch.bfloat16): "_int_mm",
    ("int8", torch.bfloat16): "_weight_int8pack_mm",
    ("int8", torch.float32): "sum",
    ("int8", torch.float16): "sum",
    ("int4", torch.bfloat16): "_weight_int4pack_mm_for_cpu",
    ("int4", torch.float32): "sum",
}
#: those that are dequantised in each call
DEQUANTIZED = [("nf4", torch.float32), ("nf4", torch.bfloat16)]
#: relative to the largest value: an 8-bit mantissa, read more than once, in bfloat16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
#: of rows; few and many for every kernel
ROWS = (1, 2, 4, 5, 8, 9, 17, 300)


class Net(nn.Module):
    def __init__(self, columns: int, rows: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(columns, rows), nn.Linear(rows, 7)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


@cache
def program(
    scheme: str, dtype: torch.dtype, columns: int = 64, rows: int = 48, **options: Any
) -> adaptc.AdaptedProgram:
    model = adaptc.quantize(Net(columns, rows, dtype), scheme, exclude=["down"], **options)
    x = torch.randn(3, 5, columns, dtype=dtype)
    config = LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False)
    return adaptc.compile(model, config, example_inputs=x)


def ops(graph: Any) -> set[str]:
    """The names of all ops in a graph and in the ways that it chooses from."""
    found = {str(n.target).partition(".")[2].partition(".")[0] for n in graph.graph.nodes if n.op == "call_function"}
    return found.union(*(ops(child) for child in graph.children()))


def check(prog: adaptc.AdaptedProgram, dtype: torch.dtype, columns: int = 64) -> Any:
    """The compiled form computes what the program does, for few rows and for many; returns that form."""
    plain = ExpandQuantized(compiled=True)(prog).output
    run = plain.module(check_guards=False)
    for count in ROWS:
        for shape in ((1, count), (count, 1)):
            x = torch.randn(*shape, columns, generator=torch.Generator().manual_seed(count)).to(dtype)
            with torch.no_grad():
                found, expected = run(x), prog(x)
            assert found.shape == expected.shape
            assert found.dtype == expected.dtype
            error = float((found - expected).abs().max() / expected.abs().max())
            assert error < TOLERANCE[dtype], (count, error)
    return plain


@pytest.mark.few(4)
@pytest.mark.parametrize(("scheme", "dtype"), KERNELS, ids=str)
def test_a_layer_is_computed_on_its_codes(scheme: str, dtype: torch.dtype) -> None:
    plain = check(program(scheme, dtype), dtype)
    assert KERNELS[scheme, dtype] in ops(plain.graph_module)
    choices: list[Any] = [n for n in plain.graph.nodes if n.target is torch.ops.higher_order.cond]
    few_rows = {("int8", torch.bfloat16): 8} if KERNELS[scheme, dtype] != "sum" else {(scheme, dtype): 4}
    assert len(choices) == ((scheme, dtype) in few_rows)
    for few, first, second, _ in (n.args for n in choices):
        assert (few.target, few.args[1]) == (operator.le, few_rows[scheme, dtype])
        assert KERNELS[scheme, dtype] in ops(plain.graph_module.get_submodule(first.target))
        assert KERNELS[scheme, dtype] not in ops(plain.graph_module.get_submodule(second.target))
    # What is computed for any number of rows has no tensor of the weight's size but the codes.
    made = [n for n in plain.graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor)]
    assert not [n for n in made if n.meta["val"].dtype == dtype and tuple(n.meta["val"].shape) == (48, 64)]
    assert ("up.weight.codes" in plain.state_dict) == (scheme != "int4")  # a copy in another order is enough


@pytest.mark.parametrize(("scheme", "dtype"), DEQUANTIZED, ids=str)
def test_other_layers_are_dequantised(scheme: str, dtype: torch.dtype) -> None:
    plain = check(program(scheme, dtype), dtype)
    assert not ops(plain.graph_module) & {"cond", *(k for k in KERNELS.values() if k != "sum")}


@pytest.mark.parametrize(
    ("scheme", "dtype", "columns", "rows", "options"),
    [
        ("int8", torch.bfloat16, 67, 48, {}),  # the kernel would read past the end of a row
        ("int8", torch.bfloat16, 64, 48, {"group_size": 16}),
        ("int8", torch.float32, 64, 48, {"group_size": 16}),
        ("int4", torch.bfloat16, 64, 47, {}),  # it takes 16 rows at once
        ("int4", torch.bfloat16, 69, 48, {}),  # in groups of 23
    ],
    ids=str,
)
def test_sizes_that_a_kernel_does_not_take(
    scheme: str, dtype: torch.dtype, columns: int, rows: int, options: dict[str, Any]
) -> None:
    plain = check(program(scheme, dtype, columns, rows, **options), dtype, columns)
    assert not ops(plain.graph_module) & {"cond", "_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu"}


def test_a_fixed_number_of_rows_needs_no_choice() -> None:
    for count in (4, 5):
        model = adaptc.quantize(Net(64, 48, torch.float32), "int8", exclude=["down"])
        x = torch.randn(count, 64)
        exported = torch.export.export(model, (x,))
        config = LoraConfig(r=3, target_modules=["up"], init_lora_weights=False)
        prog = adaptc.compile(exported, config)
        plain = ExpandQuantized(compiled=True)(prog).output
        torch.testing.assert_close(plain.module()(x), prog(x), rtol=1e-5, atol=1e-5)
        assert ("sum" in ops(plain.graph_module)) == (count == 4)
        assert not any(n.target is torch.ops.higher_order.cond for n in plain.graph.nodes)


@pytest.mark.parametrize(
    ("dtype", "copies"),
    [
        (torch.bfloat16, {"packed_codes", "group_scales"}),
        (torch.float32, {"plane_codes", "plane_scales", "plane_zeros"}),
    ],
    ids=["bfloat16", "float32"],
)
def test_a_weight_that_something_else_reads_keeps_its_stored_tensors(dtype: torch.dtype, copies: set[str]) -> None:
    """A tied embedding looks rows up in the codes, and the head multiplies by a copy in another order."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.tokens, self.head = nn.Embedding(48, 64), nn.Linear(64, 48, bias=False)
            self.head.weight = self.tokens.weight
            self.to(dtype)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.tokens(ids))

    ids = torch.arange(21).reshape(3, 7)
    model = adaptc.quantize(Tied(), "int4", target_modules=["tokens"])
    config = LoraConfig(r=3, target_modules=["head"], init_lora_weights=False)
    prog = adaptc.compile(model, config, example_inputs=ids)
    plain = ExpandQuantized(compiled=True)(prog).output
    assert {f"tokens.weight.{role}" for role in {"codes", "scales", "zeros"} | copies} <= plain.state_dict.keys()
    beside = ExpandQuantized(fuse=True, planar=True)(prog).output
    assert {f"tokens.weight.{role}" for role in {"codes"} | copies} <= beside.state_dict.keys()
    for form in (plain, beside):
        found, expected = form.module(check_guards=False)(ids), prog(ids)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


#: (scheme, dtype of the weight) -> the op of a layer of 64 inputs and 64 outputs in code that runs beside adaptc
BESIDE = {
    ("int8_dynamic", torch.float32): "_int_mm",
    ("int8_dynamic", torch.bfloat16): "_int_mm",
    ("int4", torch.bfloat16): "packed_linear",
    ("nf4", torch.bfloat16): "packed_linear",
    ("fp4", torch.bfloat16): "packed_linear",
    ("int8", torch.bfloat16): "qlinear",
    ("int4", torch.float32): "qlinear",
    ("nf4", torch.float32): "qlinear",
}


@pytest.mark.parametrize(("scheme", "dtype"), BESIDE, ids=str)
def test_code_beside_adaptc_calls_the_kernels_that_eager_calls_have(scheme: str, dtype: torch.dtype) -> None:
    prog = program(scheme, dtype, rows=64)
    beside = ExpandQuantized(fuse=True, planar=True)(prog).output
    expected = BESIDE[scheme, dtype]
    if scheme in ("nf4", "fp4") and expected == "packed_linear" and not _multiplies(scheme):
        expected = "qlinear"
    found = ops(beside.graph_module) & {*BESIDE.values()}
    assert found == {expected}
    run, allowed = beside.module(check_guards=False), 2 * TOLERANCE[dtype]
    for count in ROWS:
        x = torch.randn(1, count, 64, generator=torch.Generator().manual_seed(count)).to(dtype)
        with torch.no_grad():
            torch.testing.assert_close(run(x), prog(x), rtol=allowed, atol=allowed)


@pytest.mark.few(1)
@pytest.mark.parametrize(("scheme", "dtype"), BESIDE, ids=str)
def test_inductor_compiles_them(scheme: str, dtype: torch.dtype) -> None:
    eager = program(scheme, dtype, rows=64)
    model = adaptc.quantize(Net(64, 64, dtype), scheme, exclude=["down"])
    config = LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False)
    prog = adaptc.compile(model, config, example_inputs=torch.randn(3, 5, 64, dtype=dtype), backend="inductor")
    adaptc.swap(prog, eager.binding)
    allowed = 2 * TOLERANCE[dtype]
    for count in (1, 3, 32, 33, 70):
        x = torch.randn(1, count, 64, generator=torch.Generator().manual_seed(count)).to(dtype)
        with torch.no_grad():
            with profile() as found:
                y = prog(x)
            torch.testing.assert_close(y, eager(x), rtol=allowed, atol=allowed)
        if (scheme, dtype) == ("int4", torch.bfloat16):
            names = {event.key for event in found.key_averages()}
            assert ("aten::_weight_int4pack_mm_for_cpu" in names) == (count <= 32), count


class Turned(nn.Module):
    """A layer whose input has its features first in memory, as behind a convolution."""

    def __init__(self, columns: int, rows: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv, self.up = nn.Conv1d(columns, columns, 3, padding=1), nn.Linear(columns, rows)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.conv(x).transpose(1, 2))


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        ("int8_dynamic", torch.float32),
        *(pytest.param(*case, marks=pytest.mark.long) for case in BESIDE if case[0] != "int8_dynamic"),
    ],
    ids=str,
)
def test_inputs_with_their_features_first(scheme: str, dtype: torch.dtype) -> None:
    """For a single row a compiler may choose strides that a kernel reads otherwise."""
    model = adaptc.quantize(Turned(64, 48, dtype), scheme, target_modules=["up"])
    config = LoraConfig(r=3, target_modules=["up"], init_lora_weights=False)
    free = ({0: torch.export.Dim("batch", max=64), 2: torch.export.Dim("length", max=64)},)
    x = torch.randn(3, 64, 5).to(dtype)
    eager = adaptc.compile(model, config, example_inputs=x, dynamic_shapes=free)
    prog = adaptc.compile(model, config, example_inputs=x, dynamic_shapes=free, backend="inductor")
    adaptc.swap(prog, eager.binding)
    allowed = 2 * TOLERANCE[dtype]
    for batch, length in ((1, 1), (1, 2), (2, 1), (3, 7)):
        x = torch.randn(batch, 64, length, generator=torch.Generator().manual_seed(length)).to(dtype)
        with torch.no_grad():
            torch.testing.assert_close(prog(x), eager(x), rtol=allowed, atol=allowed)


@pytest.mark.parametrize("count", [32, 33])
def test_a_fixed_number_of_rows_is_compiled_for_its_kernel(count: int) -> None:
    model = adaptc.quantize(Net(64, 64, torch.bfloat16), "int4", exclude=["down"])
    x = torch.randn(count, 64, generator=torch.Generator().manual_seed(count)).bfloat16()
    config = LoraConfig(r=3, target_modules=["up"], init_lora_weights=False)
    prog = adaptc.compile(torch.export.export(model, (x,)), config, backend="inductor")
    prog(x)  # compiles
    with torch.no_grad(), profile() as found:
        y = prog(x)
    allowed = 2 * TOLERANCE[torch.bfloat16]
    torch.testing.assert_close(y, prog.module()(x).detach(), rtol=allowed, atol=allowed)
    names = {event.key for event in found.key_averages()}
    assert ("aten::_weight_int4pack_mm_for_cpu" in names) == (count == 32)
    assert "adaptc::packed_linear" not in names
