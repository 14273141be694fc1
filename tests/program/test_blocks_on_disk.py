"""Programs with blocks (``torch.no_grad``, ``torch.cond``, ...) in blocks: what is saved is read back, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import CheckpointError, LoraConfig


class Net(nn.Module):
    """``shape`` says how the layers ``a`` and ``b`` are called."""

    def __init__(self, shape: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return self.shape(self, x) + x


def gradients_in_none(net: Net, x: Tensor) -> Tensor:
    """Of this torch.export makes a block that gives nothing."""
    with torch.no_grad():
        y = net.a(x)
        with torch.enable_grad():
            z = net.b(y)
    return y + z


def in_a_branch(net: Net, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: gradients_in_none(net, x), net.b, (x,))


def branch_in_none(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cond(x.sum() > 0, lambda x: net.a(x).sin(), net.b, (x,))


def none_in_a_branch(net: Net, x: Tensor) -> Tensor:
    def true(x: Tensor) -> Tensor:
        with torch.no_grad():
            return net.a(x).sin()

    return torch.cond(x.sum() > 0, true, net.b, (x,))


def branch_in_a_branch(net: Net, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: torch.cond(x.sum() > 1, net.a, net.b, (x,)), net.b, (x,))


def autocast_in_autocast(net: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net.a(x)
        with torch.autocast("cpu", enabled=False):
            return net.b(y.float())


def compiled(shape: Callable[[Net, Tensor], Tensor]) -> adaptc.AdaptedProgram:
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights=False)
    return adaptc.compile(Net(shape).eval(), config, example_inputs=torch.randn(3, 5))


@pytest.mark.long
@pytest.mark.parametrize(
    "shape", [gradients_in_none, branch_in_none, none_in_a_branch, branch_in_a_branch, autocast_in_autocast]
)
def test_what_is_saved_is_read_back(shape: Callable[[Net, Tensor], Tensor], tmp_path: Path) -> None:
    prog = compiled(shape)
    xs = [torch.randn(2, 5), torch.randn(7, 5) + 1, torch.randn(2, 5) - 1]
    for program in (prog, adaptc.merge(prog), prog.base):
        path = adaptc.save(program, tmp_path / "a.pt2")
        loaded, anywhere = adaptc.load(path), torch.export.load(path).module()
        for x in xs:
            assert torch.equal(loaded(x), program(x))
            assert torch.equal(anywhere(x), program(x))


@pytest.mark.long
def test_what_cannot_be_read_back_is_refused(tmp_path: Path) -> None:
    prog = compiled(in_a_branch)
    adaptc.save(compiled(branch_in_none), tmp_path / "a.pt2")
    before = (tmp_path / "a.pt2").read_bytes()
    with pytest.raises(CheckpointError, match=r"cannot read them\. The program has one in true_graph_0"):
        adaptc.save(torch.export.export(Net(in_a_branch).eval(), (torch.randn(3, 5),)), tmp_path / "a.pt2")
    assert (tmp_path / "a.pt2").read_bytes() == before
    # A capture leaves out what nothing reads, such as an empty block.
    loaded = adaptc.load(adaptc.save(prog, tmp_path / "b.pt2"))
    assert torch.equal(loaded(torch.ones(2, 5)), prog(torch.ones(2, 5)))
