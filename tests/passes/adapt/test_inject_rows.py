"""Injection of several adapters at once: what comes into a program, what it computes, and where it must not fire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from transformers.pytorch_utils import Conv1D

from adaptc.errors import ConfigError, TargetError
from adaptc.passes.adapt.inject import Inject
from adaptc.passes.adapt.inject_rows import InjectRows, site_consumers
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.protocol.bank_method import RowAxis
from tests.support.custom_models import SharedLayers
from tests.support.pass_checks import Snapshot, assert_valid, attach, export, random_values, saved_and_loaded

COUNT = 2
#: model, input, parameters with LoRA, and how many layers read them
NETS: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str], int]] = {
    "linear": (lambda: nn.Linear(7, 5), torch.randn(4, 3, 7), ["weight"], 1),
    "conv": (lambda: nn.Conv2d(3, 7, (3, 1), padding=1), torch.randn(4, 3, 5, 7), ["weight"], 1),
    "groups": (lambda: nn.Conv1d(6, 9, 3, groups=3), torch.randn(4, 6, 7), ["weight"], 1),
    "embedding": (lambda: nn.Embedding(29, 5), torch.randint(29, (4, 3)), ["weight"], 1),
    "addmm": (lambda: Conv1D(5, 7), torch.randn(4, 7), ["weight"], 1),
    "transposed": (lambda: nn.ConvTranspose1d(3, 5, 3), torch.randn(4, 3, 7), ["weight"], 1),
    "twice": (SharedLayers, torch.randn(4, 7), ["up.weight", "down.weight"], 4),
}


class Rows:
    """A program with rows for two adapters, and its parts."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(3)
        build, x, fqns, self.consumers = NETS[name]
        self.x, model = x, build().eval()
        free = ({0: Dim("b", max=9)},)
        self.plain = export(model, x, dynamic_shapes=free)
        self.attachments = [attach(self.plain, f, consumers=attach(self.plain, f).consumers) for f in fqns]
        self.each = [random_values(self.plain, self.attachments, seed) for seed in range(COUNT)]
        self.injected = [Inject(self.attachments, v)(self.plain) for v in self.each]
        self.attachments = list(self.injected[0].data)
        stacks = {f: torch.stack([v[f] for v in self.each]) for f in self.each[0]}
        (user,) = self.plain.graph_signature.user_inputs
        axes = {n.name: RowAxis(0) for n in self.plain.graph.nodes}
        self.before = Snapshot.record(self.plain)
        self.result = InjectRows(self.attachments, stacks, axes, (str(user), 0), COUNT, "coefficients")(self.plain)
        self.program: ExportedProgram = self.result.output

    def __call__(self, c: Any, program: ExportedProgram | None = None) -> Tensor:
        module = (program or self.program).module()
        return module(self.x, coefficients=torch.as_tensor(c, dtype=torch.float32))


@pytest.mark.parametrize("name", list(NETS))
def test_rows_are_those_of_each_adapter(name: str) -> None:
    rows = Rows(name)
    assert_valid(rows.program)
    rows.before.check(rows.plain)
    assert rows.result.count == len(rows.attachments)
    alone = [r.program.module()(rows.x) for r in rows.injected]
    base = rows.plain.module()(rows.x)
    assert torch.equal(rows([[0, 0]] * 4), base)
    found = rows([[1, 0], [0, 0], [0, 1], [1, 0]])
    want = torch.stack([alone[0][0], base[1], alone[1][2], alone[0][3]])
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1], base[1])
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)
    torch.testing.assert_close(rows([[1, 0]] * 4, saved_and_loaded(rows.program)), alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(NETS))
def test_what_comes_into_the_program(name: str) -> None:
    """Plain ATen behind each layer that reads a site, one more input, and nothing else: all nodes there were stay."""
    rows = Rows(name)
    old, new = [{n.name: n for n in p.graph.nodes} for p in (rows.plain, rows.program)]
    assert set(old) <= set(new)
    for node in rows.program.graph.nodes:
        if node.op == "call_function":
            assert isinstance(node.target, torch._ops.OpOverload)
            assert node.target.namespace == "aten"
            assert node.name in old or "custom" not in node.meta
            assert "val" in node.meta
    inputs = [s.arg.name for s in rows.program.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
    assert inputs[-1] == "coefficients"
    assert tuple(new["coefficients"].meta["val"].shape)[1] == COUNT
    assert new["coefficients"].meta["val"].shape[0] == new[inputs[0]].meta["val"].shape[0]
    assert set(rows.program.state_dict) == {*rows.plain.state_dict, *rows.each[0]}
    lifted = LiftedProgram(rows.plain, edit=False)
    assert sum(len(site_consumers(lifted, a)) for a in rows.attachments) == rows.consumers


@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights")
def test_a_layer_with_several_results_is_refused() -> None:
    program = export(nn.GRU(7, 5, batch_first=True).eval(), torch.randn(4, 3, 7))
    a = attach(program, "weight_hh_l0")
    stacks = {f: torch.stack([v, v]) for f, v in random_values(program, [a]).items()}
    axes = {n.name: RowAxis(0) for n in program.graph.nodes}
    before = Snapshot.record(program)
    with pytest.raises(TargetError, match=r"weight_hh_l0.*for each row.*layer with several results.*prog\.bind"):
        InjectRows([a], stacks, axes, ("input", 0), COUNT, "coefficients")(program)
    before.check(program)


def test_a_keyword_that_is_taken_is_refused() -> None:
    rows = Rows("linear")
    with pytest.raises(ConfigError, match="called 'linear' already"):
        InjectRows(
            rows.attachments,
            {f: torch.stack([v, v]) for f, v in rows.each[0].items()},
            {n.name: RowAxis(0) for n in rows.plain.graph.nodes},
            (str(rows.plain.graph_signature.user_inputs[0]), 0),
            COUNT,
            "linear",
        )(rows.plain)
