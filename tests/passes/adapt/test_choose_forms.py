"""Which form a site gets: the cheaper one at the sizes of the example inputs, and why."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import Tensor, nn

import adaptc
from adaptc.passes.adapt.choose_forms import choose_cheaper
from adaptc.passes.analysis.costs import OperationCount, count_node_operations, count_operations


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 40)
        self.conv = nn.Conv1d(40, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(self.up(x)).transpose(1, 2))


def forms(batch: int, **options) -> dict[str, tuple[str, str]]:
    free = torch.export.Dim("batch", min=1, max=4096)
    program = adaptc.compile(
        Net().eval(),
        adaptc.LoraConfig(r=options.pop("r", 4), target_modules=["up", "conv"]),
        example_inputs=torch.randn(batch, 5, 24),
        dynamic_shapes={"x": {0: free}},
        **options,
    )
    return {a.module: (a.form, a.why) for a in program.adaptation.attachments}


def test_small_ranks_stay_around_the_layer():
    found = forms(3)
    assert found.keys() == {"up", "conv"}
    for module, (form, why) in found.items():
        assert form == "apply", module
        assert "operations per call around the layer" in why
        assert "at the sizes of the example inputs" in why


def test_a_rank_as_large_as_the_layer_goes_on_the_weight():
    assert {form for form, _ in forms(700, r=40).values()} == {"weight"}
    assert {form for form, _ in forms(2, r=40).values()} == {"apply"}


@pytest.mark.long
def test_the_gradient_of_a_whole_weight_counts_in_training():
    inference = {m: f for m, (f, _) in forms(900, r=12).items()}
    training = {m: f for m, (f, _) in forms(900, r=12, training=True).items()}
    assert inference["up"] == training["up"] == "weight" or inference["up"] == "apply"
    outside, weight, base = (
        OperationCount(per_call=sympy.Integer(60)),
        OperationCount(hoistable=sympy.Integer(5)),
        OperationCount(sympy.Integer(100)),
    )
    assert choose_cheaper(outside, weight, base, {}, training=False).form == "apply"
    assert choose_cheaper(outside, weight, base, {}, training=True).form == "weight"


def test_half_precision_weights_are_not_rounded_anew():
    """However much cheaper it were: a small change of a weight is lost in its rounding."""
    program = adaptc.compile(
        Net().eval().bfloat16(),
        adaptc.LoraConfig(r=40, target_modules=["up"]),
        example_inputs=torch.randn(700, 5, 24).bfloat16(),
    )
    (a,) = program.adaptation.attachments
    assert (a.form, a.why) == ("apply", "a weight in half precision would round the change")


def test_what_is_asked_for_is_done():
    assert {f for f, _ in forms(3, form="weight").values()} == {"weight"}
    assert {why for _, why in forms(700, r=40, form="apply").values()} == {"asked for"}
    with pytest.raises(adaptc.ConfigError, match="form='around' is not one of auto, apply, weight"):
        forms(3, form="around")


def test_costs_are_symbolic():
    """A linear layer's work in the program's free sizes, and nothing for views."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return torch.nn.functional.linear(x.transpose(0, 1), w) + 1

    batch = torch.export.Dim("batch", min=1)

    class Module(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return fn(x, w)

    program = torch.export.export(
        Module(), (torch.randn(3, 2, 7), torch.randn(11, 7)), dynamic_shapes={"x": {0: batch}, "w": {}}
    )
    fakes = [n.meta["val"] for n in program.graph.find_nodes(op="placeholder")]
    (free,) = {str(s) for fake in fakes for s in fake.shape if not isinstance(s, int)}
    b = sympy.Symbol(free, integer=True, positive=True)
    total = sum(count_node_operations(n) for n in program.graph.nodes if n.op == "call_function")
    assert sympy.simplify(total - (2 * (2 * b * 11) * 7 + 2 * b * 11)) == 0
    assert count_operations(program.graph, 1).hoistable == 0
    assert count_operations(program.graph, 0).per_call == 0


def test_equal_work_is_told_in_multiples_of_the_example():
    n = sympy.Symbol("n", integer=True, positive=True)
    choice = choose_cheaper(
        OperationCount(per_call=30 * n),
        OperationCount(hoistable=sympy.Integer(400)),
        OperationCount(per_call=10 * n),
        {"n": 4},
        False,
    )
    assert choice.form == "apply"
    assert choice.reason.endswith("example inputs; equal at 5 times that")


def test_the_report_says_why():
    program = adaptc.compile(
        Net().eval(), adaptc.LoraConfig(r=4, target_modules=["up"]), example_inputs=torch.randn(3, 5, 24)
    )
    text = str(adaptc.report(program))
    assert "operations per call around the layer" in text
    (site,) = adaptc.report(program).sites
    assert site.why in text.replace("\n", " ") or site.why[:40] in text
