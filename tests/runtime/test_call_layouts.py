"""Calls with tensors of any strides: inputs, adapters and the base; compiled code copies what lies otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptc
from adaptc import AdaptcError, BackendError, LoraConfig
from adaptc.runtime.strides import axis_order, lay_out
from tests.support.cover import examples


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, padding=1)
        self.lin = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv(x))
        return self.lin(h.permute(0, 2, 3, 1))


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _expanded(x: Tensor) -> Tensor:
    return x[:, :, :1].expand(x.shape)


def _sliced(x: Tensor) -> Tensor:
    return torch.stack([x, -x], -1)[..., 0]


def _shifted(x: Tensor) -> Tensor:
    return torch.cat([x.flatten(), x.flatten()[:1]])[1:].view(x.shape)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.clone,
    "transposed": _transposed,
    "expanded": _expanded,
    "one value": lambda x: x.flatten()[:1].view(*[1] * x.ndim).expand(x.shape),
    "sliced": _sliced,
    "shifted": _shifted,
    "channels last": lambda x: x.to(memory_format=torch.channels_last) if x.ndim == 4 else _transposed(x),
}
ANY = st.sampled_from(list(STRIDES))
CONFIG = LoraConfig(r=3, target_modules=["conv", "lin"])


def adapter(rank: int, strides: str, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "conv.lora_A.weight": (rank, 3, 3, 3),
        "conv.lora_B.weight": (7, rank, 1, 1),
        "lin.lora_A.weight": (rank, 7),
        "lin.lora_B.weight": (5, rank),
    }
    return {k: STRIDES[strides](torch.randn(s, generator=g)) for k, s in shapes.items() if strides != "expanded"} or {
        k: torch.randn(s[0], generator=g).view(-1, *[1] * (len(s) - 1)).expand(s) for k, s in shapes.items()
    }


def images(strides: str, n: int = 2, like: tuple[int, int] = (4, 6)) -> Tensor:
    return STRIDES[strides](torch.randn(n, 3, *like, generator=torch.Generator().manual_seed(n)))


@pytest.fixture(scope="module")
def model() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def programs(model: Net) -> dict[str, Any]:
    made = {
        backend: adaptc.compile(model, CONFIG, example_inputs=images("contiguous"), backend=backend)
        for backend in ("eager", "inductor")
    }
    # Code is compiled for the order of the example; one without an order is as good as a contiguous one.
    for strides in ("channels last", "one value"):
        made[strides] = adaptc.compile(model, CONFIG, example_inputs=images(strides), backend="inductor")
    for prog in made.values():
        prog(images("contiguous"))
    return made


@pytest.mark.long
@pytest.mark.parametrize("which", ["eager", "inductor", "channels last", "one value"])
@given(
    strides=ANY, own=ANY, rank=st.sampled_from([1, 2, 5]), n=st.sampled_from([0, 1, 3]), width=st.sampled_from([3, 6])
)
@settings(max_examples=examples(40))
def test_any_strides_compute_the_same(
    programs: dict[str, Any], model: Net, which: str, strides: str, own: str, rank: int, n: int, width: int
) -> None:
    prog, tensors, x = programs[which], adapter(rank, own), images(strides, n or 2, (5, width))[:n]
    plain = {k: t.contiguous() for k, t in tensors.items()}
    before = x.clone()
    with adaptc.debug.assert_no_recompiles():
        adaptc.swap(prog, tensors)
        found = prog(x)
        bound = prog.bind(plain)(x)
    assert torch.equal(x, before)
    torch.testing.assert_close(bound, found, rtol=1e-4, atol=1e-4)
    expected = adaptc.merge(prog).module()(x.contiguous())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("strides", ["transposed", "channels last", "one value", "sliced"])
def test_base_tensors_of_any_strides(model: Net, backend: str, strides: str) -> None:
    other = Net().eval()
    for name, p in other.named_parameters():
        p.data = STRIDES[strides](model.get_parameter(name).detach()) if p.ndim > 1 else p.data
    prog = adaptc.compile(other, CONFIG, example_inputs=images("contiguous"), backend=backend)
    torch.testing.assert_close(prog(images("contiguous", 3)), other(images("contiguous", 3)), rtol=1e-4, atol=1e-4)
    # Given other memory later, in yet another order.
    weight = prog.state_dict["lin.weight"]
    weight.data = _transposed(2 * weight.detach())
    prog.resync_base_tensors()
    found = prog(images("contiguous", 3))
    other.lin.weight.data = weight.detach().clone()
    torch.testing.assert_close(found, other(images("contiguous", 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("limit", [None, 0])
def test_a_copy_follows_what_is_written_to_the_tensor(model: Net, limit: int | None) -> None:
    own = Net().eval()
    own.lin.weight.data = _transposed(own.lin.weight.detach())
    prog = adaptc.compile(own, CONFIG, example_inputs=images("contiguous"), backend="inductor", hoist_limit=limit)
    # Compiled for its order; what comes now has to be copied.
    weight = prog.state_dict["lin.weight"]
    weight.data = weight.detach().contiguous()
    prog.resync_base_tensors()
    prog(images("contiguous"))
    with torch.no_grad():
        weight.mul_(3)
    own.lin.weight.data = weight.detach()
    torch.testing.assert_close(prog(images("contiguous")), own(images("contiguous")), rtol=1e-4, atol=1e-4)


class Writes(nn.Module):
    """Writes to its input, as a step that is given its cache does."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 7)

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        y = self.lin(x)
        cache.add_(y)
        return y.sum(-1)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_what_is_written_to_an_input_is_in_it(backend: str) -> None:
    model = Writes()
    example = (torch.randn(3, 5), torch.zeros(3, 7))
    prog = adaptc.compile(model, LoraConfig(r=2, target_modules=["lin"]), example_inputs=example, backend=backend)
    for make in (torch.zeros(4, 7).clone, lambda: torch.zeros(7, 4).t(), lambda: torch.zeros(4, 14)[:, ::2]):
        x, cache = torch.randn(4, 5), make()
        prog(x, cache)
        torch.testing.assert_close(cache, model.lin(x))
    with pytest.raises((AdaptcError, RuntimeError), match=r"share memory|single memory location"):
        prog(torch.randn(4, 5), torch.zeros(1, 7).expand(4, 7))


class Gaps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 7)
        self.register_buffer("count", torch.zeros(14)[::2])

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return self.lin(x) + self.count


@pytest.mark.long
def test_state_that_would_have_to_be_copied_is_refused() -> None:
    config = LoraConfig(r=2, target_modules=["lin"])
    prog = adaptc.compile(Gaps(), config, example_inputs=torch.randn(3, 5), backend="inductor")
    with pytest.raises(BackendError, match=r"'b_count'.*backend='eager'"):
        prog(torch.randn(3, 5))
    eager = adaptc.compile(Gaps(), config, example_inputs=torch.randn(3, 5))
    assert eager(torch.zeros(3, 5)).shape == (3, 7)


class Turned(nn.Module):
    """Writes to a buffer without gaps that lies as its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 7)
        self.register_buffer("count", torch.zeros(7, 2).t())

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return self.lin(x) + self.count.sum(0)


def test_a_buffer_that_is_written_to_may_lie_transposed() -> None:
    config, x = LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False), torch.randn(3, 5)
    prog = adaptc.compile(Turned(), config, example_inputs=x, backend="inductor")
    first = prog(x)
    torch.testing.assert_close(prog(x), first + 2)


@given(
    shape=st.lists(st.sampled_from([0, 1, 2, 3]), max_size=4),
    strides=ANY,
    seed=st.randoms(use_true_random=False),
)
@settings(max_examples=examples(60))
def test_layouts(shape: list[int], strides: str, seed: Any) -> None:
    order = list(range(len(shape)))
    seed.shuffle(order)
    value = torch.randn([shape[i] for i in order]).permute(sorted(order, key=order.index) if order else [])
    assert torch.equal(lay_out(value, axis_order(value)), value)
    assert lay_out(value, axis_order(value)) is value
    assert torch.equal(lay_out(value, order), value)
