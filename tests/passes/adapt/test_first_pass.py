"""A pass of the base inside a program: what is copied with a node, and what cannot be done twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from adaptc.errors import TargetError
from adaptc.passes.adapt.duplicate_base_pass import add_second_cache, duplicate_before_graph
from adaptc.passes.analysis.cache_inputs import count_passes
from adaptc.passes.graph.lifted import LiftedProgram


class Hidden(nn.Module):
    """Two layers, whose second one's input is written to through a view. ``counts``: a buffer is written to, too, in
    front of the first layer, itself or through a view, or behind the second."""

    def __init__(self, counts: str = "") -> None:
        super().__init__()
        self.counts, self.down, self.up = counts, nn.Linear(5, 7), nn.Linear(7, 3)
        self.register_buffer("seen", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        if self.counts == "before":
            x = x + self.seen.add_(1)
        if self.counts == "through a view":
            self.seen.view(-1).add_(1)
            x = x + self.seen
        h = self.down(x)
        h.view(-1).mul_(2)
        y = self.up(h)
        return y + self.seen.add_(1).sum() if self.counts == "after" else y


def opened(counts: str = "") -> tuple[LiftedProgram, fx.Node]:
    """The program, and the node of its last layer's input."""
    torch.manual_seed(0)
    lifted = LiftedProgram(torch.export.export(Hidden(counts).eval(), (torch.randn(2, 5),)))
    lifted.freeze()
    last = [n for n in lifted.graph.nodes if "linear" in str(n.target)][-1]
    return lifted, last.all_input_nodes[0]


def tag(role: str) -> dict[str, Any]:
    return {"role": role}


@pytest.mark.parametrize("counts", ["", "after"])
def test_what_a_node_is_computed_with_is_copied(counts: str) -> None:
    """With what writes to its memory on the way: both passes give the same. What is behind it does not matter."""
    lifted, node = opened(counts)
    before = len(lifted.graph.nodes)
    made, copies = duplicate_before_graph(lifted, node, tag)
    assert made is not node
    names = [str(n.target) for n in copies]
    assert [n for n in names if "linear" in n] == ["aten.linear.default"]
    assert any("mul" in n for n in names)
    assert not any("add" in n for n in names)
    assert len(lifted.graph.nodes) == before + len(copies)
    lifted.graph.output_node().args = ((made, node),)
    x = torch.randn(2, 5)
    held = {n.name: lifted.input_specs[n.name].target for n in lifted.graph.find_nodes(op="placeholder")}
    inputs = [x if fqn is None else lifted.tensor(fqn) for fqn in held.values()]
    first, own = fx.GraphModule(nn.Module(), lifted.graph)(*inputs)
    assert torch.equal(first, own)
    torch.manual_seed(0)
    torch.testing.assert_close(first, 2 * Hidden(counts).down(x))


@pytest.mark.parametrize("counts", ["before", "through a view"])
def test_what_outlives_a_call_is_not_written_twice(counts: str) -> None:
    lifted, node = opened(counts)
    with pytest.raises(TargetError, match="writes to what outlives the call, so a first pass of it would change"):
        duplicate_before_graph(lifted, node, tag)


class Steps(nn.Module):
    """One layer of attention over a cache, of which the values are read as the input itself. ``last``: the hidden state
    is of what was there before, and the cache is written to behind it."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.last, self.up = last, nn.Linear(5, 3)

    def forward(self, x: Tensor, slots: Tensor, keys_0: Tensor, values_0: Tensor) -> Tensor:
        keys = keys_0.clone() if self.last else keys_0.index_copy_(1, slots, 2 * x)
        if not self.last:
            values_0.view(values_0.shape).index_copy_(1, slots, x + 1)
        h = torch.softmax(x @ keys.transpose(1, 2), -1) @ values_0
        if self.last:
            keys_0.index_copy_(1, slots, h)
            values_0.index_copy_(1, slots, x + 1)
        return self.up(h)


@pytest.mark.parametrize("last", [False, True])
def test_a_first_pass_of_a_step_has_a_cache_of_its_own(last: bool) -> None:
    """As many inputs more, of the same sizes, in which it writes what the program writes in its own."""
    torch.manual_seed(0)
    dim = torch.export.Dim("length")
    example = {"x": torch.randn(2, 3, 5), "slots": torch.tensor([1, 2, 3])}
    example |= {n: torch.randn(2, 7, 5) for n in ("keys_0", "values_0")}
    shapes = {"x": None, "slots": None, "keys_0": {1: dim}, "values_0": {1: dim}}
    model = Steps(last).eval()
    program = torch.export.export(model, (), example, dynamic_shapes=shapes)
    lifted = LiftedProgram(program)
    lifted.freeze()
    node = next(n for n in lifted.graph.nodes if "linear" in str(n.target)).all_input_nodes[0]
    made, _ = duplicate_before_graph(lifted, node, tag, add_second_cache(lifted))
    names = [n.name for n in lifted.graph.find_nodes(op="placeholder")][-2:]
    assert names == ["first_keys_0", "first_values_0"]
    assert count_passes(names) == 2
    more = add_second_cache(LiftedProgram(lifted.finish()))
    assert [n.name for n in more.values()] == ["first2_keys_0", "first2_values_0"]
    lifted.graph.output_node().args = ((made, node),)
    given = {n: torch.randn(2, 9, 5) for n in ("keys_0", "values_0")}
    inputs = {n: given[n.removeprefix("first_")].clone() for n in (*given, *names)}
    held = [n.name for n in lifted.graph.find_nodes(op="placeholder")]
    known = {**example, **inputs}
    values = [known[n] if n in known else lifted.tensor(lifted.input_specs[n].target) for n in held]  # type: ignore[arg-type]
    first, own = fx.GraphModule(nn.Module(), lifted.graph)(*values)
    assert torch.equal(first, own)
    for name, before in given.items():
        assert torch.equal(inputs[name], inputs[f"first_{name}"])
        assert not torch.equal(inputs[name], before)
