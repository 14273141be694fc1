"""Thin weights of adapters are stored by columns for compilers, in a copy that is made once per binding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.optimize.store_by_columns import StoreByColumns


class Net(nn.Module):
    """A layer with more outputs than inputs, one with fewer, and one that both its reads share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(11, 23), nn.Linear(23, 7)
        self.twice = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.twice(torch.tanh(self.down(torch.tanh(self.up(x))))))


X = torch.randn(5, 11)


def config(rank: int = 3, **options: object) -> LoraConfig:
    options = {"target_modules": "all-linear", "init_lora_weights": False, **options}
    return LoraConfig(r=rank, **options)  # type: ignore[arg-type]


def test_weights_of_adapters_with_fewer_columns_than_rows_are_copied() -> None:
    program = adaptc.compile(Net(), config(target_modules=["up", "down"]), example_inputs=(X,))
    lifted = LiftedProgram(program)
    slots = {lifted.placeholders[s].name for a in program.adaptation.attachments for s in a.slots.values()}
    base = {n.name for n in lifted.graph.find_nodes(op="placeholder")} - slots
    done = StoreByColumns([base, slots])(lifted.graph)
    assert done.count == 2
    read = {n.args[1] for n in lifted.graph.nodes if n.target is torch.ops.aten.linear.default}
    assert set(done.data[-1] if isinstance(done.data, list) else done.data) <= read
    for node in done.data:
        value = node.meta["val"]
        assert not value.is_contiguous()
        assert value.t().is_contiguous()
        (source,) = node.all_input_nodes[0].all_input_nodes[0].all_input_nodes
        assert "lora_B" in source.name
        assert source not in read
    # The base is not the adapter's, however thin it is.
    assert StoreByColumns([base | slots, set()])(LiftedProgram(program).graph).count == 0


def made_of(program: adaptc.AdaptedProgram) -> dict[str, int]:
    with torch.no_grad():
        program(X)
    return dict(program.passes["plain"])


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_code_reads_the_copies(backend: str, tmp_path: Path) -> None:
    program = adaptc.compile(Net(), config(), example_inputs=(X,), backend=backend)
    if backend == "eager":
        with torch.no_grad():
            program(X)
        assert not any("store_by_columns" in dict(trail) for trail in program.passes.values())
        return
    assert made_of(program)["store_by_columns"] == 3
    for rank in (1, 3, 8, 30):  # a rank above the sizes of a layer, too
        other = adaptc.compile(Net(), config(rank), example_inputs=(X,))
        adaptc.swap(program, adaptc.save_adapter(other, tmp_path / str(rank)))
        for rows in (1, 2, 9):
            torch.testing.assert_close(
                program(X[:1].expand(rows, -1)), other(X[:1].expand(rows, -1)), atol=1e-4, rtol=1e-4
            )


def test_no_call_makes_a_copy_where_a_limit_leaves_no_room() -> None:
    program = adaptc.compile(Net(), config(), example_inputs=(X,), backend="inductor", hoist_limit=0)
    expected = adaptc.compile(Net(), config(), example_inputs=(X,))
    with torch.no_grad():
        found = program(X)
    assert "store_by_columns" not in dict(program.passes["plain"])
    assert found.shape == expected(X).shape
