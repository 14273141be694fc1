"""Random trees of modules, random targets and ranks, against weights merged by hand."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig
from tests.support import cover
from tests.support.pass_checks import assert_valid

VOCABULARY = 13
NAMES = ["0", "1", "a", "a-b", "input", "lin", "max", "self_attn", "x@y", "_"]
Spec = tuple[Any, ...]


class Tree(nn.Module):
    """Children run one after the other on (batch, length, width); ``times`` over if the width allows it."""

    def __init__(self, children: list[tuple[str, Spec]], width: int, times: int) -> None:
        super().__init__()
        self.order = [name for name, _ in children]
        self.width, first = width, width
        for name, spec in children:
            child, self.width = build(spec, self.width)
            self.add_module(name, child)
        self.times = times if self.width == first else 1

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            for name in self.order:
                child = self.get_submodule(name)
                y = child(x.mT).mT if isinstance(child, nn.Conv1d) else child(x)
                x = torch.tanh(y)
        return x


class Root(nn.Module):
    """Ids -> embedding -> tree -> mean over the length; with ``tied``, a head that shares the embedding's weight."""

    def __init__(self, width: int, tree: Tree, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width, padding_idx=1)
        self.tree = tree
        self.head = nn.Linear(width, VOCABULARY, bias=False) if tied and tree.width == width else None
        if self.head is not None:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tree(self.embed(ids))
        return x if self.head is None else self.head(x)


def build(spec: Spec, width: int) -> tuple[nn.Module, int]:
    kind, *options = spec
    if kind == "linear":
        out, bias = options
        return nn.Linear(width, out, bias=bias), out
    if kind == "conv":
        out, kernel, groups, bias = options
        groups = groups if width % groups == 0 else 1
        return nn.Conv1d(width, out * groups, kernel, padding="same", groups=groups, bias=bias), out * groups
    tree = Tree(options[0], width, options[1])
    return tree, tree.width


def children(of: st.SearchStrategy[Spec]) -> st.SearchStrategy[list[tuple[str, Spec]]]:
    return st.lists(st.tuples(st.sampled_from(NAMES), of), min_size=1, max_size=3, unique_by=lambda c: c[0])


WIDTHS = st.integers(1, 7)
LAYERS: st.SearchStrategy[Spec] = st.one_of(
    st.tuples(st.just("linear"), WIDTHS, st.booleans()),
    st.tuples(st.just("conv"), st.integers(1, 4), st.sampled_from([1, 3, 5]), st.sampled_from([1, 2]), st.booleans()),
)
SPECS = st.recursive(LAYERS, lambda s: st.tuples(st.just("nest"), children(s), st.integers(1, 2)), max_leaves=6)


@dataclass
class Example:
    model: nn.Module
    config: LoraConfig
    sites: list[str]
    shapes: list[tuple[int, int]]


@st.composite
def examples(draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype]) -> Example:
    torch.manual_seed(draw(st.integers(0, 99)))
    width = draw(WIDTHS)
    tree = Tree(draw(children(SPECS)), width, draw(st.integers(1, 2)))
    model = Root(width, tree, draw(st.booleans())).to(draw(dtypes)).eval()
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Embedding))]
    targets = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    sites = [n for n in names if any(n == t or n.endswith(f".{t}") for t in targets)]
    grouped = any(getattr(model.get_submodule(n), "groups", 1) > 1 for n in sites)
    config = LoraConfig(
        r=draw(st.sampled_from([2, 4, 6] if grouped else [1, 2, 3, 5])),
        lora_alpha=draw(st.integers(1, 9)),
        use_rslora=draw(st.booleans()),
        target_modules=targets,
        init_lora_weights=False,
    )
    shapes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(2, 9)), min_size=1, max_size=2))
    return Example(model, config, sites, shapes)


@torch.no_grad()
def by_hand(model: nn.Module, sites: list[str], tensors: dict[str, Tensor], scale: float) -> nn.Module:
    """A float64 copy with W + s B A at the sites; a tied weight becomes two first."""
    merged = copy.deepcopy(model).double()
    for name in sites:
        layer: Any = merged.get_submodule(name)
        weight = layer.weight.detach().clone()
        key = "lora_embedding_{}" if isinstance(layer, nn.Embedding) else "lora_{}.weight"
        A, B = (tensors[f"{name}.{key.format(x)}"].double() for x in "AB")
        if isinstance(layer, nn.Embedding):
            weight += scale * (B @ A).T
        elif isinstance(layer, nn.Linear):
            weight += scale * B @ A
        else:
            # Group g of the output channels sees its own channels of the input; the change makes it see all of them.
            out, per = layer.out_channels // layer.groups, layer.in_channels // layer.groups
            dense = torch.zeros(layer.out_channels, layer.in_channels, *layer.kernel_size, dtype=torch.float64)
            for g, (b, rows) in enumerate(zip(B.chunk(layer.groups), dense.chunk(layer.groups), strict=True)):
                rows[:, g * per : (g + 1) * per] = weight[g * out : (g + 1) * out]
                ranks = A.chunk(layer.groups)[g]
                rows += scale * torch.einsum("ork,rik->oik", b, ranks)
            weight, layer.groups = dense, 1
        layer.weight = nn.Parameter(weight)
    return merged


def factors(program: adaptc.AdaptedProgram) -> dict[str, Tensor]:
    return {
        f"{a.key}.{s}": program.binding.values[f].detach()
        for a in program.adaptation.attachments
        for s, f in a.slots.items()
    }


def check(e: Example, tolerance: float) -> None:
    base = {k: v.detach().clone() for k, v in e.model.state_dict().items()}
    program = adaptc.compile(e.model, e.config, example_inputs=torch.arange(15).reshape(3, 5) % VOCABULARY)
    assert_valid(program)
    assert {a.module for a in program.adaptation.attachments} == set(e.sites)
    tensors = factors(program)
    scale = e.config.lora_alpha / (e.config.r**0.5 if e.config.use_rslora else e.config.r)
    reference = by_hand(e.model, e.sites, tensors, scale)
    merged, unloaded = adaptc.merge(program), adaptc.unload(program)
    for p in (merged, unloaded):
        assert_valid(p)
    for shape in e.shapes:
        ids = torch.randint(VOCABULARY, shape)
        expected = reference(ids)
        for runs in (program, program.module(), merged, adaptc.unmerge(merged)):
            torch.testing.assert_close(runs(ids).double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(unloaded(ids), e.model(ids), rtol=tolerance, atol=tolerance)
    for name in e.sites:
        found, wanted = merged.state_dict[f"{name}.weight"], reference.get_submodule(name).weight
        torch.testing.assert_close(found.double(), wanted.detach(), rtol=tolerance, atol=tolerance, check_stride=False)
    assert all(torch.equal(v, base[k]) for k, v in e.model.state_dict().items())
    assert all(unloaded.state_dict[k].data_ptr() == v.data_ptr() for k, v in e.model.state_dict().items())


@pytest.mark.long
@settings(max_examples=cover.examples(25))
@given(examples(st.just(torch.float64)))
def test_random_models(e: Example) -> None:
    check(e, 1e-11)


@pytest.mark.long
@settings(max_examples=cover.examples(8))
@given(examples(st.just(torch.float32)))
def test_random_models_in_float32(e: Example) -> None:
    check(e, 2e-5)
