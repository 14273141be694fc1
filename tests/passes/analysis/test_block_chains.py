"""Chains of blocks: what is found with names and without, where the cuts lie, and what is no chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from adaptc.passes.analysis.block_chains import BlockChain, find_block_chains, gradient_free_nodes
from tests.support.pass_checks import export, saved_and_loaded
from tests.support.repeated_nets import Block, Chained, forget_names, make_block_chain, random_input


def module_of(model: nn.Module, *args: Tensor, names: bool = True) -> fx.GraphModule:
    module: fx.GraphModule = export(model.eval(), *(args or (random_input(),))).module()  # type: ignore[assignment]
    if not names:
        forget_names(module)
    return module


def lengths(chains: list[BlockChain]) -> list[list[int]]:
    return [[len(b) for b in chain.blocks] for chain in chains]


def sound(module: fx.GraphModule, chains: list[BlockChain]) -> None:
    """Blocks are disjoint, in order, and read of each other only what was made before."""
    order = {n: i for i, n in enumerate(module.graph.nodes)}
    nodes = [n for chain in chains for block in chain.blocks for n in block]
    assert [order[n] for n in nodes] == sorted({order[n] for n in nodes})
    outside = gradient_free_nodes(module)
    between = [n for n in module.graph.nodes if order[nodes[0]] < order[n] < order[nodes[-1]] and n not in set(nodes)]
    if len(chains) == 1:
        assert all(n in outside or n.op == "get_attr" for n in between)


@pytest.mark.parametrize("names", [True, False])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_equal_blocks(count: int, names: bool) -> None:
    module = module_of(make_block_chain(count=count), names=names)
    chains = find_block_chains(module)
    sound(module, chains)
    assert lengths(chains) == [[6] * count]
    # One value of one block reaches the next.
    for block, behind in zip(chains[0].blocks, chains[0].blocks[1:], strict=False):
        handed = {n for b in behind for n in b.all_input_nodes} & set(block)
        assert handed == {block[-1]}


def test_programs_from_files() -> None:
    module: fx.GraphModule = saved_and_loaded(export(make_block_chain().eval(), random_input())).module()  # type: ignore[assignment]
    forget_names(module)
    assert lengths(find_block_chains(module)) == [[6] * 5]


class First(Block):
    """A block that makes, from a table, what all blocks add; the first one is asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 11)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = self.up(self.norm(x))
        if bias is None:
            steps = torch.arange(2, device=x.device)
            steps += 3
            bias = self.table(steps).tanh()
        return x + self.down(F.gelu(y + bias)), bias


class Biased(Chained):
    def forward(self, x: Tensor) -> Tensor:
        h, bias = self.first(x), None
        for block in self.blocks:
            h, bias = block(h, bias)
        return self.last(h)


@pytest.mark.parametrize("names", [True, False])
def test_the_first_block_may_do_more(names: bool) -> None:
    torch.manual_seed(8)
    module = module_of(Biased([First() for _ in range(5)]), names=names)
    (found,) = lengths(find_block_chains(module))
    assert len(found) == 5
    assert found[0] > found[1]
    assert len(set(found[1:])) == 1


class TwoChains(nn.Module):
    """An encoder whose result each block of a decoder reads."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Block() for _ in range(4))
        self.cross = nn.ModuleList(nn.Linear(14, 7) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.encoder:
            x = block(x)
        y = x.flip(0).sin().cos()
        for layer in self.cross:
            y = y + layer(torch.cat([y, x], -1)).tanh().sin()
        return y


@pytest.mark.parametrize("names", [True, False])
def test_several_chains(names: bool) -> None:
    module = module_of(TwoChains(), torch.randn(3, 7), names=names)
    chains = find_block_chains(module)
    sound(module, chains)
    assert [len(chain.blocks) for chain in chains] == [4, 3]


class Uneven(Block):
    def __init__(self, more: bool) -> None:
        super().__init__()
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.down(self.up(y).sin()) if self.more else y


def test_blocks_that_differ_are_found_by_their_names() -> None:
    kinds = iter([True, False, False, True, True])
    model = make_block_chain(lambda: Uneven(next(kinds)))
    chains = find_block_chains(module_of(model))
    assert [len(chain.blocks) for chain in chains] == [5]
    assert len(set(lengths(chains)[0])) == 2


class Parallel(nn.Module):
    """Modules that are counted, and read one tensor side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(5, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Any:
        return [head(x).tanh().sin() for head in self.heads]


class Widening(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5 + 2 * i, 7 + 2 * i) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh().sin()
        return x


NO_CHAIN: dict[str, Callable[[], nn.Module]] = {
    "one block": lambda: make_block_chain(count=1),
    "side by side": Parallel,
    "other widths each": Widening,
    "no parameters": lambda: nn.Sequential(nn.Linear(5, 7), *(nn.GELU() for _ in range(5))),
    "nothing to save": lambda: nn.Sequential(*(nn.Linear(5, 5) for _ in range(3))),
    "nothing at all": nn.Identity,
}


@pytest.mark.parametrize("names", [True, False])
@pytest.mark.parametrize("case", NO_CHAIN)
def test_no_chain(case: str, names: bool) -> None:
    assert find_block_chains(module_of(NO_CHAIN[case](), names=names)) == []
