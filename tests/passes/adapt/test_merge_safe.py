"""Results that are not finite: refused by name and without a trace, or kept when asked for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from adaptc.errors import MergeError
from adaptc.methods.lora_family.lora import Lora
from adaptc.passes.adapt.inject import Inject
from adaptc.passes.adapt.merging.merge_pass import Merge
from adaptc.passes.protocol.attachment import Attachment
from tests.support.pass_checks import Snapshot, attach, export, inject, random_values

NAN, INF = float("nan"), float("inf")


def two_layers(dtype: torch.dtype) -> ExportedProgram:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 5, dtype=dtype), nn.Linear(5, 3, dtype=dtype))
    return export(model, torch.randn(2, 7, dtype=dtype))


def adapted(
    dtype: torch.dtype, **method: Any
) -> tuple[ExportedProgram, list[Attachment], dict[str, Tensor], tuple[str, str]]:
    """A program, with sound values, and the FQNs of the second layer's A and B."""
    program, done, values = inject(two_layers(dtype), "0.weight", "1.weight", method=Lora(r=3, alpha=5, **method))
    A, B, *_ = done[1].slots.values()
    return program, done, values, (A, B)


SPOILS: dict[str, Any] = {
    "nan in A": (0, (1, 2), NAN),
    "nan in B": (1, (0, 2), NAN),
    "inf in B": (1, (2, 0), INF),
    "-inf in A": (0, (0, 0), -INF),
    "overflow": (1, (1, 1), 3e38),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", list(SPOILS))
def test_results_that_are_not_finite(name: str, dtype: torch.dtype) -> None:
    program, done, values, slots = adapted(dtype)
    which, where, value = SPOILS[name]
    bad = values[slots[which]].clone()
    bad[where] = value
    values[slots[0]] = values[slots[0]].sign() * 7  # so that 3e38 in B must overflow
    values = {**values, slots[which]: bad} if which else {**values, slots[0]: bad}
    before = Snapshot.record(program)
    released: list[str] = []
    with pytest.raises(MergeError, match=r"merging '1.weight\|lora'.*'1.weight'.*not finite in torch.*safe=False"):
        Merge(done, values, release=released.append)(program)
    assert released == []
    before.check(program)
    result = Merge(done, values, safe=False)(program)
    before.check(program)
    state = result.program.state_dict
    assert torch.isfinite(state["0.weight"]).all()
    assert not torch.isfinite(state["1.weight"]).all()
    assert torch.isfinite(state["1.weight"]).any()


def test_overflow_of_the_dtype_alone() -> None:
    """A result that float32 holds and float16 does not."""
    program, done, values, (A, B) = adapted(torch.float16)
    values |= {A: torch.full_like(values[A], 200.0), B: torch.full_like(values[B], 200.0)}
    with pytest.raises(MergeError, match=r"1.weight.*not finite in torch.float16"):
        Merge(done, values)(program)
    merged = Merge(done, values, safe=False)(program).program
    assert torch.isinf(merged.state_dict["1.weight"]).all()
    program, done, values, (A, B) = adapted(torch.float32)
    values |= {A: torch.full_like(values[A], 200.0), B: torch.full_like(values[B], 200.0)}
    assert torch.isfinite(Merge(done, values)(program).program.state_dict["1.weight"]).all()


@pytest.mark.parametrize("value", [NAN, INF])
def test_biases_that_are_not_finite(value: float) -> None:
    program, done, values, _ = adapted(torch.bfloat16, with_bias=True)
    slot = done[1].slots["lora_B.bias"]
    values[slot] = torch.tensor([1.0, value, 2.0])
    before = Snapshot.record(program)
    with pytest.raises(MergeError, match=r"'1.weight\|lora'.*'1.bias'.*not finite"):
        Merge(done, values)(program)
    before.check(program)
    bias = Merge(done, values, safe=False)(program).program.state_dict["1.bias"]
    assert torch.isfinite(bias).tolist() == [True, False, True]


def test_a_base_that_is_not_finite() -> None:
    """It is the result that counts: a base with an infinite weight is no more merged than a bad adapter."""
    program = two_layers(torch.float32)
    program.state_dict["0.weight"].data[2, 3] = INF
    changed, done, values = inject(program, "0.weight")
    with pytest.raises(MergeError, match=r"'0.weight'"):
        Merge(done, values)(changed)
    assert Merge(done, values, safe=False)(changed).program.state_dict["0.weight"][2, 3] == INF


@dataclasses.dataclass(frozen=True)
class Unmergeable(Lora):
    def check_merge(self, op: Any) -> str | None:
        return "it is only a test"


def test_methods_that_cannot_be_merged() -> None:
    program = two_layers(torch.float32)
    attachments = [attach(program, "0.weight"), attach(program, "1.weight", Unmergeable(r=3))]
    values = random_values(program, attachments)
    result = Inject(attachments, values)(program)
    before = Snapshot.record(result.program)
    released: list[str] = []
    with pytest.raises(MergeError, match=r"'1.weight\|lora' cannot be merged: it is only a test"):
        Merge(result.data, values, release=released.append)(result.program)
    assert released == []
    before.check(result.program)
