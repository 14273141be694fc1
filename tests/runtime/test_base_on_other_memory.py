"""Base tensors that are given other memory behind torch's back: seen at the next bind, swap, merge or save, or on
request, and then followed, or refused where the program was not made for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import AdaptcError, LoraConfig

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
SITES = {"up": (7, 5), "side": (11, 5), "down": (3, 7)}


class Net(nn.Module):
    """Siblings, which share a buffer, a weight that is hoisted as a view, and one that no adapter is at."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.side, self.down, self.last = nn.Linear(5, 7), nn.Linear(5, 11), nn.Linear(7, 3), nn.Linear(11, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.down(torch.tanh(self.up(x))), self.last(self.side(x))


def state(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    a = {f"{n}.lora_A.weight": torch.randn(3, i, generator=g) for n, (_, i) in SITES.items()}
    return a | {f"{n}.lora_B.weight": torch.randn(o, 3, generator=g) for n, (o, _) in SITES.items()}


def by_data(p: nn.Parameter, new: Tensor) -> None:
    p.data = new


def by_set(p: nn.Parameter, new: Tensor) -> None:
    with torch.no_grad():
        p.set_(new)


def by_swapping(p: nn.Parameter, new: Tensor) -> None:
    torch.utils.swap_tensors(p, nn.Parameter(new, requires_grad=False))


WAYS = [by_data, by_set, by_swapping]


@pytest.fixture
def made() -> tuple[Net, adaptc.AdaptedProgram]:
    torch.manual_seed(3)
    net = Net().eval().requires_grad_(False)
    config = LoraConfig(r=3, target_modules=list(SITES), init_lora_weights=False)
    program = adaptc.compile(net, config, example_inputs=torch.randn(2, 5))
    adaptc.swap(program, state(1))
    program(X)
    return net, program


def expected(net: Net, seed: int) -> tuple[Tensor, ...]:
    """By the definition, from the tensors as they are now."""
    config = LoraConfig(r=3, target_modules=list(SITES), init_lora_weights=False)
    fresh = adaptc.compile(net, config, example_inputs=torch.randn(2, 5), fuse=False, hoist_limit=0)
    adaptc.swap(fresh, state(seed))
    return fresh(X)


def close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["up.weight", "side.weight", "down.weight", "last.weight", "up.bias", "last.bias"])
@pytest.mark.parametrize("way", WAYS, ids=lambda w: w.__name__)
def test_what_was_moved_is_followed(
    made: tuple[Net, adaptc.AdaptedProgram], way: Callable[..., None], name: str, tmp_path: Path
) -> None:
    net, program = made
    own, weight = program.state_dict[name], net.get_parameter(name)

    def move(seed: int) -> None:
        new = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        way(own, new)
        weight.data = new.clone()

    if way is by_swapping and name.endswith("weight"):
        with pytest.raises(RuntimeError, match="weakref"):  # torch sees that somebody knows the tensor
            move(9)
        return
    move(9)
    now, other = expected(net, 1), expected(net, 2)
    close(program.bind(state(2))(X), other)
    close(adaptc.merge(program)(X), now)
    close(adaptc.load(adaptc.save(program, tmp_path / "p.pt2"))(X), now)
    binding = program.binding
    program.resync_base_tensors()
    close(program(X), now)
    move(10)
    adaptc.swap(program, binding)
    close(program(X), expected(net, 1))
    move(11)
    adaptc.swap(program, state(2))
    close(program(X), expected(net, 2))


@pytest.mark.parametrize(
    "new",
    [torch.randn(7, 3), torch.randn(7, 5, dtype=torch.float64)],
    ids=["shape", "dtype"],
)
def test_what_the_program_was_not_made_for_is_refused(made: tuple[Net, adaptc.AdaptedProgram], new: Tensor) -> None:
    _, program = made
    bound = program.binding
    before = program(X)
    own, kept = program.state_dict["up.weight"], program.state_dict["up.weight"].data
    own.data = new
    for deed in (lambda: program.bind(state(2)), lambda: adaptc.swap(program, state(2)), lambda: adaptc.merge(program)):
        with pytest.raises(AdaptcError, match=r"'up\.weight' was replaced by a tensor"):
            deed()
    with pytest.raises(AdaptcError, match="compile the model again"):
        program.resync_base_tensors()
    assert program.binding is bound
    own.data = kept
    program.resync_base_tensors()
    close(program(X), before)
