"""Merging in place: what the ops are to torch, what they refuse, and their meaning where no kernel runs."""

from __future__ import annotations

import pytest
import torch

from adaptc.errors import BackendError
from adaptc.kernels import merge_weight as merge
from adaptc.kernels.merge_weight import merge_, merge_saving_, reference_merge, unmerge_
from tests.kernels import run_cases
from tests.kernels.matrices import DTYPES, matrix
from tests.kernels.on_gpu import guards_of_launch

HALF = torch.tensor(0.5)


@pytest.mark.long
def test_kernels_interpreted() -> None:
    run_cases("merge")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_off_the_gpu_the_result_is_the_reference(dtype) -> None:
    W, A, B = matrix(5, 7, dtype, "wider"), matrix(3, 7, dtype), matrix(5, 3, dtype)
    before, expected = W.clone(), reference_merge(W, A, B, HALF)
    saved = merge_saving_(W, A, B, 0.5)
    assert torch.equal(W, expected)
    assert torch.equal(saved, before)
    unmerge_(W, saved)
    assert torch.equal(W, before)
    merge_(W, A, B, HALF)
    assert torch.equal(W, expected)


def test_the_reference_sums_in_float32_and_rounds_once() -> None:
    # In bfloat16 1 + 2^-9 is 1, twice over; the sum of both and one is not.
    W, A, B = torch.ones(1, 1, dtype=torch.bfloat16), torch.full((2, 1), 2.0**-9), torch.ones(1, 2)
    assert reference_merge(W, A.bfloat16(), B.bfloat16(), torch.tensor(1.5)).item() == 1.0078125


@pytest.mark.parametrize("op", [merge._merge_op, merge._merge_saving_op])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ops_are_what_their_schemas_say(op, dtype) -> None:
    torch.library.opcheck(op, (matrix(5, 7, dtype, "wider"), matrix(3, 7, dtype), matrix(5, 3, dtype), HALF))


def test_a_parameter_is_merged_without_autograd_and_its_version_moves() -> None:
    W = torch.nn.Parameter(torch.randn(5, 7))
    version = W._version
    saved = merge_saving_(W, torch.randn(3, 7), torch.randn(5, 3), 1.0)
    assert W.is_leaf
    assert W.requires_grad
    assert W._version > version
    assert not saved.requires_grad


def test_compiled_programs_merge_and_undo() -> None:
    def both(W, A, B, scale):
        saved = merge_saving_(W, A, B, scale)
        merged = W * 1
        unmerge_(W, saved)
        return merged

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=True)
    W = matrix(5, 7, torch.bfloat16)
    for rank in (3, 4, 8):
        A, B = matrix(rank, 7, torch.bfloat16), matrix(5, rank, torch.bfloat16)
        before = W.clone()
        assert torch.equal(compiled(W, A, B, HALF), reference_merge(before, A, B, HALF))
        assert torch.equal(W, before)


def test_a_launch_on_a_gpu_holds_for_all_ranks() -> None:
    def launch(W, A, B, scale):
        merge._launch(W, None, A, B, scale)

    assert not guards_of_launch(launch, [(200, 136), (24, 136), (200, 24), ()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W": torch.zeros(5)}, r"expected W of shape \(out, in\), found \(5,\)"),
        ({"A": torch.zeros(3, 6)}, r"expected A of shape \(r, 7\), found \(3, 6\)"),
        ({"A": torch.zeros(7)}, r"expected A of shape \(r, 7\), found \(7,\)"),
        ({"B": torch.zeros(3, 5)}, r"expected B of shape \(5, 3\), found \(3, 5\)"),
        ({"B": torch.zeros(5, 3, dtype=torch.int32)}, "expected B in float32, bfloat16 or float16.*found torch.int32"),
        ({"A": torch.zeros(3, 7, device="meta")}, "expected A on cpu, where the other tensors are, found meta"),
        ({"W": torch.zeros(7).expand(5, 7)}, "memory of its own for each element"),
    ],
)
@pytest.mark.parametrize("call", [merge_, merge_saving_])
def test_refuses_what_it_is_not_defined_for(call, change, message) -> None:
    given = {"W": torch.zeros(5, 7), "A": torch.ones(3, 7), "B": torch.ones(5, 3), "scale": 1.0} | change
    with pytest.raises(BackendError, match=rf"{call.__name__}: .*{message}"):
        call(**given)
    assert not given["W"].any()


def test_refuses_a_scale_of_several_numbers() -> None:
    W = torch.zeros(5, 7)
    with pytest.raises(BackendError, match=r"scale: expected a number or a 0-d tensor, found a tensor of shape \(2,\)"):
        merge_(W, torch.ones(3, 7), torch.ones(5, 3), torch.zeros(2))
    assert not W.any()


def test_undoing_refuses_what_would_not_be_exact() -> None:
    W = torch.zeros(5, 7, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match=r"expected saved values in torch.bfloat16.*found torch.float32"):
        unmerge_(W, torch.ones(5, 7))
    with pytest.raises(BackendError, match=r"expected saved values of shape \(5, 7\), found \(1, 7\)"):
        unmerge_(W, torch.ones(1, 7, dtype=torch.bfloat16))
    assert not W.any()
