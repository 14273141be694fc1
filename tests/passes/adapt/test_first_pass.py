"""A pass of the base inside a program: what is copied with a node, and what cannot be done twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from adaptc.errors import TargetError
from adaptc.passes.adapt.first_pass import computed_before
from adaptc.passes.ir.lifted import Lifted


class Hidden(nn.Module):
    """Two layers, whose second one's input is written to through a view. ``counts``: a buffer is written to, too, in
    front of the first layer or behind the second."""

    def __init__(self, counts: str = "") -> None:
        super().__init__()
        self.counts, self.down, self.up = counts, nn.Linear(5, 7), nn.Linear(7, 3)
        self.register_buffer("seen", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        if self.counts == "before":
            x = x + self.seen.add_(1)
        h = self.down(x)
        h.view(-1).mul_(2)
        y = self.up(h)
        return y + self.seen.add_(1).sum() if self.counts == "after" else y


def opened(counts: str = "") -> tuple[Lifted, fx.Node]:
    """The program, and the node of its last layer's input."""
    torch.manual_seed(0)
    lifted = Lifted(torch.export.export(Hidden(counts).eval(), (torch.randn(2, 5),)))
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
    made, copies = computed_before(lifted, node, tag)
    assert made is not node
    names = [str(n.target) for n in copies]
    assert [n for n in names if "linear" in n] == ["aten.linear.default"]
    assert any("mul" in n for n in names)
    assert not any("add" in n for n in names)
    assert len(lifted.graph.nodes) == before + len(copies)
    lifted.graph.output_node().args = ((made, node),)
    x = torch.randn(2, 5)
    held = {n.name: lifted.specs[n.name].target for n in lifted.graph.find_nodes(op="placeholder")}
    inputs = [x if fqn is None else lifted.tensor(fqn) for fqn in held.values()]
    first, own = fx.GraphModule(nn.Module(), lifted.graph)(*inputs)
    assert torch.equal(first, own)
    torch.manual_seed(0)
    torch.testing.assert_close(first, 2 * Hidden(counts).down(x))


def test_what_outlives_a_call_is_not_written_twice() -> None:
    lifted, node = opened("before")
    with pytest.raises(TargetError, match="writes to what outlives the call, so a first pass of it would change"):
        computed_before(lifted, node, tag)
