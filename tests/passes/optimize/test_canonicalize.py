"""The canonicalize pass on graphs: what goes, what stays and why, and that every bit of the result is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from adaptc.passes.graph.lifted import copy_graph
from adaptc.passes.optimize.canonicalize import Canonicalize
from adaptc.passes.optimize.direct_calls import DIRECT_FUNCTIONS, CallDirectly
from tests.support.families import FAMILIES
from tests.support.pass_checks import export

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
aten = torch.ops.aten


class Body(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 7, generator=torch.Generator().manual_seed(2)))
        self.register_buffer("count", torch.zeros(5))
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def cleaned(body: Callable[[Any, Tensor], Any], **options: Any) -> tuple[fx.Graph, fx.Graph, list[Tensor]]:
    """(the graph, the clean graph, what the lifted inputs are before x)."""
    program = export(Body(body).eval(), X)
    clean = copy_graph(program.graph)
    Canonicalize({"x"}, **options)(clean)
    clean.lint()
    specs = [s for s in program.graph_signature.input_specs if s.target is not None]
    held = {**program.state_dict, **program.constants}
    return program.graph, clean, [held[s.target].detach().clone() for s in specs]  # type: ignore[index]


def run(graph: fx.Graph, lifted: list[Tensor]) -> Any:
    return fx.GraphModule({}, copy_graph(graph))(*(t.clone() for t in lifted), X.clone())


def ops(graph: fx.Graph) -> list[str]:
    return [str(n.target).removeprefix("aten.") for n in graph.nodes if n.op == "call_function"]


CASTS: dict[str, tuple[Callable[[Any, Tensor], Any], bool]] = {
    "of what is computed": (lambda m, x: (x.sin() @ m.w).to(torch.float32).cos(), True),
    "to a device as well": (lambda m, x: (x.sin() @ m.w).to("cpu", torch.float32).cos(), True),
    # torch.export writes the type into it.
    "to a device alone": (lambda m, x: (x.sin() @ m.w).to("cpu").cos(), True),
    "of a parameter": (lambda m, x: x.sin() @ m.w.to(torch.float32), False),
    "of a cast": (lambda m, x: x.sin().double().to(torch.float64).cos(), False),
    "of an integer": (lambda m, x: x.argsort().to(torch.int64) * x, False),
}


@pytest.mark.parametrize("case", CASTS)
def test_casts_that_autocast_gives_a_meaning_stay(case: str) -> None:
    body, stays = CASTS[case]
    count = [sum(o.startswith("to.") for o in ops(cleaned(body, autocast=on)[1])) for on in (False, True)]
    assert count[1] - count[0] == stays


GONE: dict[str, tuple[Callable[[Any, Tensor], Any], list[str]]] = {
    "a cast to its own dtype": (lambda m, x: x.sin().to(torch.float32).cos(), ["sin.default", "cos.default"]),
    "a whole slice": (lambda m, x: x.sin()[:, :].cos(), ["sin.default", "cos.default"]),
    "an expansion to its own size": (lambda m, x: x.sin().expand(3, 5).cos(), ["sin.default", "cos.default"]),
    "a reshape to its own shape": (lambda m, x: x.sin().reshape(3, 5).cos(), ["sin.default", "cos.default"]),
    "a product with one": (lambda m, x: (x.sin() * 1.0).cos(), ["sin.default", "cos.default"]),
    "dropout that is off": (lambda m, x: F.dropout(x.sin(), 0.5, training=False).cos(), ["sin.default", "cos.default"]),
    "a detach": (lambda m, x: x.sin().detach().cos(), ["sin.default", "cos.default"]),
    "the same twice": (lambda m, x: x.sin() + x.sin().cos(), ["sin.default", "cos.default", "add.Tensor"]),
    "what nobody reads": (lambda m, x: (x.tan(), x.sin() + 0)[1].cos(), ["sin.default", "add.Tensor", "cos.default"]),
}  # fmt: skip


@pytest.mark.parametrize("case", GONE, ids=str)
def test_what_does_nothing_goes(case: str) -> None:
    body, left = GONE[case]
    before, after, lifted = cleaned(body)
    assert len(ops(before)) > len(left)
    assert ops(after) == left
    assert torch.equal(run(before, lifted)[0], run(after, lifted)[0])


STAYS: dict[str, Callable[[Any, Tensor], Any]] = {
    "a cast to another dtype": lambda m, x: x.sin().to(torch.float64).cos(),
    "a part of an axis": lambda m, x: x.sin()[1:].cos(),
    "a step": lambda m, x: x.sin()[::2].cos(),
    "an expansion": lambda m, x: x.sin().unsqueeze(0).expand(2, 3, 5).cos(),
    "zero added, which takes the sign off a zero": lambda m, x: (x.sin() + 0.0).cos(),
    "random numbers": lambda m, x: torch.rand_like(x.sin()) + torch.rand_like(x.sin()),
    "equal numbers of other kinds": lambda m, x: torch.full_like(x, 1) // torch.full_like(x, 1.0) + x,
    "results that are two tensors": lambda m, x: (x.sin(), x.sin()),
}


@pytest.mark.parametrize("case", STAYS, ids=str)
def test_what_means_something_stays(case: str) -> None:
    before, after, lifted = cleaned(STAYS[case])
    checks = "_assert_tensor_metadata.default"
    named = [o for o in ops(before) if o != checks]
    if case == "random numbers":
        del named[named.index("sin.default", 1)]  # that one is computed twice
    assert ops(after) == named
    if case != "random numbers":
        assert all(torch.equal(a, b) for a, b in zip(run(before, lifted), run(after, lifted), strict=True))


def test_reads_around_a_write_are_two_reads() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        first = m.count.sin()
        m.count.add_(x[0])
        return first + m.count.sin() + x

    before, after, lifted = cleaned(body)
    assert ops(after).count("sin.default") == 2
    assert all(torch.equal(a, b) for a, b in zip(run(before, lifted), run(after, lifted), strict=True))


def test_a_copy_that_is_written_to_stays_one() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        copy = x.sin() * 1.0
        copy.add_(1)
        return copy

    _, after, lifted = cleaned(body)
    assert "mul.Tensor" in ops(after)
    assert torch.equal(run(after, lifted)[-1], X.sin() + 1)


def test_a_detach_means_something_where_gradients_flow() -> None:
    before, after, _ = cleaned(lambda m, x: x.sin().detach().cos(), differentiable=True)
    assert ops(after) == ops(before)


def test_checks_of_the_users_own_input_stay() -> None:
    before, after, _ = cleaned(lambda m, x: x.to(torch.float64).sin().to(torch.float32))
    checks = "_assert_tensor_metadata.default"
    assert (ops(before).count(checks), ops(after).count(checks)) == (2, 1)


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "t5", "resnet"])
def test_families_compute_the_same_bits_with_fewer_operators(name: str) -> None:
    import adaptc

    family = FAMILIES[name]
    program = adaptc.unload(adaptc.compile(family.build(), adaptc.LoraConfig(r=2, target_modules="all-linear")))
    executor = program.executor()
    graph = copy_graph(executor.module.graph)
    users = [n.name for n in graph.find_nodes(op="placeholder") if n.name not in executor.placeholder_names]
    before = len(graph.nodes)
    assert Canonicalize(users)(graph).count == before - len(graph.nodes)
    assert len(graph.nodes) < before or name == "resnet"  # which has nothing to clean
    bound = copy_graph(graph)
    assert CallDirectly()(bound).count > 20
    x = family.inputs(2, 5)
    flat = executor.inputs((), x)
    state = [executor.base[n] for n in executor.lifted_names]
    with torch.no_grad():
        expected = executor.module(*state, *flat)
        for g in (graph, bound):
            found = fx.GraphModule(executor.module, g)(*state, *flat)
            pairs = [(a, b) for a, b in zip(found, expected, strict=True) if isinstance(a, Tensor)]
            assert pairs
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32])
def test_bound_casts_are_casts(dtype: torch.dtype) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(
        [graph.call_function(aten.to.dtype, (x, dtype)), graph.call_function(aten.to.dtype, (x, dtype, False, True))]
    )
    expected = fx.GraphModule({}, copy_graph(graph))(X)
    assert CallDirectly()(graph).count == (dtype.is_floating_point)
    found = fx.GraphModule({}, graph)(X)
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(found, expected, strict=True))
    assert [t is X for t in found] == [dtype == torch.float32, False]  # what has the type stays what it is


def test_bound_functions_are_the_operators_they_stand_for() -> None:
    assert len(DIRECT_FUNCTIONS) > 25
    for overload, function in DIRECT_FUNCTIONS.items():
        assert function.__name__ in (
            overload.overloadpacket.__name__,
            "attention_by_segment",
            "_add_matmul",
            "low_rank_rows_direct",
            "linear_matmul",
        )
    x, y, total = torch.rand(3, 4), torch.rand(4, 5), torch.rand(3, 5)
    assert torch.equal(DIRECT_FUNCTIONS[torch.ops.aten.addmm_.default](total.clone(), x, y), total.clone().addmm_(x, y))
