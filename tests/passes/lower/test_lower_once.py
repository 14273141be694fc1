"""Ops that are equal are lowered once, others are not, and the lowered graph computes the same bits as the whole's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch.aot_autograd import aot_export_module
from torch._inductor.decomposition import select_decomp_table
from torch.nn import functional as F

from adaptc.passes.graph.graph_lock import hold_graph_lock
from adaptc.passes.graph.lifted import fake_maker
from adaptc.passes.lower.lower_once import Lowered, NotOnce, lower_once
from tests.support.pass_checks import export

AUTO = torch.export.Dim.AUTO


class Block(nn.Module):
    """Attention with halves that are turned and put together again, then two layers: views, lists, slices, sizes."""

    def __init__(self, width: int = 12, dtype: torch.dtype = torch.float32, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=epsilon, dtype=dtype)
        self.qkv, self.out = nn.Linear(width, 3 * width, dtype=dtype), nn.Linear(width, width, dtype=dtype)
        self.up, self.down = nn.Linear(width, 7, dtype=dtype), nn.Linear(7, width, bias=False, dtype=dtype)
        self.register_buffer("gain", torch.tensor(0.5, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        b, s, w = x.shape
        q, k, v = (t.view(b, s, 2, w // 2).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        q = torch.cat([-q[..., w // 4 :], q[..., : w // 4]], -1).to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, w)
        x = x + self.out(y)
        return x + self.down(F.silu(self.up(x))) * self.gain


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.emb, self.blocks = nn.Embedding(11, 12), nn.ModuleList(blocks)
        self.last = nn.Linear(12, 5)
        self.last.weight.data[0] = 0

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.emb(ids)
        mask = torch.arange(ids.shape[1], device=ids.device) < 3
        for block in self.blocks:
            x = block(x.to(next(block.parameters()).dtype))
        return self.last(x.float()) * mask[:, None], x


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(batch))


def lower(graph: fx.Graph, values: Sequence[Any], root: Any = None) -> fx.Graph:
    """What inductor does before it compiles: the ops that it knows, found by tracing the whole graph twice."""
    module = fx.GraphModule({} if root is None else root, graph)
    with hold_graph_lock(), torch.no_grad(), enable_python_dispatcher():
        made, _ = aot_export_module(module, tuple(values), trace_joint=False, decompositions=select_decomp_table())
    assert isinstance(made, fx.GraphModule)
    return made.graph


class Both:
    """A model lowered op by op (``once``) and as a whole, to be run on inputs."""

    def __init__(self, model: nn.Module, *example: Any, **options: Any) -> None:
        torch.manual_seed(0)
        self.module = export(model.eval(), *example, **options).module(check_guards=False)
        self.module.graph.set_codegen(fx.graph.CodeGen())
        self.graph: fx.Graph = self.module.graph
        self.tensors = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}

    def once(self) -> Lowered:
        fake = fake_maker(self.graph)
        fakes = {name: fake(t.detach()) for name, t in self.tensors.items()}
        with hold_graph_lock(), torch.no_grad(), enable_python_dispatcher():
            return lower_once(self.graph, fakes, lower)

    def whole(self) -> fx.Graph:
        return lower(self.graph, [n.meta["val"] for n in self.graph.find_nodes(op="placeholder")], self.module)

    def run(self, graph: fx.Graph, *inputs: Any) -> Any:
        graph.lint()
        with torch.no_grad():
            return fx.GraphModule({}, graph)(*self.tensors.values(), *inputs)


def stack(*blocks: nn.Module) -> Both:
    return Both(Stack(*blocks), ids(3, 5), dynamic_shapes={"ids": {0: AUTO, 1: AUTO}})


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_bits_at_all_sizes(dtype: torch.dtype) -> None:
    both = stack(*(Block(dtype=dtype) for _ in range(3)))
    once, whole = both.once().graph, both.whole()
    for size in [(3, 5), (2, 9), (7, 2)]:
        for found, expected in zip(both.run(once, ids(*size)), both.run(whole, ids(*size)), strict=True):
            assert found.dtype == expected.dtype
            assert found.stride() == expected.stride()
            assert torch.equal(found, expected)


@pytest.mark.long
def test_the_values_and_ops_of_the_whole() -> None:
    """Apart from sizes, which are read wherever they are first seen, the same nodes with the same metadata."""
    both = stack(Block(), Block())

    def shown(graph: fx.Graph) -> list[Any]:
        tensors = [n for n in graph.nodes if n.op != "placeholder" and isinstance(n.meta.get("val"), Tensor)]
        names = ("val", "original_aten", "nn_module_stack", "stack_trace")
        return [(str(n.target), *(str(n.meta.get(name)) for name in names)) for n in tensors]

    assert shown(both.once().graph) == shown(both.whole())


@pytest.mark.long
def test_equal_layers_are_lowered_once() -> None:
    two, five = (stack(*(Block() for _ in range(n))).once() for n in (2, 5))
    assert two.distinct == five.distinct
    assert five.ops - two.ops == 3 * (five.ops - stack(*(Block() for _ in range(4))).once().ops)


@pytest.mark.long
@pytest.mark.parametrize(
    "other", [lambda: Block(dtype=torch.float64), lambda: Block(epsilon=1e-6)], ids=["dtype", "argument"]
)
def test_other_layers_are_not(other: Callable[[], nn.Module]) -> None:
    both, equal = stack(Block(), other()), stack(Block(), Block())
    once = both.once()
    assert once.distinct > equal.once().distinct
    for found, expected in zip(both.run(once.graph, ids(2, 3)), both.run(both.whole(), ids(2, 3)), strict=True):
        assert torch.equal(found, expected)


def _distinct(function: Callable[..., Any], *example: Any, **options: Any) -> int:
    class Model(nn.Module):
        def forward(self, *args: Any) -> Any:
            return function(*args)

    both = Both(Model(), *example, **options)
    once, whole = both.once(), both.whole()
    for found, expected in zip(both.run(once.graph, *example), both.run(whole, *example), strict=True):
        assert torch.equal(found, expected)
    return once.distinct


@pytest.mark.long
def test_what_tells_ops_apart() -> None:
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    assert _distinct(lambda x, y: (x + y, y + x), x, y) == 1
    assert _distinct(lambda x, y: (x * x, x * y), x, y) == 2
    assert _distinct(lambda x, y: (x.sum(0), y.sum(1)), x, y) == 2
    assert _distinct(lambda x, y: (x.exp(), y.exp()), x, y.double()) == 2
    assert _distinct(lambda x, y: (x.exp(), y.exp()), x, torch.randn(4, 3).t()) == 2  # strides
    assert _distinct(lambda x, y: (x.exp(), y.exp()), x, torch.randn(3, 5)) == 2
    assert _distinct(lambda x, y: (x + 0.0, y + -0.0), x, y) == 2
    assert _distinct(lambda x, y: (x + 1, y + True), x, y) == 2
    assert _distinct(lambda x, y: (x.exp(), y.exp()), x, y, dynamic_shapes={"args": ({0: AUTO}, {1: AUTO})}) == 2


class SharedMask(nn.Module):
    """A mask for two heads that share a key: its reshaped form has a stride that is the least of two sizes."""

    def forward(self, mask: Tensor, x: Tensor) -> Tensor:
        rows, one, queries, keys = mask.shape
        wide = mask[:, :, None].expand(rows, one, 2, queries, keys).reshape(rows, one, -1, keys)
        return x.masked_fill(wide, 0.0)


def test_a_stride_that_is_written_in_another_way() -> None:
    mask, x = torch.rand(3, 1, 5, 7) > 0.5, torch.randn(3, 2, 10, 7)
    shapes = {"mask": {0: AUTO, 2: AUTO, 3: AUTO}, "x": {0: AUTO, 2: AUTO, 3: AUTO}}
    both = Both(SharedMask(), mask, x, dynamic_shapes=shapes)
    (wide,) = both.graph.find_nodes(op="call_function", target=torch.ops.aten.reshape.default)
    assert "Min" in str(wide.meta["val"].stride())
    (found,), (expected,) = both.run(both.once().graph, mask, x), both.run(both.whole(), mask, x)
    assert torch.equal(found, expected)


class Keeps(nn.Module):
    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        cache.add_(x)
        return cache * 2


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True)


class Chooses(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tensor([1.0, 2.0, 3.0, 4.0])


class FromData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


@pytest.mark.parametrize(
    ("model", "inputs", "reason"),
    [
        (Keeps(), 2, r"add_.* may do more than compute"),
        (Draws(), 1, r"dropout.* may do more than compute"),
        (Chooses(), 1, r"(neither a parameter nor a buffer|may do more|numbers other)"),
        (Constant(), 1, r"neither a parameter nor a buffer"),
        (FromData(), 1, r"."),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_reasons(model: nn.Module, inputs: int, reason: str) -> None:
    both = Both(model, *(torch.randn(3, 4) for _ in range(inputs)))
    text = str(both.graph)
    with pytest.raises(NotOnce, match=reason):
        both.once()
    assert str(both.graph) == text


@pytest.mark.long
def test_another_layout_than_the_graph_says() -> None:
    both = stack(Block())
    (linear, *_) = both.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    linear.meta["val"] = linear.meta["val"].transpose(0, 1)
    with pytest.raises(NotOnce, match=r"when it is lowered, not"):
        both.once()
