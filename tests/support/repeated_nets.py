"""Small models of equal blocks, and what a training step of their modules gives and keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

#: what a step gives: the loss, the gradients of all that trains, and the bytes kept for the backward
Step = tuple[Tensor, dict[str, Tensor], int]


class Block(nn.Module):
    """x (..., 7) -> x + what two layers and dropout make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(7)
        self.up, self.down = nn.Linear(7, 11), nn.Linear(11, 7)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(F.gelu(self.up(self.norm(x)))))


class Chained(nn.Module):
    """Blocks between two layers. Further results of blocks are weighed and returned, too."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(5, 7), nn.ModuleList(blocks), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Any:
        h, others = self.first(x), []
        for block in self.blocks:
            h = block(h)
            if isinstance(h, tuple):
                others.append(h[1])
                h = h[0]
        return (self.last(h), *others) if others else self.last(h)


def make_block_chain(make: Callable[[], nn.Module] = Block, count: int = 5) -> nn.Module:
    torch.manual_seed(8)
    return Chained([make() for _ in range(count)])


def random_input(rows: int = 3) -> Tensor:
    return torch.randn(rows, 2, 5, generator=torch.Generator().manual_seed(rows))


def step(module: nn.Module, inputs: dict[str, Any] | Tensor, seed: int = 3) -> Step:
    """A forward and a backward. Bytes are those of the storages that autograd saves, but for parameters and buffers."""
    module.zero_grad()
    parameter_storages = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    saved_tensors: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        # Branches of torch.cond are traced with fakes when they run.
        if type(t) in (Tensor, nn.Parameter) and t.untyped_storage().data_ptr() not in parameter_storages:
            saved_tensors[t.untyped_storage().data_ptr()] = t
        return t

    torch.manual_seed(seed)
    with saved_tensors_hooks(pack, lambda t: t):
        out = module(**inputs) if isinstance(inputs, dict) else module(inputs)
        loss = loss_of(out)
    size = sum(t.untyped_storage().nbytes() for t in saved_tensors.values())
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}, size


def loss_of(out: Any) -> Tensor:
    if getattr(out, "loss", None) is not None:
        return out.loss
    found = out.logits if hasattr(out, "logits") else out
    parts = found if isinstance(found, (tuple, list)) else [found]
    return torch.stack([(p.float().square() * torch.linspace(0.5, 2, p.shape[-1])).mean() for p in parts]).sum()


def assert_same_step(found: Step, expected: Step) -> None:
    """Equal to the bit."""
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    assert expected[1]
    different = [name for name, g in found[1].items() if not torch.equal(g, expected[1][name])]
    assert not different
    assert all(g.abs().max() > 0 for g in expected[1].values())


def forget_names(module: fx.GraphModule) -> None:
    """What programs from files of others may lack."""
    for node in module.graph.nodes:
        node.meta.pop("nn_module_stack", None)
