"""Merge: the weights it makes, bit by bit, and what it tells of them."""

from __future__ import annotations

from math import isnan
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

from adaptc.errors import MergeError
from adaptc.methods import TokenRows, TrainedParameter
from adaptc.methods.lora_family.lora import Lora
from adaptc.passes.adapt.merging.merge_pass import Merge
from adaptc.passes.protocol.regions import node_tag
from tests.support.custom_models import Shared, Tied
from tests.support.pass_checks import Snapshot, attach, export, factors, inject, inject_all

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
IDS = torch.tensor([[1, 2, 28], [5, 0, 3]])


def linear(dtype: torch.dtype, bias: bool = True, sizes: tuple[int, int] = (7, 5)) -> ExportedProgram:
    torch.manual_seed(sizes[0])
    return export(nn.Linear(*sizes, bias=bias, dtype=dtype), torch.randn(3, sizes[0], dtype=dtype))


def merge(program: ExportedProgram, done: Any, values: dict[str, Tensor], **options: Any) -> Any:
    before = Snapshot.record(program)
    result = Merge(done, values, **options)(program)
    before.check(program)
    return result


@given(st.sampled_from(DTYPES), st.integers(1, 11), st.integers(1, 13), st.integers(1, 5), st.floats(0.01, 30))
def test_rounded_once(dtype: torch.dtype, n: int, m: int, rank: int, alpha: float) -> None:
    """W + s B A in float32, or float64 for float64, and then one cast."""
    program = linear(dtype, sizes=(n, m))
    adapted, (a,), values = inject(program, "weight", method=Lora(r=rank, alpha=alpha))
    result = merge(adapted, [a], values)
    high = torch.float64 if dtype == torch.float64 else torch.float32
    A, B, _ = factors(a, values)
    base = program.state_dict["weight"].detach()
    exact = base.to(high).addmm(B.to(high) * values[a.scale_slot].to(high), A.to(high))
    merged = result.program.state_dict["weight"]
    terms = base.double().abs() + values[a.scale_slot].double() * (B.double().abs() @ A.double().abs())
    true = base.double() + values[a.scale_slot].double() * (B.double() @ A.double())
    assert bool(((exact.double() - true).abs() <= (rank + 3) * torch.finfo(high).eps * terms).all())
    assert merged.dtype == dtype
    assert torch.equal(merged, exact.to(dtype))
    assert result.program.state_dict["bias"] is adapted.state_dict["bias"]
    assert isinstance(merged, nn.Parameter)
    assert not merged.requires_grad
    (row,) = result.data
    assert (row.site, row.fqn, row.dtype) == (a.id, "weight", dtype)
    assert row.delta == float((exact - base.to(high)).abs().max())
    assert row.error == float((exact.to(dtype).to(high) - exact).abs().max())
    assert result.count == 1


def test_the_row_by_hand() -> None:
    program = linear(torch.bfloat16, sizes=(3, 2))
    program.state_dict["weight"].data.copy_(torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]))
    adapted, (a,), values = inject(program, "weight", method=Lora(r=1, alpha=2))
    A, B = a.slots.values()
    values |= {A: torch.tensor([[1.0, 0.5, 0.0]]), B: torch.tensor([[2.0**-10], [3.0]])}
    (row,) = merge(adapted, [a], values).data
    # row 0: 1 + 2**-9 and 2 + 2**-10 are rounded away; row 1: 8 + 6 and 16 + 3 are exact in bfloat16.
    assert (row.delta, row.error, row.untied) == (6.0, 2.0**-9, False)


def test_rows_are_of_the_weights_as_they_were() -> None:
    adapted, done, values = inject(linear(torch.float32), "weight", method=Lora(r=2, alpha=3))
    read, unread = (merge(adapted, done, values) for _ in range(2))
    delta = read.data[0].delta
    assert delta > 0
    for result in (read, unread):
        result.program.state_dict["weight"].zero_()
    assert read.data[0].delta == delta
    assert isnan(unread.data[0].delta)


def test_the_merged_program_is_plain() -> None:
    """No region, no slot, the graph of the base."""
    torch.manual_seed(0)
    x = torch.randn(3, 7)
    base = export(nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)), x)
    adapted, done, values = inject(base, "0.weight", "2.weight")
    result = merge(adapted, done, values)
    assert [r.fqn for r in result.data] == ["0.weight", "2.weight"]
    assert [n.name for n in result.program.graph.nodes] == [n.name for n in base.graph.nodes]
    assert not any(node_tag(n) for n in result.program.graph.nodes)
    assert result.program.graph_module.code == base.graph_module.code
    assert list(result.program.state_dict) == list(base.state_dict)
    torch.testing.assert_close(result.program.module()(x), adapted.module()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("options", [{"padding": "same"}, {"stride": 2, "padding": 1, "dilation": 2}])
def test_grouped_convolutions_become_dense(groups: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 13).double()
    layer = nn.Conv1d(6, 9, 3, groups=groups, **options).double()
    program = export(layer, x)
    adapted, (a,), values = inject(program, "weight")
    result = merge(adapted, [a], values)
    A, B = (values[f] for f in a.slots.values())
    blocks = torch.block_diag(*B.flatten(1).chunk(groups)) @ A.flatten(1)
    dense = torch.zeros(9, 6, 3).double()
    for i in range(9):
        first = i // (9 // groups) * (6 // groups)
        dense[i, first : first + 6 // groups] = layer.weight[i].detach()
    expected = dense + blocks.reshape(9, 6, 3) * 5 / 3
    torch.testing.assert_close(
        result.program.state_dict["weight"], nn.Parameter(expected, False), rtol=1e-13, atol=1e-13
    )
    out = F.conv1d(x, expected, layer.bias, **options)
    torch.testing.assert_close(result.program.module()(x), out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adapted.module()(x), out, rtol=1e-12, atol=1e-12)
    (row,) = result.data
    assert (row.delta == row.delta) == (groups == 1)  # a change of shape has no largest change of an element


@pytest.mark.parametrize("bias", [True, False])
def test_lora_bias(bias: bool) -> None:
    """The bias is changed, or comes to be: as a parameter, and in no other way."""
    program = linear(torch.bfloat16, bias)
    x = torch.randn(3, 7).bfloat16()
    adapted, (a,), values = inject(program, "weight", method=Lora(r=3, alpha=5, with_bias=True))
    merged = merge(adapted, [a], values).program
    delta = values[a.slots["lora_B.bias"]] * values[a.scale_slot]
    base = program.state_dict["bias"].float() if bias else 0
    assert set(merged.state_dict) == {"weight", "bias"}
    assert isinstance(merged.state_dict["bias"], nn.Parameter)
    assert torch.equal(merged.state_dict["bias"], (base + delta).bfloat16())
    out = F.linear(x, merged.state_dict["weight"], merged.state_dict["bias"])
    assert torch.equal(merged.module()(x), out)


class Busy(nn.Module):
    """Names that a new bias cannot take, and a bias that is computed, or read by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(7, 5, bias=False)
        self.computed = nn.Linear(7, 5)
        self.one, self.two = nn.Linear(7, 5), nn.Linear(7, 5)
        self.two.bias = self.one.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x) + F.linear(x, self.computed.weight, self.computed.bias * 2)
        return y + self.one(x) * self.two(x)


def busy() -> tuple[Tensor, ExportedProgram]:
    torch.manual_seed(4)
    x = torch.randn(3, 7).double()
    return x, export(Busy().double(), x)


def test_shared_biases_are_untied() -> None:
    x, program = busy()
    adapted, done, values = inject(program, "lin.weight", "two.weight", method=Lora(r=3, with_bias=True))
    merged = merge(adapted, done, values).program
    torch.testing.assert_close(merged.module()(x), adapted.module()(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(merged.state_dict["one.bias"], program.state_dict["one.bias"])
    assert not torch.equal(merged.state_dict["two.bias"], program.state_dict["one.bias"])
    assert merged.state_dict["lin.bias"].shape == (5,)


def test_computed_biases_are_refused() -> None:
    _, program = busy()
    fqns = ("lin.weight", "computed.weight")
    adapted, done, values = inject(program, *fqns, method=Lora(r=3, with_bias=True))
    released: list[str] = []
    with pytest.raises(MergeError, match=r"computed.weight\|lora.*bias is computed by 'mul'"):
        merge(adapted, done, values, release=released.append)
    assert released == []


def test_several_adapters_of_one_weight_are_rounded_once() -> None:
    program = export(nn.Embedding(29, 7, dtype=torch.bfloat16), IDS)
    attachments = [attach(program, "weight"), attach(program, "weight", TokenRows((2, 28)))]
    adapted, done, values = inject_all(program, attachments)
    result = merge(adapted, done, values)
    (row,) = result.data
    A, B, scale = factors(done[0], values)
    exact = program.state_dict["weight"].detach().float().t().addmm(B * scale, A).t()
    exact[[2, 28]] = values[done[1].slots[TokenRows().delta_slot]]
    assert torch.equal(result.program.state_dict["weight"], exact.bfloat16())
    assert row.error == float((exact.bfloat16().float() - exact).abs().max())


@pytest.mark.parametrize("fqns", [["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]])
def test_tied_weights_are_untied(fqns: list[str]) -> None:
    torch.manual_seed(3)
    program = export(Tied().double(), IDS)
    base = program.state_dict["embed.weight"]
    adapted, done, values = inject(program, *fqns)
    result = merge(adapted, done, values)
    assert [r.untied for r in result.data] == [True] + [False] * (len(fqns) - 1)
    state = result.program.state_dict
    for fqn in ("embed.weight", "head.weight"):
        (a,) = [a for a in done if a.fqn == fqn] or [None]
        if a is None:
            assert torch.equal(state[fqn], base)
            continue
        A, B, scale = factors(a, values)
        delta = (B @ A).T if a.kind == "embedding" else B @ A
        torch.testing.assert_close(state[fqn].detach(), base.detach() + delta * scale, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(result.program.module()(IDS), adapted.module()(IDS), rtol=1e-12, atol=1e-12)


def test_shared_weights() -> None:
    torch.manual_seed(3)
    x = torch.randn(3, 7).double()
    program = export(Shared().double(), x)
    adapted, done, values = inject(program, "second.weight", "back.weight")
    result = merge(adapted, done, values)
    assert {r.fqn: r.untied for r in result.data} == {"second.weight": True, "back.weight": False}
    assert torch.equal(result.program.state_dict["first.weight"], program.state_dict["first.weight"])
    torch.testing.assert_close(result.program.module()(x), adapted.module()(x), rtol=1e-12, atol=1e-12)


def test_sites_the_adapter_does_not_have_are_dropped() -> None:
    x, program = busy()
    adapted, (a, b), values = inject(program, "lin.weight", "one.weight")
    result = merge(adapted, [a], values, dropped_ids=[b.id])
    assert set(result.program.state_dict) == set(program.state_dict)
    assert torch.equal(result.program.state_dict["one.weight"], program.state_dict["one.weight"])
    alone, done, _ = inject(program, "lin.weight")
    torch.testing.assert_close(result.program.module()(x), merge(alone, done, values).program.module()(x))


class ChannelsLast(nn.Module):
    """A view that holds only while the convolution's output is laid out as its weight is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).permute(0, 2, 3, 1).view(-1)


def test_weights_keep_their_layout() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 5)
    program = export(ChannelsLast(), x)
    adapted, done, values = inject(program, "conv.weight")
    merged = merge(adapted, done, values).program
    assert merged.state_dict["conv.weight"].stride() == program.state_dict["conv.weight"].stride()
    torch.testing.assert_close(merged.module()(x), adapted.module()(x), rtol=1e-4, atol=1e-4)


def test_merged_weights_share_no_memory_with_slots() -> None:
    program = linear(torch.float32)
    method = TrainedParameter(shape=(5, 7), dtype=torch.float32)
    adapted, done, values = inject_all(program, [attach(program, "weight", method, kind="weight", form="weight")])
    merged = merge(adapted, done, values).program
    slot = values[done[0].slots["weight"]]
    assert torch.equal(merged.state_dict["weight"], slot)
    assert merged.state_dict["weight"].data_ptr() != slot.data_ptr()
    assert merged.state_dict["weight"].data_ptr() != adapted.state_dict[done[0].slots["weight"]].data_ptr()
