"""Parts of a program: some of its outputs, with the inputs they need, of one adapter."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import adaptc
from adaptc.errors import ConfigError
from adaptc.passes.graph.subprogram import extract_subprogram, output_names
from adaptc.runtime.executor import Arguments

NEW = {
    f"{name}.lora_{side}.weight": torch.randn(shape, generator=torch.Generator().manual_seed(4))
    for name, out in (("shared", 7), ("own", 3))
    for side, shape in (("A", (3, 5)), ("B", (out, 3)))
}
PARTS = {"left": ["left"], "right": ["total", "right"]}


class TwoSided(nn.Module):
    """Two sides that share a layer and a size, one of which writes to a piece of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.own = nn.Linear(5, 7), nn.Linear(5, 3)

    def forward(self, a: Tensor, b: Tensor, memory: Tensor) -> dict[str, Tensor]:
        memory[:2].add_(b.sum(0)[:2])
        right = self.own(b) + a.shape[0]
        return {"left": self.shared(a) + b.shape[0], "right": right, "total": memory * 2 + self.shared(b).sum()}


@pytest.fixture
def program() -> adaptc.AdaptedProgram:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, rows = TwoSided(), Dim("rows")
        example = {"a": torch.randn(4, 5), "b": torch.randn(4, 5), "memory": torch.zeros(5)}
        return adaptc.compile(
            model,
            adaptc.LoraConfig(r=2, target_modules=["shared", "own"], init_lora_weights=False),
            example_inputs=example,
            dynamic_shapes={"a": {0: rows}, "b": {0: rows}, "memory": {}},
        )


def inputs(rows: int, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(rows, 5, generator=draw),
        "b": torch.randn(rows, 5, generator=draw),
        "memory": torch.randn(5, generator=draw),
    }


def test_parts_compute_what_the_whole_does(program: adaptc.AdaptedProgram) -> None:
    """Each takes what it needs alone; sizes are read off an input that it has; writes stay with what reads them."""
    assert output_names(program) == ["left", "right", "total"]
    parts = program.snapshot_call().parts(PARTS)
    assert {n: set(p.inputs) for n, p in parts.items()} == {"left": {"a"}, "right": {"b", "memory"}}
    for rows in (1, 3, 6):
        whole, given, mine = inputs(rows), inputs(rows), inputs(rows)
        expected = program(**whole)
        assert torch.equal(parts["left"].run(a=given["a"])["left"], expected["left"])
        found = parts["right"].run(b=given["b"], memory=mine["memory"])
        assert list(found) == ["total", "right"]
        assert all(torch.equal(found[n], expected[n]) for n in found)
        assert torch.equal(mine["memory"], whole["memory"])


def test_parts_keep_one_adapter_and_their_code(program: adaptc.AdaptedProgram) -> None:
    """What is pinned stays as it was; the next ones have what was swapped in, all of them, and no new code."""
    before = program.snapshot_call().parts(PARTS)
    old = {n: p.run(**{k: inputs(3)[k] for k in p.inputs}) for n, p in before.items()}
    bound = program.bind(NEW)
    adaptc.swap(program, NEW)
    for parts in (program.snapshot_call().parts(PARTS), bound.parts(PARTS)):
        whole = program(**inputs(3))
        for name, part in parts.items():
            found = part.run(**{k: inputs(3)[k] for k in part.inputs})
            torch.testing.assert_close(found, {n: whole[n] for n in found})
            assert not any(torch.equal(found[n], old[name][n]) for n in found)
    for name, part in before.items():
        found = part.run(**{k: inputs(3)[k] for k in part.inputs})
        assert all(torch.equal(found[n], old[name][n]) for n in found)
    codes = program.run_state.part_executors[program.executor()]
    assert len(codes) == 2


@pytest.mark.long
def test_parts_that_are_over_keep_no_adapter(program: adaptc.AdaptedProgram) -> None:
    parts = program.snapshot_call().parts(PARTS)
    parts["left"].run(a=inputs(3)["a"])
    taken = [weakref.ref(held) for held in parts["left"].run.args if isinstance(held, Arguments)]
    adaptc.swap(program, NEW)
    assert [held() is not None for held in taken] == [True]
    del parts
    gc.collect()
    assert [held() for held in taken] == [None]


def test_unknown_outputs_are_named(program: adaptc.AdaptedProgram) -> None:
    with pytest.raises(ConfigError, match="no output 'middle'"):
        extract_subprogram(program, ["middle"])
