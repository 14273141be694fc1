"""Swaps of rank: fake values follow, and are what a program injected with that rank would have."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.export import Dim, ExportedProgram

import adaptc
from adaptc import LoraConfig
from adaptc.methods.lora_family.lora import Lora
from adaptc.passes.adapt.inject import Inject
from adaptc.passes.adapt.respecialize import Respecialize
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import Op
from adaptc.passes.graph.symbolic_fakes import suppress_size_guards
from adaptc.passes.protocol.regions import node_tag, site_op
from tests.support.pass_checks import Snapshot, assert_valid, attach, describe, export, random_values, saved_and_loaded
from tests.support.site_cases import CASES


class Propagate(fx.Interpreter):
    """Runs a graph on its placeholders' fakes and compares values of regions with those the nodes carry."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if node_tag(n) is not None:
            assert text(value) == text(n.meta["val"]), n.format_node()
            self.compared += 1
        return value

    compared = 0


def text(t: Tensor) -> tuple[str, str, torch.dtype]:
    return str(tuple(t.shape)), str(t.stride()), t.dtype


def propagate(program: ExportedProgram) -> int:
    """How many region values were compared with those of a fresh run."""
    graph = program.graph
    fakes = [n.meta["val"] for n in graph.find_nodes(op="placeholder")]
    interpreter = Propagate(program.graph_module)
    with LiftedProgram(program).fake_mode, suppress_size_guards(fakes), enable_python_dispatcher():
        interpreter.run(*fakes, enable_io_processing=False)
    return interpreter.compared


def names_of(lifted: LiftedProgram) -> dict[str, str]:
    return {fqn: node.name for fqn, node in lifted.placeholders.items()}


NAMES = [
    "linear",
    "linear_4d",
    "addmm",
    "embedding",
    "twice",
    "tied_both",
    "conv1d",
    "conv2d_same",
    "conv3d",
    "conv1d_groups",
    "conv2d_groups",
    "mha",
    "lstm",
    "lora_bias",
]


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights")
@pytest.mark.filterwarnings("ignore:Recurrent was captured for some sizes alone")  # an LSTM's time
@pytest.mark.parametrize("name", NAMES)
def test_swaps_of_rank(name: str) -> None:
    """Up and down, through ``swap``: the program is valid, saves, and every value is what a fresh run gives."""
    case = CASES[name]
    ranks = [2, 6, 4] if name == "conv2d_groups" else [3, 9, 6]
    programs = [
        adaptc.compile(case.model(), LoraConfig(**{**case.config, "r": r}), example_inputs=case.args(3)) for r in ranks
    ]
    program = programs[0]
    args = case.args(5)
    for other in [*programs[1:], programs[1], programs[0]]:
        binding, expected = other.binding, adaptc.merge(other)(*args)
        adaptc.swap(program, binding)
        assert_valid(program)
        assert propagate(program) > 0
        torch.testing.assert_close(program.module()(*args), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(saved_and_loaded(program).module()(*args), expected, rtol=1e-9, atol=1e-9)


class Sequenced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(29, 6)
        self.conv = nn.Conv1d(6, 9, 3, padding="same")
        self.head = nn.Linear(9, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(self.embed(ids).mT).mT))


@pytest.mark.few(4)
@pytest.mark.parametrize("forms", ["apply", "weight"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["", "dynamic"])
@pytest.mark.parametrize("ranks", [(3, 5), (5, 3), (1, 7), (7, 1), (1, 2)], ids=str)
def test_as_if_injected_with_that_rank(ranks: tuple[int, int], dynamic: bool, forms: str) -> None:
    ids = torch.tensor([[1, 2, 3, 4], [28, 6, 7, 8], [0, 0, 9, 11]])
    shapes = ({0: Dim("batch", max=61), 1: Dim("length", min=3, max=59)},) if dynamic else None
    program = export(Sequenced(), ids, dynamic_shapes=shapes)

    def injected(rank: int) -> tuple[ExportedProgram, Any, dict[str, Tensor]]:
        fqns = ["embed.weight", "conv.weight", "head.weight"]
        attachments = [attach(program, f, Lora(r=rank, alpha=5), form=forms) for f in fqns]
        values = random_values(program, attachments, seed=rank)
        result = Inject(attachments, values)(program)
        return result.program, result.data, values

    first, done, _ = injected(ranks[0])
    second, _, values = injected(ranks[1])
    before = Snapshot.record(first)
    lifted = LiftedProgram(first)
    ops = {a.id: site_op(lifted, a) for a in done}
    for fqn in values:
        lifted.state_dict[fqn] = second.state_dict[fqn]
    count = Respecialize(done, ops, names_of(lifted), second.state_dict)(lifted.graph).count
    assert count == 3
    changed = lifted.finish()
    assert_valid(changed)
    before.check(first)
    assert [describe(n) for n in changed.graph.nodes] == [describe(n) for n in second.graph.nodes]
    assert propagate(changed) == sum(node_tag(n) is not None for n in changed.graph.nodes)
    assert torch.equal(changed.module()(ids), second.module()(ids))


def test_nothing_to_do_when_shapes_stay() -> None:
    program = export(nn.Linear(7, 5), torch.randn(3, 7))
    a = attach(program, "weight")
    result = Inject([a], random_values(program, [a]))(program)
    lifted = LiftedProgram(result.program)
    ops: dict[str, Op] = {b.id: site_op(lifted, b) for b in result.data}
    other = random_values(program, [a], seed=1)
    assert Respecialize(result.data, ops, names_of(lifted), other)(lifted.graph).count == 0
    Snapshot.record(result.program).check(lifted.finish())


def test_only_the_sites_that_change() -> None:
    program = export(nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)), torch.randn(3, 7))
    attachments = [attach(program, f) for f in ("0.weight", "1.weight")]
    result = Inject(attachments, random_values(program, attachments))(program)
    lifted = LiftedProgram(result.program)
    ops = {a.id: site_op(lifted, a) for a in result.data}
    wider = [dataclasses.replace(attachments[1], method=Lora(r=6, alpha=5))]
    other = random_values(program, wider)
    traces: dict[Any, Any] = {}
    changed = [Respecialize(result.data, ops, names_of(lifted), other, traces)(lifted.graph).count]
    shapes = {n.name: tuple(n.meta["val"].shape) for n in lifted.graph.nodes if (node_tag(n) or {}).get("role") == "0"}
    assert set(shapes.values()) == {(3, 3), (3, 6)}
    back = random_values(program, attachments)
    changed.append(Respecialize(result.data, ops, names_of(lifted), back, traces)(lifted.graph).count)
    assert len(traces) == 2
    changed.append(Respecialize(result.data, ops, names_of(lifted), other, traces)(lifted.graph).count)
    assert len(traces) == 2
    assert changed == [1, 1, 1]
