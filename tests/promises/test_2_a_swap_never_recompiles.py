"""Promise 2: whatever the rank, the alpha or the subset of sites, a swap compiles nothing, and is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig, RecompileError
from tests.support.cover import examples


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 6)
        self.up, self.gate, self.down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.down(torch.tanh(self.up(x)) * torch.sigmoid(self.gate(x)))


SITES = ["embed", "up", "gate", "down"]


def net() -> Net:
    torch.manual_seed(3)
    return Net().eval()


def ids(rows: int) -> Tensor:
    return torch.randint(17, (rows, 4), generator=torch.Generator().manual_seed(rows))


NET = net()
PROGRAMS: dict[str, adaptc.AdaptedProgram] = {}


def program(backend: str) -> adaptc.AdaptedProgram:
    """One per backend, called once, which is when it compiles."""
    if backend not in PROGRAMS:
        config = LoraConfig(r=3, target_modules=SITES)
        PROGRAMS[backend] = adaptc.compile(NET, config, example_inputs=ids(3), backend=backend)
        PROGRAMS[backend](ids(3))
    return PROGRAMS[backend]


def by_hand(tensors: dict[str, Tensor], scale: float, x: Tensor) -> Tensor:
    """The model with W + s B A in its weights."""
    state = {k: v.clone() for k, v in NET.state_dict().items()}
    for site in SITES:
        kind = "embedding_" if site == "embed" else ""
        end = "" if site == "embed" else ".weight"
        a, b = (tensors.get(f"{site}.lora_{kind}{f}{end}") for f in "AB")
        if a is not None and b is not None:
            change = scale * b @ a
            state[f"{site}.weight"] += change.t() if site == "embed" else change
    return torch.func.functional_call(NET, state, x)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@settings(max_examples=examples(20))
@given(
    rank=st.integers(1, 33),
    alpha=st.floats(0.25, 40),
    sites=st.sets(st.sampled_from(SITES), min_size=1),
    rows=st.integers(2, 9),
    seed=st.integers(0, 99),
)
def test_any_adapter(backend: str, rank: int, alpha: float, sites: set[str], rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for site in sorted(sites):
        layer = NET.get_submodule(site)
        if site == "embed":
            tensors["embed.lora_embedding_A"] = torch.randn(rank, 17, generator=generator)
            tensors["embed.lora_embedding_B"] = torch.randn(6, rank, generator=generator)
        else:
            tensors[f"{site}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=generator)
            tensors[f"{site}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=generator)
    p = program(backend)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(sites))
    with adaptc.debug.assert_no_recompiles():
        adaptc.swap(p, tensors, config=config)
        found = p(ids(rows))
        bound = p.bind(tensors, config=config)(ids(rows))
    expected = by_hand(tensors, alpha / rank, ids(rows))
    tolerance: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-4 * (1 + alpha)}
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(bound, expected, **tolerance)


@pytest.mark.long
def test_the_guard_sees_compilations() -> None:
    """Or the tests above would say nothing."""
    with pytest.raises(RecompileError), adaptc.debug.assert_no_recompiles():
        torch.compile(lambda x: torch.sin(x) * 3, fullgraph=True)(torch.randn(7))
    with pytest.raises(RecompileError), adaptc.debug.assert_no_recompiles():
        adaptc.compile(net(), LoraConfig(r=2, target_modules=["up"]), example_inputs=ids(3), backend="inductor")(ids(3))
