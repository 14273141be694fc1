"""Calls with any size torch takes: 0 and 1 are no special sizes, and what a graph was held to is said by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

import adaptc
from adaptc import AdaptcError, LoraConfig
from tests.support.cover import examples
from tests.support.families import FAMILIES

SIZES = st.sampled_from([0, 1, 2, 3, 7])
CONFIG = LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False)


class Net(nn.Module):
    """Sizes meet in a broadcast, a reshape, a reduction, a concatenation and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        h = torch.tanh(self.up(x)) + bias
        h = nn.functional.scaled_dot_product_attention(h, h, h)
        rows = self.down(h.reshape(-1, 7)).reshape(x.shape[0], x.shape[1], 3)
        return torch.cat([rows, x[..., :3] - rows.mean(-1, keepdim=True)], 1)


def inputs(batch: int, seq: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(10 * batch + seq)
    return torch.randn(batch, seq, 5, generator=g).to(dtype), torch.randn(seq, 7, generator=g).to(dtype)


def tensors(rank: int, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"up": (7, 5), "down": (3, 7)}
    return {
        f"{name}.lora_{side}.weight": torch.randn(shape, generator=g)
        for name, (out, into) in shapes.items()
        for side, shape in (("A", (rank, into)), ("B", (out, rank)))
    }


def exported(model: nn.Module, kind: str, dtype: torch.dtype) -> Any:
    """A program of somebody else, with each kind of free dimension."""
    batch, seq = (Dim("batch"), Dim("seq")) if kind == "named" else (Dim.AUTO, Dim.AUTO)
    shapes = ({0: batch, 1: seq}, {0: seq})
    return torch.export.export(model, inputs(2, 4, dtype), dynamic_shapes=shapes, strict=False)


@pytest.fixture(scope="module")
def models() -> dict[torch.dtype, nn.Module]:
    torch.manual_seed(3)
    made = Net().eval()
    return {torch.float32: made, torch.bfloat16: Net().to(torch.bfloat16).eval(), torch.float64: Net().double().eval()}


@pytest.fixture(scope="module")
def programs(models: dict[torch.dtype, nn.Module]) -> dict[Any, Any]:
    return {}


def program(programs: dict[Any, Any], models: Any, kind: str, backend: str, dtype: torch.dtype) -> Any:
    key = (kind, backend, dtype)
    if key not in programs:
        if kind == "captured":
            made = adaptc.compile(models[dtype], CONFIG, example_inputs=inputs(2, 4, dtype), backend=backend)
        elif kind == "training":
            made = adaptc.compile(models[dtype], CONFIG, example_inputs=inputs(2, 4, dtype), training=True)
        else:
            made = adaptc.compile(exported(models[dtype], kind, dtype), CONFIG, backend=backend)
        programs[key] = made
    return programs[key]


def same(found: Tensor, expected: Tensor) -> None:
    # A few roundings of the largest number that is summed.
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    tolerance = max(0.1, 0.03 * largest) if expected.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "backend", "dtype"),
    [
        ("captured", "eager", torch.float32),
        ("captured", "inductor", torch.float32),
        ("captured", "eager", torch.bfloat16),
        ("auto", "eager", torch.float64),
        ("auto", "inductor", torch.float32),
        ("named", "inductor", torch.float32),
        ("training", "eager", torch.float32),
    ],
)
@given(batch=SIZES, seq=SIZES, rank=st.sampled_from([1, 2, 5]), seed=st.integers(0, 3))
@settings(max_examples=examples(40))
def test_every_size_computes_what_the_model_does(
    programs: Any, models: Any, kind: str, backend: str, dtype: torch.dtype, batch: int, seq: int, rank: int, seed: int
) -> None:
    prog = program(programs, models, kind, backend, dtype)
    base = prog.bind(None)
    prog(*inputs(3, 2, dtype)), base(*inputs(3, 2, dtype))
    given_inputs, own = inputs(batch, seq, dtype), tensors(rank, seed)
    if dtype == torch.bfloat16 and not seq:  # torch's own guard, by which it chooses a kernel
        with pytest.raises(AdaptcError, match=r"min\(x.shape\[2\], x.shape\[1\]\*x.shape\[2\]\) == x.shape\[2\]"):
            prog(*given_inputs)
        return
    with adaptc.debug.assert_no_recompiles():
        adaptc.swap(prog, own)
        found = prog(*given_inputs)
        same(base(*given_inputs), models[dtype](*given_inputs))
    same(found, adaptc.merge(prog).module()(*given_inputs))
    module = prog.module()
    same(module(*given_inputs), found)
    if kind == "training":
        module.train()
        module(*given_inputs).sum().backward()
        assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_language_models_take_one_token(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    prog = adaptc.compile(model, LoraConfig(r=2), example_inputs=family.inputs(2, 5))
    for batch, seq in [(1, 1), (1, 2), (3, 1), (2, 7)]:
        kwargs = family.inputs(batch, seq)
        torch.testing.assert_close(
            next(iter(prog(**kwargs).values())), next(iter(model(**kwargs).values())), rtol=1e-4, atol=1e-4
        )


class Step(nn.Module):
    """Some tokens, after those whose keys and values are in a cache of nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor, cache: dict[str, list[Tensor]]) -> tuple[Tensor, dict[str, list[Tensor]]]:
        h = self.up(x)
        keys, values = (torch.cat([cache[n][0], h], 1) for n in ("Key", "v"))
        mask = torch.ones(h.shape[1], keys.shape[1], dtype=torch.bool, device=h.device).tril(keys.shape[1] - h.shape[1])
        out = nn.functional.scaled_dot_product_attention(h, keys, values, attn_mask=mask)
        return self.down(out), {"Key": [keys], "v": [values]}


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_decode_steps_of_a_program_of_somebody_else(backend: str) -> None:
    def filled(batch: int, n: int) -> dict[str, list[Tensor]]:
        return {"Key": [torch.randn(batch, n, 7)], "v": [torch.randn(batch, n, 7)]}

    free = {0: Dim.AUTO, 1: Dim.AUTO}
    model, example = Step().eval(), (torch.randn(2, 3, 5), filled(2, 4))
    ep = torch.export.export(model, example, dynamic_shapes=(free, {"Key": [free], "v": [free]}), strict=False)
    prog = adaptc.compile(ep, CONFIG, backend=backend)
    adaptc.swap(prog, {k: 0 * t for k, t in tensors(2, 0).items()})
    cache = filled(1, 0)
    for step in range(4):
        x = torch.randn(1, 1, 5)
        found, expected = prog(x, cache), model(x, cache)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        cache = found[1]
        assert cache["Key"][0].shape == (1, step + 1, 7)
    with pytest.raises(AdaptcError, match=r"cache|must equal"):
        prog(torch.randn(2, 1, 5), filled(3, 4))


# -- what a graph was held to ----------------------------------------------------------------------------------------


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)


class Even(Held):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) if x.shape[0] % 2 == 0 else -self.up(x)


class Long(Held):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x[2:] + x[:-2]) if x.shape[0] > 3 else self.up(x)


class One(Held):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.up(x) if x.shape[0] == 1 else self.up(x)


class Harmless(Held):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) if x.shape[0] == 1 else self.up(x).clone()


UP = LoraConfig(r=2, target_modules=["up"])


@pytest.mark.parametrize(
    ("model", "sizes", "match"),
    [
        (Even(), [1, 3, 7], r"axis 0 of 'x' has size [137], but must be 2\*"),
        (Long(), [0, 1, 2, 3], r"axis 0 of 'x' has size [0-3], outside the captured range \[4"),
        (One(), [1], r"x.shape\[0\] != 1.*'x' has shape \(1, 5\)"),
        (Harmless(), [], ""),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_a_branch_on_sizes_is_refused_by_name(model: nn.Module, sizes: list[int], match: str, tmp_path: Any) -> None:
    prog = adaptc.compile(model, UP, example_inputs=torch.randn(4, 5))
    made = {"program": prog, "module": prog.module(), "merged": adaptc.merge(prog), "bound": prog.bind(None)}
    made["loaded"] = adaptc.load(adaptc.save(prog, tmp_path / "held.pt2"))
    made["loaded, merged"] = adaptc.merge(made["loaded"])
    for run in made.values():
        for n in [0, 1, 2, 3, 7]:
            x = torch.randn(n, 5)
            if n in sizes:
                with pytest.raises(AdaptcError, match=match):
                    run(x)
            elif n in (0, 1, 2) or type(model) is not Even:
                torch.testing.assert_close(run(x), model(x))


class Assertive(Held):
    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        count = n.item()
        torch._check(count < 9)
        return self.up(x) * count


def test_an_assertion_of_the_graph_is_an_error_of_ours() -> None:
    example = (torch.randn(4, 5), torch.tensor(3))
    prog = adaptc.compile(Assertive(), UP, example_inputs=example)
    assert prog(torch.randn(1, 5), torch.tensor(8)).shape == (1, 7)
    with pytest.raises(AdaptcError, match=r"Runtime assertion failed.*'x': \(3, 5\)"):
        prog(torch.randn(3, 5), torch.tensor(9))


class Twice(Held):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.up(torch.cat([x, x]) + y)


def test_sizes_made_of_others() -> None:
    batch = Dim("batch")
    example = (torch.randn(3, 5), torch.randn(6, 5))
    ep = torch.export.export(Twice(), example, dynamic_shapes=({0: batch}, {0: 2 * batch}), strict=False)
    prog = adaptc.compile(ep, UP)
    for n in (0, 1, 2, 7):
        assert prog(torch.randn(n, 5), torch.randn(2 * n, 5)).shape == (2 * n, 7)
    with pytest.raises(AdaptcError, match=r"axis 0 of 'y' has size 5, but must be 2\*\w+ = 4.*axis 0 of 'x'"):
        prog(torch.randn(2, 5), torch.randn(5, 5))


def test_only_a_size_made_of_another() -> None:
    half = Dim("half", max=4)
    ep = torch.export.export(Even(), (torch.randn(6, 5),), dynamic_shapes=({0: 2 * half},), strict=False)
    prog = adaptc.compile(ep, UP)
    assert prog(torch.randn(2, 5)).shape == (2, 7)
    with pytest.raises(AdaptcError, match=r"has size 5, but must be 2\*\w+ for"):
        prog(torch.randn(5, 5))
    with pytest.raises(AdaptcError, match=r"outside the captured range \[\d, [48]\]"):
        prog(torch.randn(10, 5))
