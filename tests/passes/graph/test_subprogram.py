"""Parts of a program keep the checks of the values that they read, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from adaptc.passes.graph.subprogram import extract_subprogram


class Checked(nn.Module):
    """Two outputs of two inputs; the numbers of the first are checked, through values that no output reads."""

    def forward(self, x: Tensor, sizes: Tensor, z: Tensor) -> dict[str, Tensor]:
        torch._check((sizes.sum() == x.shape[0]).item())
        return {"one": x.repeat_interleave(2, 0) + sizes.float().mean(), "other": z * 2}


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    rows, others = Dim("rows"), Dim("others")
    shapes = {"x": {0: rows}, "sizes": {}, "z": {0: others}}
    inputs = {"x": torch.randn(5, 3), "sizes": torch.tensor([2, 3]), "z": torch.randn(7)}
    return export(Checked(), (), inputs, dynamic_shapes=shapes)


def assertions(program: ExportedProgram) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if "_assert_scalar" in str(n.target)]


def test_a_part_keeps_the_checks_of_its_inputs(program: ExportedProgram) -> None:
    assert assertions(program)
    part = extract_subprogram(program, ["one"])
    assert assertions(part) == assertions(program)
    run = part.module()
    x = torch.randn(4, 3)
    assert torch.equal(run(x=x, sizes=torch.tensor([3, 1]))["one"], x.repeat_interleave(2, 0) + 2)
    with pytest.raises(RuntimeError):
        run(x=x, sizes=torch.tensor([3, 2]))


def test_a_part_has_no_checks_of_other_inputs(program: ExportedProgram) -> None:
    part = extract_subprogram(program, ["other"])
    assert not assertions(part)
    assert torch.equal(part.module()(z=torch.ones(3))["other"], torch.full((3,), 2.0))
