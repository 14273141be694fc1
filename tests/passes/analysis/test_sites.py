"""Sites: which parameters of a program are found, by which kind of op they are read, and by which nodes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from adaptc.passes.analysis.sites import Site, find_sites
from tests.support.custom_models import Shared, Tied
from tests.support.pass_checks import assert_valid, export, saved_and_loaded
from tests.support.site_cases import CASES


def sites(model: nn.Module, *args: Any, **options: Any) -> dict[str, Site]:
    found = find_sites(export(model, *args, **options))
    assert len({s.fqn for s in found}) == len(found)
    return {s.fqn: s for s in found}


def kinds(found: dict[str, Site]) -> dict[str, str]:
    return {k: s.kind for k, s in found.items()}


LAYERS: dict[str, tuple[nn.Module, tuple[Tensor, ...], str, str]] = {
    "linear": (nn.Linear(7, 5), (torch.randn(3, 7),), "linear", "linear"),
    "linear of a vector": (nn.Linear(7, 5), (torch.randn(7),), "linear", "linear"),
    "addmm": (Conv1D(5, 7), (torch.randn(3, 7),), "addmm", "addmm"),
    "conv1d": (nn.Conv1d(5, 7, 3), (torch.randn(2, 5, 11),), "conv1d", "conv1d"),
    "conv2d": (nn.Conv2d(5, 7, (3, 1), stride=2), (torch.randn(2, 5, 11, 3),), "conv2d", "conv2d"),
    "conv3d": (nn.Conv3d(3, 5, 2, groups=1), (torch.randn(2, 3, 3, 5, 7),), "conv3d", "conv3d"),
    "conv1d same": (nn.Conv1d(5, 7, 3, padding="same"), (torch.randn(2, 5, 11),), "conv1d", "conv1d"),
    "conv2d circular": (
        nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"),
        (torch.randn(2, 3, 5, 7),),
        "conv2d",
        "conv2d",
    ),
    "conv2d unbatched": (nn.Conv2d(3, 5, 3), (torch.randn(3, 5, 7),), "conv2d", "conv2d"),
    "embedding": (nn.Embedding(11, 5), (torch.tensor([[1, 2, 10]]),), "embedding", "embedding"),
    "embedding padding": (nn.Embedding(11, 5, padding_idx=2), (torch.tensor([2, 3]),), "embedding", "embedding"),
    "transposed 1d": (nn.ConvTranspose1d(5, 7, 3), (torch.randn(2, 5, 11),), "conv_transpose", "conv_transpose1d"),
    "transposed 2d": (nn.ConvTranspose2d(5, 7, 3), (torch.randn(2, 5, 3, 4),), "conv_transpose", "conv_transpose2d"),
    "bag": (nn.EmbeddingBag(11, 5), (torch.tensor([[1, 2, 10]]),), "weight", "embedding_bag"),
    "bilinear": (nn.Bilinear(3, 5, 7), (torch.randn(2, 3), torch.randn(2, 5)), "weight", "bilinear"),
    "norm": (nn.LayerNorm(5), (torch.randn(2, 5),), "weight", "layer_norm"),
}


@pytest.mark.parametrize("name", list(LAYERS))
def test_one_layer(name: str) -> None:
    """The site of each layer, exactly, at the root and inside another module."""
    layer, args, kind, node = LAYERS[name]
    weight = Site(
        module="",
        param="weight",
        kind=kind,
        shape=tuple(layer.get_parameter("weight").shape),
        consumers=(node,),
        module_type=f"{type(layer).__module__}.{type(layer).__qualname__}",
    )
    found = sites(layer, *args)
    assert found["weight"] == weight
    assert set(found) == {k for k, _ in layer.named_parameters()}
    if getattr(layer, "bias", None) is not None:
        shape = tuple(layer.get_parameter("bias").shape)
        assert found["bias"] == dataclasses.replace(weight, param="bias", kind="weight", shape=shape)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("in-ner", nn.ModuleDict({"0@x": layer}))

        def forward(self, *x: Tensor) -> Tensor:
            return self.get_submodule("in-ner.0@x")(*x)

    assert sites(Outer(), *args)["in-ner.0@x.weight"] == dataclasses.replace(weight, module="in-ner.0@x")


class Reads(nn.Module):
    """A weight, read by ``how``."""

    def __init__(self, how: Any, *shape: int) -> None:
        super().__init__()
        self.how = how
        self.w = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x, self.w)


X, SQUARE, BIAS = torch.randn(3, 7), torch.randn(3, 3), torch.randn(5)
#: reads that look like a layer's and are not one
OTHER_READS: dict[str, tuple[Any, tuple[int, ...], Tensor]] = {
    "matmul": (lambda x, w: x @ w, (7, 5), X),
    "matmul transposed": (lambda x, w: x @ w.t(), (5, 7), X),
    "matmul mT": (lambda x, w: x @ w.mT, (5, 7), X),
    "mm": (torch.mm, (7, 5), X),
    "einsum": (lambda x, w: torch.einsum("bi,oi->bo", x, w), (5, 7), X),
    "linear transposed": (lambda x, w: F.linear(x, w.t()), (7, 5), X),
    "linear sliced": (lambda x, w: F.linear(x, w[:3]), (5, 7), X),
    "linear normalised": (lambda x, w: F.linear(x, F.normalize(w)), (5, 7), X),
    "linear of the weight": (lambda x, w: F.linear(w, x), (5, 7), X),
    "linear of the weight and itself": (lambda x, w: F.linear(w, w) + x, (3, 3), SQUARE),
    "linear bias": (lambda x, w: F.linear(x, x, w), (3,), X),
    "addmm bias": (lambda x, w: torch.addmm(w, x, x.t()), (3, 3), X),
    "addmm input": (lambda x, w: torch.addmm(x.sum(1), w, x.t()), (5, 7), X),
    "addmm alpha": (lambda x, w: torch.addmm(x[:, :5], x, w, alpha=2), (7, 5), X),
    "addmm beta": (lambda x, w: torch.addmm(x[:, :5], x, w, beta=0.5), (7, 5), X),
    "addmm bias and weight": (lambda x, w: torch.addmm(w, x, w), (3, 3), SQUARE),
    "baddbmm": (lambda x, w: torch.baddbmm(x[None, :, :5], x[None], w[None]), (7, 5), X),
    "embedding of a table": (lambda x, w: F.embedding(x.long() % 3, w * 2), (3, 7), X),
    "conv kernel as input": (lambda x, w: F.conv1d(w, x[None]), (2, 3, 9), X),
    "added": (lambda x, w: x + w, (7,), X),
    "bucket": (lambda x, w: F.embedding_bag(x.long() % 3, w), (3, 7), X),
}


@pytest.mark.parametrize("name", list(OTHER_READS))
def test_reads_that_are_no_layer(name: str) -> None:
    how, shape, x = OTHER_READS[name]
    found = sites(Reads(how, *shape), x)
    assert kinds(found) == {"w": "weight"}


#: reads that are a layer's although no layer makes them
LAYER_READS: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "linear": (lambda x, w: F.linear(x, w), (5, 7), "linear"),
    "linear, cast": (lambda x, w: F.linear(x.double(), w.double()), (5, 7), "linear"),
    "linear, detached": (lambda x, w: F.linear(x, w.detach()), (5, 7), "linear"),
    "linear, bias computed": (lambda x, w: F.linear(x, w, x.sum() * BIAS), (5, 7), "linear"),
    "addmm": (lambda x, w: torch.addmm(x[:, :5], x, w), (7, 5), "addmm"),
    "addmm, ones": (lambda x, w: torch.addmm(x[:, :5], x, w, beta=1, alpha=1), (7, 5), "addmm"),
    "embedding": (lambda x, w: F.embedding(x.long() % 3, w), (3, 5), "embedding"),
    "conv1d": (lambda x, w: F.conv1d(x[None], w), (5, 3, 2), "conv1d"),
    "two linears": (
        lambda x, w: F.linear(F.linear(x, w), torch.ones(2, 5)) + F.linear(x * 2, w)[:, :2],
        (5, 7),
        "linear",
    ),
}


@pytest.mark.parametrize("name", list(LAYER_READS))
def test_reads_that_are_a_layer(name: str) -> None:
    how, shape, kind = LAYER_READS[name]
    assert kinds(sites(Reads(how, *shape), X)) == {"w": kind}


def test_two_kinds_of_reads_are_none_in_particular() -> None:
    found = sites(Reads(lambda x, w: F.linear(x, w) + x @ w.t(), 5, 7), X)
    assert found["w"].kind == "weight"
    assert set(found["w"].consumers) == {"linear", "t"}
    assert not found["w"].tied


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 5), nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.down(self.up(x))
        return x


def test_a_module_called_twice_is_one_site() -> None:
    found = sites(Twice(), X)
    assert found["up.weight"].consumers == ("linear", "linear_2")
    assert found["down.weight"].consumers == ("linear_1", "linear_3")
    assert not any(s.tied for s in found.values())


def test_tied_weights_are_a_site_per_module() -> None:
    found = sites(Tied().double(), torch.tensor([[1, 2, 3]]))
    assert kinds(found) == {
        "embed.weight": "embedding",
        "head.weight": "linear",
        "mid.weight": "linear",
        "mid.bias": "weight",
    }
    assert found["embed.weight"].consumers == ("embedding",)
    assert found["head.weight"].consumers == ("linear_1",)
    assert {k for k, s in found.items() if s.tied} == {"embed.weight", "head.weight"}
    found = sites(Shared(), X)
    assert found["first.weight"].consumers == ("linear",)
    assert found["second.weight"].consumers == ("linear_2",)
    assert found["first.weight"].tied
    assert found["second.weight"].tied
    assert not found["back.weight"].tied


class Outside(nn.Module):
    """Parents read parameters of modules that run themselves (``run``) and of modules that never do (``held``)."""

    def __init__(self) -> None:
        super().__init__()
        self.run, self.held = nn.Linear(7, 5), nn.Linear(7, 5, bias=False)
        self.never = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x) + F.linear(x, self.held.weight) + x @ self.run.weight.t()


def test_parameters_read_from_outside() -> None:
    found = sites(Outside(), X)
    assert set(found) == {"run.weight", "run.bias", "held.weight"}
    assert (found["run.weight"].kind, found["run.weight"].consumers, found["run.weight"].tied) == (
        "linear",
        ("linear",),
        True,
    )
    assert (found["held.weight"].kind, found["held.weight"].consumers, found["held.weight"].tied) == (
        "linear",
        ("linear_1",),
        False,
    )
    assert found["held.weight"].module_type == ""


def by_fqn(found: list[Site]) -> list[Site]:
    return sorted(found, key=lambda s: s.fqn)


@pytest.mark.few(25)
@pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", list(CASES))
def test_strict_capture_finds_the_same(name: str) -> None:
    """However a program was captured, and whether or not it comes from a file."""
    case = CASES[name]
    program = export(case.model(), *case.args(3))
    found = by_fqn(find_sites(program))
    assert found
    assert by_fqn(find_sites(export(case.model(), *case.args(3), strict=True))) == found
    assert by_fqn(find_sites(saved_and_loaded(program))) == found
    assert by_fqn(find_sites(program)) == found
    assert_valid(program)


def test_decomposed_programs_still_open() -> None:
    """Their linears are permutes and products now: no site is a linear, and nothing fails."""
    program = export(Twice(), X).run_decompositions()
    assert {s.kind for s in find_sites(program)} <= {"weight", "addmm"}
