"""The hoist pass on graphs: what it takes out, what it must leave, and that both parts together compute the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from adaptc.passes.optimize.hoist import CONSTANT_BYTES, Hoist, HoistedGraphs
from tests.support.cover import examples
from tests.support.pass_checks import Snapshot, export

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))


class Frozen(nn.Module):
    """``body(self, x)`` over a weight, a vector, packed weights and a table."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.w = nn.Parameter(torch.randn(7, 5, generator=generator))
        self.v = nn.Parameter(torch.randn(5, generator=generator))
        self.register_buffer("packed", torch.randint(-9, 9, (7, 5), dtype=torch.int8, generator=generator))
        self.register_buffer("index", torch.randint(0, 7, (3, 3), generator=generator))
        self.register_buffer("count", torch.ones(5))
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def program(body: Callable[[Any, Tensor], Any], **options: Any) -> ExportedProgram:
    return export(Frozen(body).eval(), X, **options)


def placeholders(p: ExportedProgram) -> tuple[list[str], list[str]]:
    """(lifted, user) names."""
    users = set(p.graph_signature.user_inputs)
    names = [n.name for n in p.graph.find_nodes(op="placeholder")]
    return [n for n in names if n not in users], [n for n in names if n in users]


def split(p: ExportedProgram, slots: Collection[str] = (), **options: Any) -> HoistedGraphs:
    lifted, users = placeholders(p)
    return Hoist([set(lifted) - set(slots), set(slots)], set(users), **options)(p.graph).data


def run(p: ExportedProgram, h: HoistedGraphs, x: Tensor) -> Any:
    """The outputs of both parts run one after the other."""
    lifted, _ = placeholders(p)
    by_name = {s.arg.name: s.target for s in p.graph_signature.input_specs}
    values = {n: p.state_dict.get(by_name[n], p.constants.get(by_name[n])) for n in lifted}
    with torch.no_grad():
        for stage in h.stages:
            out = fx.GraphModule({}, stage.graph)(*(values[n] for n in stage.inputs))
            values |= zip(stage.outputs, out, strict=True)
        made = [values[n] for s in h.stages for n in s.outputs]
        return fx.GraphModule(p.graph_module, h.main)(*(values[n] for n in h.kept_placeholders), *made, x)


def whole(p: ExportedProgram, x: Tensor) -> Any:
    lifted, _ = placeholders(p)
    by_name = {s.arg.name: s.target for s in p.graph_signature.input_specs}
    with torch.no_grad():
        return p.graph_module(*(p.state_dict.get(by_name[n], p.constants.get(by_name[n])) for n in lifted), x)


def same(p: ExportedProgram, h: HoistedGraphs, x: Tensor = X) -> None:
    """Both parts lint, and give bit for bit what the graph gives."""
    for graph in (h.main, *(s.graph for s in h.stages)):
        graph.lint()
    found, expected = run(p, h, x), whole(p, x)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


def hoisted(h: HoistedGraphs) -> list[str]:
    return [n for s in h.stages for n in s.outputs]


def ops(graph: fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


def table(m: Any, x: Tensor) -> Tensor:
    return F.embedding(m.index, m.w).sum(0) + x[:1]


#: body -> the values that are computed once
FIRES: dict[str, tuple[Callable[[Any, Tensor], Any], list[str]]] = {
    "cast": (lambda m, x: F.linear(x.double(), m.w.double()), ["to_1"]),
    "norm": (lambda m, x: x * (m.w.float() ** 2).sum(1).sqrt().mean(), ["mean"]),
    "product": (lambda m, x: F.linear(x, m.w + m.w @ m.w.t() @ m.w), ["add"]),
    "two results": (lambda m, x: (x + (m.v * 2)) * (m.v * 3), ["mul", "mul_1"]),
    "inner and outer": (lambda m, x: x @ (m.w * 2).t() + (m.w * 2).norm(), ["t", "linalg_vector_norm"]),
    "tuple": (lambda m, x: x + m.w.max(0)[0], ["getitem"]),
    "pieces": (lambda m, x: x[:, :1] * (m.w * 2).chunk(3, 0)[1].sum(), ["sum_1"]),
    "grid": (lambda m, x: x + torch.meshgrid(m.v[:3] * 2, m.v * 3, indexing="ij")[0], ["getitem"]),
    "gather": (table, ["sum_1"]),
    "einsum": (lambda m, x: torch.einsum("ij,j->i", m.w * 2, m.v)[:5] * x, ["slice_1"]),
    "slice": (lambda m, x: x + m.w[:3] * 2, ["mul"]),
    "constant": (lambda m, x: x + torch.arange(5), ["arange"]),
    "quiet dropout": (lambda m, x: x + F.dropout(m.v * 2, 0.5, False), ["dropout"]),
    "attention": (lambda m, x: x[0] + F.scaled_dot_product_attention(*[m.w[None]] * 3)[0], ["select_1"]),
    "write elsewhere": (lambda m, x: (x * 2).add_(m.v * 2), ["mul_1"]),
}


@pytest.mark.parametrize("name", FIRES)
def test_what_depends_on_frozen_inputs_alone_is_computed_once(name: str) -> None:
    body, expected = FIRES[name]
    p = program(body)
    before = Snapshot.record(p)
    h = split(p)
    same(p, h)
    assert hoisted(h) == expected
    assert h.count == len(expected)
    assert len(ops(h.main)) < len(ops(p.graph))
    before.check(p)


def in_dropout(m: Any, x: Tensor) -> Tensor:
    return F.dropout(m.v * 2, 0.5, False).add_(x.sum())


#: body -> the values that may be computed once all the same
STAYS: dict[str, tuple[Callable[[Any, Tensor], Any], list[str]]] = {
    "input": (lambda m, x: x * 2 + x.sum(), []),
    "the parameter itself": (lambda m, x: F.linear(x, m.w, None), []),
    "written": (lambda m, x: (m.v * 2).add_(x.sum()), []),
    "written through a view": (lambda m, x: ((m.w * 2).t().add_(x.sum()), x)[1], []),
    "written through dropout": (in_dropout, []),
    "written through a cast": (lambda m, x: ((m.v * 2).type_as(x).add_(x.sum()), x)[1], []),
    "written through einsum": (lambda m, x: (torch.einsum("ij->ji", m.w * 2).add_(x.sum()), x)[1], []),
    "written in part": (lambda m, x: torch.zeros(5, 5).index_put_((torch.arange(3),), x), ["arange"]),
    "returned": (lambda m, x: (x + 1, m.v.exp()), []),
    "returned as a view": (lambda m, x: (x + 1, m.w.exp().t()), []),
    "counter": (lambda m, x: x + m.count.add_(1) * 2, []),
    "view of a counter": (lambda m, x: (m.count[:3].mul_(2), x + m.count * 3)[1], []),
    "random": (lambda m, x: x + torch.rand_like(m.v) * 0, []),
    "drawn from nothing": (lambda m, x: x + torch.randn(5) * 0, []),
    "dropout": (lambda m, x: x + F.dropout(m.v, 0.5, True) * 0, []),
    "attention dropout": (
        lambda m, x: x[0] + F.scaled_dot_product_attention(*[m.w[None]] * 3, None, 0.5)[0, 0] * 0,
        [],
    ),
    "uninitialised": (lambda m, x: x + torch.empty_like(m.v).isnan() * 0, []),
    "large constant": (lambda m, x: x + torch.arange(CONSTANT_BYTES // 8 + 1)[-1], []),
    "unpacked": (lambda m, x: F.linear(x, m.packed.float() * 0.5), []),
    "size from data": (lambda m, x: x + m.index.nonzero().sum(), []),
    "scalar": (lambda m, x: x * m.index[0, 0].item(), []),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_must_not_be_kept_is_computed_in_every_call(name: str) -> None:
    body, expected = STAYS[name]
    p = program(body)
    assert hoisted(split(p, hoists_views=False)) == expected
    h = split(p)
    for graph in (h.main, *(s.graph for s in h.stages)):
        graph.lint()
    if name not in ("counter", "view of a counter"):  # which these change
        torch.testing.assert_close(run(p, h, X), whole(p, X), rtol=0, atol=0)


def test_running_statistics_written_in_training_are_not_frozen() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm.running_mean * 2 + self.norm.weight * 3

    training, evaluating = Net().train(), Net().eval()
    assert hoisted(split(export(training, X))) == ["mul_1"]
    assert hoisted(split(export(evaluating, X))) == ["mul", "mul_1"]


def test_sizes_of_inputs_are_inputs() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        rows = m.w[: x.shape[0]] * 2
        return x + rows + torch.arange(x.shape[0])[:, None] + m.w[:1] * 3 + m.v.expand(x.shape[0], 5) * 4

    p = program(body, dynamic_shapes=({0: Dim("batch", max=7)},))
    h = split(p)
    assert hoisted(h) == ["mul_1"]
    same(p, h)
    same(p, h, torch.randn(6, 5))


def test_blocks_without_gradients_stay_where_they_are() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        made = m.w * 2
        with torch.no_grad():
            inner = made + 1
        return F.linear(x, inner) + (m.v * 3).sum()

    p = export(Frozen(body), X)
    h = split(p)
    assert hoisted(h) == ["mul", "sum_1"]
    assert any(n.op == "get_attr" for n in h.main.nodes)
    same(p, h)


def test_a_block_that_writes_keeps_what_it_reads_in_the_call() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        made = m.v * 2
        with torch.no_grad():
            made.add_(x.detach().sum())
        return x + made

    p = export(Frozen(body), X)
    h = split(p)
    assert hoisted(h) == []


def test_checks_of_frozen_values_move_along() -> None:
    p = program(lambda m, x: F.linear(x.double(), (m.w * 2).double()))
    assert "aten._assert_tensor_metadata.default" in ops(p.graph)
    h = split(p)
    frozen = [s.graph for s in h.stages if s.outputs]
    assert ops(frozen[0]).count("aten._assert_tensor_metadata.default") == 1
    assert ops(h.main).count("aten._assert_tensor_metadata.default") == 1
    assert h.kept_placeholders == ()
    same(p, h)


def test_views_and_constants_are_for_interpreters() -> None:
    p = program(lambda m, x: x @ m.w.t() @ (m.w * 2) + torch.arange(5))
    both = split(p)
    assert hoisted(both) == ["t", "mul", "arange"]
    assert both.nbytes == 7 * 5 * 4 + 5 * 8
    compiled = split(p, hoists_views=False, hoists_constants=False)
    assert hoisted(compiled) == ["mul"]
    same(p, both)
    same(p, compiled)


@pytest.mark.parametrize(
    ("body", "nbytes"),
    [
        (lambda m, x: x @ m.w.t().contiguous(), 7 * 5 * 4),
        (lambda m, x: F.linear(x, m.w.contiguous()), 0),
        (lambda m, x: F.linear(x, m.w.to(torch.float32, copy=True)), 7 * 5 * 4),
        (lambda m, x: F.linear(x, m.w.to(torch.float32)), 0),
        (lambda m, x: x * m.w.t().reshape(7, 5)[:1], 7 * 5 * 4),
        (lambda m, x: x * m.w.reshape(5, 7)[:1, :5], 0),
        (
            lambda m, x: F.linear(x, (m.w * 2).t().t())[:, :5] + (m.w * 3).chunk(7)[1] + (m.v * 2).expand(3, 5),
            85 * 4 - 40,
        ),
    ],
)
def test_memory_is_counted_once_and_views_not_at_all(body: Callable[[Any, Tensor], Any], nbytes: int) -> None:
    p = program(body)
    h = split(p)
    assert h.nbytes == nbytes
    same(p, h)
    assert split(p, limit=nbytes).count == h.count
    assert not nbytes or split(p, limit=nbytes - 1).nbytes < nbytes


def test_later_stages_build_on_earlier_ones() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        base = m.w * 2
        return F.linear(x, base + m.v) + F.linear(x, base) + m.v.exp().sum() + (m.w * 3).sum()

    p = program(body)
    h = split(p, slots=["p_v"])
    assert [s.outputs for s in h.stages] == [("mul", "sum_2"), ("add", "sum_1")]
    assert set(h.stages[0].inputs) == {"p_w"}
    assert set(h.stages[1].inputs) == {"p_v", "mul"}
    assert h.stages[1].sources == (("p_w", "p_v"), ("p_v",))
    assert h.kept_placeholders == ()
    same(p, h)


def test_what_a_later_stage_alone_needs_is_not_kept() -> None:
    """The cast of a weight that an adapter then changes would be a second copy of the base."""
    p = program(lambda m, x: F.linear(x.double(), m.w.double() + m.v))
    h = split(p, slots=["p_v"])
    assert [s.outputs for s in h.stages] == [(), ("add",)]
    same(p, h)


def test_a_limit_leaves_out_what_saves_least_per_byte() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        product = m.w @ m.w.t() @ m.w @ m.w.t() @ m.w  # (7, 5), much work
        return F.linear(x, product) + F.linear(x, m.w * 2) + (m.w**2).sum() + F.linear(x, m.w.double().float() + 1)

    p = program(body)
    full = split(p)
    matrix = 7 * 5 * 4
    assert full.nbytes == 3 * matrix + 4
    for limit, expected in [
        (full.nbytes, 4),
        (full.nbytes - 1, 3),
        (matrix + 4, 2),
        (matrix + 3, 1),
        (4, 1),
        (3, 0),
    ]:
        h = split(p, limit=limit)
        assert h.nbytes <= limit
        assert len([n for n in hoisted(h) if "t" not in n.split("_")]) == expected, (limit, hoisted(h))
        same(p, h)
    assert "sum_1" in hoisted(split(p, limit=4))
    assert "matmul_3" in hoisted(split(p, limit=matrix + 4))


def test_a_cast_saves_work_and_work_that_two_values_share_is_saved_once() -> None:
    matrix = 7 * 5 * 4
    cast = program(lambda m, x: F.linear(x, m.w * 2) + F.linear(x, m.w.double().float()))
    assert hoisted(split(cast, limit=matrix)) == ["to_1"]

    def body(m: Any, x: Tensor) -> Tensor:
        product, alone = m.w @ m.w.t() @ m.w, m.w
        for _ in range(20):
            alone = alone.sin()
        return F.linear(x, product * 2) + F.linear(x, product * 3) + F.linear(x, alone)

    assert hoisted(split(program(body), limit=matrix, hoists_views=False)) == ["matmul_1"]


def test_over_the_limit_the_part_that_is_small_is_still_hoisted() -> None:
    p = program(lambda m, x: F.linear(x, m.w * (m.w.t() @ m.w).sum(0).sqrt()))
    h = split(p, limit=5 * 4)
    assert h.nbytes == 5 * 4
    assert hoisted(h)[-1] == "sqrt"
    assert "aten.mul.Tensor" in ops(h.main)
    same(p, h)


STEPS: list[Callable[[Any, Tensor, Tensor], Tensor]] = [
    lambda m, a, b: a + b,
    lambda m, a, b: (a * m.v).sin(),
    lambda m, a, b: F.linear(F.linear(a, m.w), m.w.t()),
    lambda m, a, b: a.double().float() - b.mean(),
    lambda m, a, b: (a * 1).mul_(b.max()),
    lambda m, a, b: a.clone().t().add_(b.mean()).t(),
    lambda m, a, b: torch.stack([a, b]).unbind(0)[1] + a.chunk(1)[0],
    lambda m, a, b: F.dropout(a, 0.3, False).relu(),
    lambda m, a, b: a.sort(0)[0] * m.count,
    lambda m, a, b: torch.where(a > b, a, m.v),
]


@settings(max_examples=examples(12))
@given(
    plan=st.lists(st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 20), st.integers(0, 20)), min_size=3),
    limit=st.sampled_from([None, 0, 50, 150]),
    views=st.booleans(),
)
def test_any_graph_computes_the_same_in_two_parts(
    plan: Sequence[tuple[int, int, int]], limit: int | None, views: bool
) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        values = [x, m.w[:3] * 2, m.w[4:] + m.v, x.cos()]
        for step, i, j in plan[:9]:
            values.append(STEPS[step](m, values[i % len(values)], values[j % len(values)]))
        return torch.stack(values[4:]).sum(0)

    p = program(body)
    h = split(p, slots=["p_v"], limit=limit, hoists_views=views, hoists_constants=views)
    assert limit is None or h.nbytes <= limit
    same(p, h)
    same(p, h, torch.randn(3, 5))
