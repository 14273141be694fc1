"""packed_lora as an op: what it is to torch, what it refuses, and what its calls compile and look up."""

from __future__ import annotations

import gc
from importlib import import_module
from typing import Any

import pytest
import torch

import adaptc
from adaptc.errors import BackendError, RecompileError
from adaptc.kernels import _packed_products
from adaptc.kernels.lora_linear import reference_lora_linear
from adaptc.kernels.packed_lora import (
    _PLANS,
    packed_factors,
    packed_lora,
    packed_lora_direct,
    sibling_table,
)
from tests.kernels import run_cases
from tests.kernels.matrices import DTYPES, matrix
from tests.support.fake_gpu import FakeKernel, fake_gpu

#: the module: the package's own name is the op's
MODULE = import_module("adaptc.kernels.packed_lora")
WIDTHS, RANKS = [70, 0, 5, 3], [2, 4, 0, 3]
FOUR = ["_down_kernel", "_few_rows_down_kernel", "_few_rows_kernel", "_update_kernel"]


def arguments(
    base: torch.dtype,
    adapter: torch.dtype | None = None,
    rows: int = 4,
    widths: Any = None,
    ranks: Any = None,
    K: int = 7,
) -> list[Any]:
    """x, W, bias, A, B, the table, scales and widths."""
    low, widths, ranks = adapter or base, widths or WIDTHS, ranks or RANKS
    matrices = [matrix(w, r, low, seed=2 + i) for i, (w, r) in enumerate(zip(widths, ranks, strict=True))]
    table = sibling_table(widths, ranks) if len(widths) > 1 else None
    scales = torch.tensor([0.5, 3, 2, 1][: len(widths)])
    x, W, bias = matrix(rows, K, base, "wider"), matrix(sum(widths), K, base, seed=7), matrix(1, sum(widths), base)[0]
    return [x, W, bias, matrix(sum(ranks), K, low, seed=1), packed_factors(matrices), table, scales, widths]


@pytest.mark.long
def test_kernels_interpreted() -> None:
    run_cases("packed_lora")


def test_layers_are_siblings_side_by_side() -> None:
    x, W, bias, A, B, table, scales, widths = arguments(torch.float64)
    begin, parts = 0, []
    for i, (w, r) in enumerate(zip(WIDTHS, RANKS, strict=True)):
        own, down = slice(sum(WIDTHS[:i]), sum(WIDTHS[: i + 1])), A[sum(RANKS[:i]) : sum(RANKS[: i + 1])]
        factor = B[begin : begin + w * r].view(r, w).t()
        parts.append(reference_lora_linear(x, W[own], bias[own], down, factor, scales[i]))
        begin += w * r
    torch.testing.assert_close(packed_lora(x, W, bias, A, B, table, scales, widths), torch.cat(parts, 1))


def test_a_table_has_as_many_blocks_whatever_the_ranks() -> None:
    assert sibling_table([258, 128, 5], [8, 8, 8]).shape == sibling_table([258, 128, 5], [0, 64, 3]).shape == (5, 8)
    assert sibling_table([258, 64], [8, 3]).tolist() == [
        [0, 128, 0, 258, 0, 8, 0, 0],
        [128, 128, 128, 258, 0, 8, 0, 0],
        [256, 2, 256, 258, 0, 8, 0, 0],
        [258, 64, 0, 64, 8, 3, 2064, 1],
    ]
    with pytest.raises(BackendError, match="expected a rank for each width, found 1 for 2"):
        sibling_table([130, 64], [8])


@pytest.mark.parametrize("types", [*((t, t) for t in DTYPES), (torch.bfloat16, torch.float32)])
def test_the_op_is_what_its_schema_says(types) -> None:
    utils = "test_schema", "test_faketensor"
    torch.library.opcheck(torch.ops.adaptc.packed_lora, arguments(*types), test_utils=utils)


def test_gradients_are_those_of_the_definition() -> None:
    given = arguments(torch.float64)
    learned = [t.clone().requires_grad_() for t in given[:5]]
    assert torch.autograd.gradcheck(lambda *t: packed_lora(*t, *given[5:]), learned)
    assert torch.autograd.gradcheck(lambda *t: packed_lora_direct(*t, *given[5:]), learned)
    assert torch.equal(packed_lora_direct(*given), packed_lora(*given))


@pytest.mark.parametrize(
    ("place", "other", "message"),
    [
        (0, torch.zeros(7), r"expected x of shape \(M, K\), found \(7,\)"),
        (1, torch.zeros(78, 6), r"expected W of shape \(78, 7\), found \(78, 6\)"),
        (1, torch.zeros(78, 7, dtype=torch.float16), r"expected W of x's type torch.float32.*found torch.float16"),
        (2, torch.zeros(7), r"expected a bias of shape \(78,\), found \(7,\)"),
        (2, torch.zeros(78, dtype=torch.float16), "expected a bias of W's type torch.float32.*found torch.float16"),
        (2, torch.zeros(156)[::2], r"expected a contiguous bias, found \(2,\)"),
        (3, torch.zeros(9, 6), r"expected A of shape \(R, 7\), found \(9, 6\)"),
        (3, torch.zeros(7, 9).t(), r"expected a contiguous A, found \(1, 9\)"),
        (4, torch.zeros(5, 3), r"expected a contiguous B of one axis, found \(5, 3\)"),
        (4, torch.zeros(149, dtype=torch.float16), "expected B of A's type torch.float32.*found torch.float16"),
        (5, None, "expected a table, since there are several layers, found None"),
        (5, torch.zeros(3, 8, dtype=torch.int32), "expected a contiguous table of int64, found torch.int32"),
        (5, sibling_table([70, 5], [2, 0]), r"expected a table of shape \(3, 8\), found \(2, 8\)"),
        (6, torch.zeros(3), r"expected scales of shape \(4,\), found \(3,\)"),
        (6, torch.zeros(8)[::2], "expected contiguous scales"),
        (6, torch.zeros(4, device="meta"), "expected scales on cpu.*found meta"),
    ],
)
def test_the_op_refuses_what_it_is_not_defined_for(place, other, message) -> None:
    given = arguments(torch.float32)
    given[place] = other
    with pytest.raises(BackendError, match=f"packed_lora: {message}"):
        packed_lora(*given)


def test_a_layer_without_a_table_has_all_of_b() -> None:
    given = arguments(torch.float32, widths=[5], ranks=[3])
    given[4] = given[4][:-1]
    with pytest.raises(BackendError, match="expected B of 15 elements, found 14"):
        packed_lora(*given)


def names(kernels: list[FakeKernel]) -> list[str]:
    return sorted(k.name for k in kernels)


@pytest.mark.parametrize("widths", [[4096], [4096, 1024, 1024], [70, 5, 3]], ids=["one", "siblings", "ragged"])
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_swaps_and_batches_compile_four_kernels_once(types, widths) -> None:
    """By the keys of Triton's own binder. The first call compiles them all."""
    with fake_gpu() as compiled:
        given = arguments(*types, 1, widths, [16] * len(widths), K=64)
        packed_lora(*given)
        assert names(compiled) == FOUR
        with adaptc.debug.assert_no_recompiles():
            for rank in (1, 2, 3, 8, 15, 16, 17, 32, 48, 64, 100, 128):
                ranks = [rank, *(0 for _ in widths)][: len(widths)]
                _, _, _, *rest = arguments(*types, 1, widths, ranks, K=64)
                for rows in (1, 2, 7, 15, 16, 17, 31, 64, 512, 4097):
                    packed_lora(torch.randn(rows, 64).to(types[0]), *given[1:3], *rest)
        assert names(compiled) == FOUR
        by_name = {k.name: len(k.launches) for k in compiled}
        assert by_name == {**dict.fromkeys(FOUR[1:3], 12 * 5 + 1), **dict.fromkeys((FOUR[0], FOUR[3]), 12 * 5)}


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("widths", [[256], [256, 64]], ids=["one", "siblings"])
def test_bound_kernels_may_be_used_for_any_rank_and_batch(widths, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton, asked anew in each launch, finds the same kernel: nothing in it was taken for granted of the first."""
    monkeypatch.setattr(MODULE._Plan, "_bind_kernels", lambda *_: None)
    with fake_gpu() as compiled:
        for rank in (1, 3, 8, 16, 17, 64, 100):
            given = arguments(torch.bfloat16, None, 1, widths, [rank, 5][: len(widths)], K=64)
            for rows in (1, 2, 16, 17, 40, 600):
                packed_lora(torch.randn(rows, 64).bfloat16(), *given[1:])
        assert names(compiled) == FOUR


def test_a_kernel_that_triton_compiles_is_a_recompilation() -> None:
    def first_call() -> None:
        with adaptc.debug.assert_no_recompiles():
            packed_lora(*arguments(torch.bfloat16))

    with fake_gpu():
        with pytest.raises(RecompileError, match="4 compilations took place"):
            first_call()
        first_call()


def test_arguments_are_checked_once_for_each_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    check = MODULE._check
    monkeypatch.setattr(MODULE, "_check", lambda x, *rest: (checked.append(x.shape[0]), check(x, *rest)))
    with fake_gpu():
        given = arguments(torch.bfloat16)
        for rows in (1, 2, 40):
            packed_lora(torch.zeros(rows, 7).bfloat16(), *given[1:])
        assert checked == [1]
        with pytest.raises(BackendError, match="expected W of shape"):
            packed_lora(torch.zeros(1, 8).bfloat16(), *given[1:])
        moved = given[1].clone()
        given[1].data = moved  # as where weights move into a buffer
        packed_lora(torch.zeros(3, 7).bfloat16(), *given[1:])
        assert checked == [1, 1, 3]
        other = arguments(torch.bfloat16, rows=5)
        packed_lora(*given[:4], other[4], *given[5:])
        assert checked == [1, 1, 3, 4]
        assert len(_PLANS) == 2
        del given, other
        gc.collect()
        assert not _PLANS


def test_rows_that_lie_apart_are_copied_and_a_turned_weight_goes_to_the_library() -> None:
    with fake_gpu() as compiled:
        given = arguments(torch.bfloat16, widths=[64], ranks=[8], K=64)
        turned = [given[0], torch.randn(64, 64).bfloat16().t(), *given[2:]]
        packed_lora(*turned)
        assert {k.name: len(k.launches) for k in compiled} == dict(zip(FOUR, (1, 0, 0, 1), strict=True))
        packed_lora(*given)
        assert sum(len(k.launches) for k in compiled if k.name.startswith("_few")) == 2


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("launch", [_packed_products.launch_few_rows, _packed_products.launch_update])
def test_the_second_kernel_starts_early_where_the_first_lets_it(launch: Any, early: bool) -> None:
    launched: list[tuple[bool, bool]] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *_, **options: launched.append((options["EARLY"], options.get("launch_pdl", False)))

    x, W, bias, A, B, table, scales, widths = arguments(torch.bfloat16)
    layout = _packed_products.PackedLayout(W, bias, A, widths, lambda _: Kernel(), early)
    launch(layout, x, W, bias, A, B, table, scales)
    assert launched == [(early, False), (early, early)]


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("widths", [[70], [70, 5]], ids=["one", "siblings"])
def test_an_adapter_of_rank_zero_is_the_base_s_matmul(widths: list[int], rows: int) -> None:
    """No down projection is launched then, which a kernel that starts early would wait for."""
    with fake_gpu() as compiled:
        _, W, bias, *rest = arguments(torch.bfloat16, None, 1, widths, [0] * len(widths), K=64)
        x = torch.randn(rows, 64).bfloat16()
        found = packed_lora(x, W, bias, *rest)
        assert not any(k.launches for k in compiled)
    assert torch.equal(found, torch.nn.functional.linear(x, W, bias))
