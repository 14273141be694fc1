"""Lower on graphs: which regions become kernels, which stay and why, and that the program computes what it did."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from transformers.pytorch_utils import Conv1D

from adaptc.methods.lora_family.dora import Dora
from adaptc.methods.lora_family.lora import Lora
from adaptc.methods.sparse.ia3 import IA3
from adaptc.passes.adapt.respecialize import Respecialize
from adaptc.passes.adapt.unload import Unload
from adaptc.passes.graph.lifted import LiftedProgram, copy_graph
from adaptc.passes.graph.ops import Op
from adaptc.passes.graph.pass_infra import PassResult
from adaptc.passes.lower.lower_regions import Lower, LowerGraph
from adaptc.passes.lower.lower_siblings import LowerSiblings, find_lowered_groups
from adaptc.passes.optimize.canonicalize import Canonicalize
from adaptc.passes.optimize.hoist import stage_by_node
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Method
from adaptc.passes.protocol.regions import site_op
from tests.support.pass_checks import Snapshot, assert_valid, attach, export, inject_all, random_values

ROWS = torch.export.Dim("rows", min=2, max=99)


class Net(nn.Module):
    """Every kind of layer; the linear ones see inputs of one to three axes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.biased, self.plain, self.one = nn.Linear(7, 5), nn.Linear(7, 3, bias=False), nn.Linear(5, 2)
        self.turned, self.conv = Conv1D(6, 5), nn.Conv1d(5, 4, 3)
        self.table = nn.Embedding(11, 7)
        self.double()

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        h = self.biased(x)
        return self.turned(h), self.plain(x[:, 0]), self.one(h[0, 0]), self.conv(h.mT), self.table(ids)


def inputs(n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    return torch.randn(n, 4, 7, generator=g, dtype=torch.float64), torch.randint(0, 11, (n,), generator=g)


def program() -> ExportedProgram:
    return export(Net(), *inputs(3), dynamic_shapes=({0: ROWS}, {0: ROWS}))


def adapted(*sites: tuple[str, Method]) -> tuple[ExportedProgram, list[Attachment], dict[str, Tensor]]:
    base = program()
    return inject_all(base, [attach(base, fqn, method, form="apply") for fqn, method in sites])


def ops_of(p: ExportedProgram, attachments: list[Attachment]) -> dict[str, Op]:
    lifted = LiftedProgram(p, edit=False)
    return {a.id: site_op(lifted, a) for a in attachments}


def lowered(p: ExportedProgram, attachments: list[Attachment]) -> tuple[ExportedProgram, dict[str, str]]:
    before = Snapshot.record(p)
    result = Lower(attachments, ops_of(p, attachments))(p)
    before.check(p)
    assert_valid(result.program)
    return result.program, dict(n.split(": ", 1) for n in result.notes)  # type: ignore[misc]


def lower(graph: fx.Graph, p: ExportedProgram, attachments: list[Attachment]) -> PassResult[fx.Graph]:
    """Lower a copy of the program's graph in place."""
    names = {fqn: n.name for fqn, n in LiftedProgram(p, edit=False).placeholders.items()}
    return LowerGraph(attachments, ops_of(p, attachments), names)(graph)


def opened(p: ExportedProgram) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """A copy of the graph, and its lifted placeholders by FQN."""
    graph = copy_graph(p.graph)
    names = {n.name: n for n in graph.nodes}
    return graph, {f: names[n.name] for f, n in LiftedProgram(p, edit=False).placeholders.items()}


def kernels(graph: fx.Graph) -> list[str]:
    return [n.target.__name__.split(".")[0] for n in graph.nodes if str(n.target).startswith("adaptc.")]  # type: ignore[union-attr]


def same(a: Any, b: Any, tolerance: float = 1e-13) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


LINEAR = ["biased.weight", "plain.weight", "one.weight", "turned.weight"]


@pytest.mark.parametrize("method", [Lora(r=3, alpha=5), Dora(r=2, alpha=7)], ids=["lora", "dora"])
def test_linear_layers_become_kernels(method: Method) -> None:
    p, attachments, _ = adapted(*((fqn, method) for fqn in LINEAR))
    new, notes = lowered(p, attachments)
    one = ["lora_linear"] if type(method) is Lora else ["dora_norm", "lora_down", "dora_epilogue"]
    assert kernels(new.graph) == one * len(LINEAR)
    assert not kernels(p.graph)
    assert not notes
    for n in (2, 5):
        same(new.module()(*inputs(n)), p.module()(*inputs(n)))


def test_a_second_lowering_changes_nothing() -> None:
    p, attachments, _ = adapted(*((fqn, Lora(r=3)) for fqn in LINEAR))
    new, _ = lowered(p, attachments)
    again, notes = lowered(new, attachments)
    Snapshot.record(new).check(again)
    assert not notes


STAYS = {
    "conv.weight": (Lora(r=3), "there are no kernels for a consumer of kind 'conv1d'"),
    "table.weight": (Lora(r=3), "there are no kernels for a consumer of kind 'embedding'"),
    "plain.weight": (Lora(r=3, dropout=0.5, training=True), "its dropout acts between the layer's input"),
    "biased.weight": (Lora(r=3, with_bias=True), "its adapter has a bias"),
}


@pytest.mark.parametrize("fqn", STAYS)
def test_what_has_no_kernel_stays_and_says_why(fqn: str) -> None:
    method, why = STAYS[fqn]
    p, attachments, _ = adapted((fqn, method))
    new, notes = lowered(p, attachments)
    Snapshot.record(p).check(new)
    assert list(notes) == [attachments[0].id]
    assert notes[attachments[0].id].startswith(why)


def test_regions_in_front_of_weights_and_inputs_stay() -> None:
    p = program()
    sites = [
        attach(p, "plain.weight", Lora(r=3), form="weight"),
        attach(p, "biased.weight", IA3(feedforward=True), form="apply"),
    ]
    p, attachments, _ = inject_all(p, sites)
    new, notes = lowered(p, attachments)
    Snapshot.record(p).check(new)
    assert [notes[a.id] for a in attachments] == [
        "its region stands in front of the weight",
        "it changes the layer's input in a region of its own",
    ]


def test_of_two_adapters_on_one_layer_the_first_is_lowered() -> None:
    base = program()
    sites = [attach(base, "plain.weight", Lora(r=3), adapter=n, variant=i, form="apply") for i, n in enumerate("ab")]
    p, attachments, _ = inject_all(base, sites)
    new, notes = lowered(p, attachments)
    assert kernels(new.graph) == ["lora_linear"]
    assert notes == {attachments[1].id: "another adapter changes the output of the layer before it"}
    same(new.module()(*inputs(5)), p.module()(*inputs(5)))
    Snapshot.record(Unload()(p).program).check(Unload()(new).program)


def test_an_output_that_is_read_without_the_adapter_too_stays() -> None:
    p, attachments, _ = adapted(("biased.weight", Lora(r=3)))
    layer = next(n for n in p.graph.nodes if n.target is torch.ops.aten.linear.default and "biased" in str(n.args[1]))
    with p.graph.inserting_after(layer):
        p.graph.call_function(torch.ops.aten.sin.default, (layer,)).meta["val"] = layer.meta["val"].sin()
    _, notes = lowered(p, attachments)
    assert notes == {attachments[0].id: "the output of the layer is read without the adapter too"}


class Copied(Lora):
    """Another formula than the one that LoRA's kernels are for."""

    def apply(self, *args: Any) -> Tensor:
        return 2 * super().apply(*args)


def test_a_class_that_changes_the_formula_does_not_inherit_its_kernels() -> None:
    assert Copied(r=3).kernels.why_missing(Op("linear", (3, 7), torch.ops.aten.linear.default)) == "lora has no kernels"
    p, attachments, _ = adapted(("plain.weight", Copied(r=3)))
    new, notes = lowered(p, attachments)
    assert not kernels(new.graph)
    assert notes


def test_types_that_no_kernel_takes_are_named() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    p = export(Half(), torch.randn(2, 7))
    a = attach(p, "layer.weight", Lora(r=3), form="apply")
    p, attachments, _ = inject_all(p, [a])
    graph, slots = opened(p)
    b = slots[attachments[0].slots["lora_B.weight"]]
    b.meta["val"] = b.meta["val"].to(torch.bfloat16)
    done = lower(graph, p, attachments)
    assert done.count == 0
    assert "B of A's type" in done.data.reasons_by_site[attachments[0].id]


def test_unload_gives_the_base_back() -> None:
    base = program()
    p, attachments, _ = inject_all(base, [attach(base, fqn, Lora(r=3), form="apply") for fqn in LINEAR])
    Snapshot.record(Unload()(p).program).check(Unload()(lowered(p, attachments)[0]).program)


@pytest.mark.parametrize("method", [Lora(r=3, alpha=5), Dora(r=2, alpha=7)], ids=["lora", "dora"])
def test_fake_values_follow_another_rank(method: Lora) -> None:
    p, attachments, _ = adapted(*((fqn, method) for fqn in LINEAR))
    new, _ = lowered(p, attachments)
    graph, slots = opened(new)
    other = [dataclasses.replace(a, method=dataclasses.replace(method, r=6)) for a in attachments]
    tensors = {k: v for k, v in random_values(p, other).items() if "scaling" not in k}
    names = {fqn: n.name for fqn, n in slots.items()}
    assert Respecialize(attachments, ops_of(p, attachments), names, tensors)(graph).count == len(LINEAR)
    low = [n.meta["val"].shape[-1] for n in graph.nodes if str(n.target) == "adaptc.lora_down.default"]
    assert low == [6] * (len(LINEAR) if type(method) is Dora else 0)
    assert {n.meta["val"].shape[0] for f, n in slots.items() if "lora_A" in f} == {6}


class Siblings(nn.Module):
    """Three layers of one input, one of another, and one whose output is returned as it is."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.c = nn.Linear(5, 7, bias), nn.Linear(5, 130, bias), nn.Linear(5, 2, bias)
        self.d, self.e = nn.Linear(5, 3, bias), nn.Linear(5, 4, bias)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        one, two, three = self.a(x), self.b(x), self.c(x)
        n = x.shape[0]
        return one.view(n, -1).cos(), two.view(-1).sin(), three.exp(), self.d(x + 1).cos(), self.e(x)


@pytest.mark.parametrize("bias", [False, True])
def test_siblings_share_a_product_and_a_kernel(bias: bool) -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    base = export(Siblings(bias), x, dynamic_shapes=({0: ROWS},))
    ranks = {"a": 3, "b": 2, "c": 5, "d": 4, "e": 2}
    p, attachments, _ = inject_all(
        base, [attach(base, f"{n}.weight", Lora(r=r), form="apply") for n, r in ranks.items()]
    )
    graph, slots = opened(p)
    lower(graph, p, attachments)
    Canonicalize({"x"})(graph)
    weights = {slots[f"{n}.weight"].name for n in ranks}
    groups = find_lowered_groups(graph, weights, stage_by_node(graph, [{n.name for n in slots.values()}]))
    three = ("p_a_weight", "p_b_weight", "p_c_weight")
    single = ("p_d_weight",), ("p_e_weight",)
    assert [tuple(m.weight.name for m in g.layers) for g in groups] == [three, *single]
    packs = LowerSiblings(weights, [{n.name for n in slots.values()}], {"x"})(graph).data
    assert [p.parameter_names for p in packs] == [three]
    assert kernels(graph) == ["sibling_table", "packed_lora", "packed_lora", "packed_lora"]
    run = fx.GraphModule(p.graph_module, graph)
    packed = {packs[0].name: torch.cat([p.state_dict[f"{n}.weight"] for n in "abc"]), "x": x}
    for seed in (0, 8):
        q, _, _ = inject_all(
            base, [attach(base, f"{n}.weight", Lora(r=r), form="apply") for n, r in ranks.items()], seed
        )
        known = {slots[f].name: t for f, t in q.state_dict.items()} | packed
        same(run(*(known[n.name] for n in graph.find_nodes(op="placeholder"))), q.module()(x))


def test_of_siblings_those_with_a_bias_and_those_without_are_groups_of_their_own() -> None:
    model = Siblings(True)
    model.c, model.e = nn.Linear(5, 2, False).double(), nn.Linear(5, 4, False).double()
    model.forward = lambda x: (model.a(x).cos(), model.b(x).sin(), model.c(x).exp(), model.e(x).cos())  # type: ignore[method-assign]
    base = export(model, torch.randn(3, 4, 5, dtype=torch.float64))
    p, attachments, _ = inject_all(base, [attach(base, f"{n}.weight", Lora(r=2), form="apply") for n in "abce"])
    graph, slots = opened(p)
    lower(graph, p, attachments)
    Canonicalize({"x"})(graph)
    weights = {slots[f"{n}.weight"].name for n in "abce"}
    groups = find_lowered_groups(graph, weights, stage_by_node(graph, [{n.name for n in slots.values()}]))
    found = [[m.weight.name for m in g.layers] for g in groups]
    assert found == [["p_a_weight", "p_b_weight"], ["p_c_weight", "p_e_weight"]]


def test_siblings_of_an_input_that_is_written_to_in_between_stay_apart() -> None:
    class Net(Siblings):
        def forward(self, x: Tensor) -> Tensor:
            h = x + 1
            view = h.view(-1)
            first = self.a(h).sum(-1).cos()
            view.mul_(2)
            return first + self.b(h).sum(-1).cos()

    x = torch.randn(4, 5, dtype=torch.float64)
    base = export(Net(False), x)
    p, attachments, _ = inject_all(base, [attach(base, f"{n}.weight", Lora(r=2), form="apply") for n in "ab"])
    graph, slots = opened(p)
    assert lower(graph, p, attachments).count == 2
    # As if both ops read the tensor itself, and not each a view of its own.
    (h,) = graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)[:1]
    for node in graph.find_nodes(op="call_function", target=torch.ops.adaptc.lora_linear.default):
        node.update_arg(0, h)
    frozen = stage_by_node(graph, [{n.name for n in slots.values()}])
    groups = find_lowered_groups(graph, {slots[f"{n}.weight"].name for n in "ab"}, frozen)
    assert [len(g.layers) for g in groups] == [1, 1]
    same(lowered(p, attachments)[0].module()(x), p.module()(x))


def test_siblings_with_adapters_that_move_stay_apart() -> None:
    base = export(Siblings(False), torch.randn(3, 4, 5, dtype=torch.float64))
    p, attachments, _ = inject_all(base, [attach(base, f"{n}.weight", Lora(r=2), form="apply") for n in "abc"])
    graph, slots = opened(p)
    lower(graph, p, attachments)
    Canonicalize({"x"})(graph)
    weights = {slots[f"{n}.weight"].name for n in "abc"}
    assert not find_lowered_groups(graph, weights, stage_by_node(graph, [weights]))
    frozen = stage_by_node(graph, [{n.name for n in slots.values()}])
    assert [len(g.layers) for g in find_lowered_groups(graph, weights, frozen)] == [3]
    groups = find_lowered_groups(graph, weights - {"p_a_weight", "p_b_weight"}, frozen)
    assert [len(g.layers) for g in groups] == [1, 1, 1]
