"""The ops inside torch.compile and inside CUDA graphs: the same values as outside, for other inputs too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.kernels.dora_linear import dora_epilogue, dora_norm
from adaptc.kernels.grouped_lora import grouped_lora
from adaptc.kernels.lora_epilogue import lora_down, lora_up_add
from adaptc.kernels.lora_linear import lora_linear
from adaptc.kernels.merge_weight import merge_saving_, unmerge_
from adaptc.kernels.packed_lora import packed_factors, packed_lora, sibling_table
from tests.gpu.cases import BF16, DEVICE, F32, SCALE, TYPES, bits, matrix, number, type_name, vector
from tests.gpu.timing import captured

WIDTHS = (64, 48, 131)


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _layer(x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: Tensor) -> Tensor:
    return torch.relu(lora_linear(x, W, None, A, B, s))


def _down_up(x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: Tensor) -> Tensor:
    return lora_up_add(F.linear(x, W), lora_down(x, A, None), B, s)


def _dora(x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: Tensor) -> Tensor:
    g = 1 / dora_norm(W, A, B, s)
    return dora_epilogue(F.linear(x, W), lora_down(x, A, None), B, g, s)


def _merged(x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: Tensor) -> Tensor:
    saved = merge_saving_(W, A, B, s)
    y = F.linear(x, W)
    unmerge_(W, saved)
    return y


def _check_near(found: Tensor, expected: Tensor) -> None:
    """Compiled code may sum in another order, and leave out a rounding in between."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    allowed = max(torch.finfo(found.dtype).eps, 1e-5)
    assert (found.double() - expected.double()).norm() <= allowed * expected.double().norm()


def _operands(rows: int, rank: int, types: tuple[torch.dtype, torch.dtype]) -> list[Tensor]:
    base, adapter = types
    x, W = matrix(rows, 256, base, seed=1), matrix(193, 256, base, seed=2)
    return [x, W, matrix(rank, 256, adapter, seed=3), matrix(193, rank, adapter, seed=4), number(SCALE)]


@pytest.mark.parametrize("types", TYPES, ids=type_name)
@pytest.mark.parametrize("call", [_layer, _down_up, _dora, _merged])
def test_layers_compiled_for_any_rank(call: Callable[..., Tensor], types) -> None:
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for i, (rows, rank) in enumerate(((67, 7), (67, 64), (40, 16), (521, 33))):
        args = _operands(rows, rank, types)
        weight = args[1].clone()
        # The second call may have another alignment to ask for; the others must find what they need.
        with torch.compiler.set_stance("default" if i < 2 else "fail_on_recompile"):
            found = compiled(*args)
        _check_near(found, call(*args))
        assert torch.equal(bits(args[1]), bits(weight))


@pytest.mark.parametrize("rows", [1, 16, 67])
def test_layers_compiled_for_one_size(rows) -> None:
    args = _operands(rows, 16, (BF16, BF16))
    _check_near(torch.compile(_layer, fullgraph=True, dynamic=False)(*args), _layer(*args))


def _siblings(rows: int, ranks: tuple[int, ...]) -> list[Any]:
    x, W, A = matrix(rows, 256, BF16), matrix(sum(WIDTHS), 256, BF16, seed=1), matrix(sum(ranks), 256, BF16, seed=3)
    B = packed_factors([matrix(w, r, BF16, seed=2) for w, r in zip(WIDTHS, ranks, strict=True)])
    table, scales = sibling_table(WIDTHS, ranks, DEVICE), torch.linspace(0.3, 2, 3, device=DEVICE)
    return [x, W, None, A, B, table, scales, WIDTHS]


def test_siblings_compiled_for_any_ranks() -> None:
    compiled = torch.compile(packed_lora, fullgraph=True, dynamic=True)
    for rows, ranks in ((67, (16, 16, 16)), (40, (8, 0, 33)), (5, (64, 8, 8))):
        args = _siblings(rows, ranks)
        _check_near(compiled(*args), packed_lora(*args))


def _grouped(rows: int, seed: int = 0) -> list[Tensor]:
    """Eight adapters of rank 16, and one row in nine without one."""
    x, y = matrix(rows, 256, BF16, seed=1), matrix(rows, 193, BF16, seed=2)
    A, B = matrix(8 * 16, 256, BF16, seed=3), matrix(8 * 16, 193, BF16, seed=4)
    starts = torch.arange(0, 8 * 16 + 1, 16, dtype=torch.int32, device=DEVICE)
    index = torch.randint(-1, 8, (rows,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return [x, y, A, B, starts, vector(8, F32, 5), index]


def _run_grouped(*tensors: Tensor) -> Tensor:
    return grouped_lora(*tensors, max_rank=16)  # type: ignore[arg-type]


def test_grouped_compiled_for_any_number_of_rows() -> None:
    compiled = torch.compile(_run_grouped, fullgraph=True, dynamic=True)
    for rows in (67, 40):
        args = _grouped(rows)
        _check_near(compiled(*args), _run_grouped(*args))


def test_gradients_compiled() -> None:
    compiled = torch.compile(_layer, fullgraph=True, dynamic=False)
    results = []
    for call in (compiled, _layer):
        leaves = [t.requires_grad_() for t in _operands(67, 16, (F32, F32))[:4]]
        results.append(torch.autograd.grad(call(*leaves, number(SCALE)).square().sum(), leaves))
    for found, expected in zip(*results, strict=True):
        _check_near(found, expected)


class Again:
    """A stand-in for a CUDA graph where the tests are checked without a GPU: a replay is the call once more."""

    def __init__(self, run: Callable[[], Tensor], out: Tensor) -> None:
        self.run, self.out = run, out

    def replay(self) -> None:
        self.out.copy_(self.run())


def _captured(run: Callable[[], Tensor]) -> tuple[Any, Tensor]:
    if DEVICE.type == "cuda":
        return captured(run)
    out = run()
    return Again(run, out), out


@pytest.mark.parametrize("types", TYPES, ids=type_name)
@pytest.mark.parametrize("rows", [1, 16, 67, 512])
def test_a_layer_in_a_cuda_graph(rows, types) -> None:
    args = _operands(rows, 16, types)
    graph, out = _captured(lambda: _layer(*args))
    for seed in (7, 8):
        # Other inputs, another adapter and another scale, in the same memory.
        for i, t in enumerate(args[:4]):
            t.copy_(matrix(*t.shape, t.dtype, seed=seed + i))
        args[4].fill_(1 / seed)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(bits(out), bits(_layer(*args)))


def test_groups_in_a_cuda_graph_with_other_rows_for_each_adapter() -> None:
    args = _grouped(67)
    graph, out = _captured(lambda: _run_grouped(*args))
    for seed in (1, 2):
        args[-1].copy_(_grouped(67, seed)[-1])
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(bits(out), bits(_run_grouped(*args)))
