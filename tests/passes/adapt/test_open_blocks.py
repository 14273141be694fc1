"""Who reads a parameter inside a subgraph, where several do: each layer has an input of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import Tensor, nn
from torch._higher_order_ops.map import map as map_rows
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import adaptc
from adaptc.passes.adapt.expose_subgraph_params import ExposeSubgraphParams
from tests.support.pass_checks import assert_valid
from tests.support.subject import quiet

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


class Net(nn.Module):
    """Layers that ``body`` calls as it likes."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.third, self.plain = Conv1D(5, 5), nn.Linear(5, 5, bias=False)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def in_and_out(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    with torch.no_grad():
        x = torch.tanh(m.first(x))
    return m.first(x) + m.second(x)


def two_branches(m: Any, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda t: m.second(m.first(t)), lambda t: m.first(m.second(t) * 2), (x,))


def one_branch(m: Any, x: Tensor) -> Tensor:
    return m.second(torch.cond(x.sum() > 0, lambda t: m.first(t), lambda t: t * 2, (x,)))


def read_elsewhere(m: Any, x: Tensor) -> Tensor:
    """The base's own weight and bias are read beside the layers'; PEFT leaves those alone."""
    with torch.no_grad():
        y = m.first(x) + m.first.bias.sum() + m.first.weight.mean()
    with torch.autocast("cpu", torch.bfloat16):
        y = m.second(y) * m.second.bias + F.linear(x, m.second.weight.cos())
    return y + m.second.bias


def in_branches_elsewhere(m: Any, x: Tensor) -> Tensor:
    return torch.cond(
        x.sum() > 0,
        lambda t: m.first(t) + m.second.weight.sum() + m.first.bias.sum(),
        lambda t: m.second(m.first(t)) + m.first.weight.sum(),
        (x,),
    )


def twice(m: Any, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda t: m.first(torch.tanh(m.first(t))), lambda t: m.third(m.third(t)), (x,))


def nested(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = m.first(x)
        return torch.cond(x.sum() > 0, lambda t: m.first(t) + m.third(t), lambda t: m.second(t) + m.first.bias, (x,))


def mapped(m: Any, x: Tensor) -> Tensor:
    return map_rows(lambda row, t: m.first(row) + m.plain(t), m.second(x), x[0])


def looped(m: Any, x: Tensor) -> Tensor:
    return while_loop(lambda i, t: i < 3, lambda i, t: (i + 1, torch.tanh(m.first(t))), (torch.tensor(0), x))[1]


def conv1d_fused(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = m.third(x) + m.third.bias.sum()
    return m.third(x)


BODIES = [
    in_and_out,
    two_branches,
    one_branch,
    read_elsewhere,
    in_branches_elsewhere,
    twice,
    nested,
    mapped,
    looped,
    conv1d_fused,
]


def peft_of(body: Callable[[Any, Tensor], Tensor], targets: list[str]) -> tuple[Net, Any, dict[str, Tensor]]:
    """A model, the same with IA3 by PEFT, and the adapter's tensors."""
    torch.manual_seed(3)
    model = Net(body).double().eval()
    with torch.no_grad():
        model.third.bias.normal_()
    config = IA3Config(target_modules=targets, feedforward_modules=[], init_ia3_weights=False)
    twin = Net(body).double().eval()
    twin.load_state_dict(model.state_dict())
    with quiet():
        wrapped = get_peft_model(twin, config).eval()
    values = {n.split("model.", 2)[-1].replace(".default", ""): p for n, p in wrapped.named_parameters() if "ia3_" in n}
    return model, wrapped, {k: v.detach().clone() for k, v in values.items()}


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("body", BODIES, ids=lambda b: b.__name__)
def test_as_peft(body, tmp_path):
    names = ["first", "second", "third", "plain"]
    used = [n for n in names if n in body.__code__.co_names or any(n in c.co_names for c in nested_code(body))]
    model, wrapped, values = peft_of(body, used)
    config = adaptc.IA3Config(target_modules=used, feedforward_modules=[])
    x = torch.randn(3, 5, dtype=torch.float64)
    program = adaptc.compile(model, config, example_inputs=x)
    assert {a.module for a in program.adaptation.attachments} == set(used)
    adaptc.swap(program, values)
    assert_valid(program)
    merged = adaptc.merge(program)
    assert_valid(merged)
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    for sign in (1, -1, 3):
        x = sign * torch.rand(7, 5, dtype=torch.float64)
        with torch.no_grad():
            expected, base = wrapped(x), model(x)
        assert not torch.allclose(expected, base, rtol=1e-2, atol=1e-2)
        for runs in (program, merged, adaptc.unmerge(merged), loaded, adaptc.merge(loaded)):
            torch.testing.assert_close(runs(x), expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(adaptc.unload(program)(x), base, rtol=1e-12, atol=1e-12)


def nested_code(function: Any) -> list[Any]:
    return [c for c in function.__code__.co_consts if hasattr(c, "co_names")]


def scanned(m: Any, x: Tensor) -> Tensor:
    return scan(lambda c, row: (torch.tanh(m.first(c) + row), m.second(c)), x[0], x)[1]


@pytest.mark.slow
def test_strict_captures():
    """There the calls inside branches are known by name, under another root."""
    model, wrapped, values = peft_of(in_branches_elsewhere, ["first", "second"])
    check_exported(model, wrapped, values)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.compile is ignored when called inside torch.export:UserWarning")
def test_scan():
    model, wrapped, values = peft_of(scanned, ["first", "second"])
    check_exported(model, wrapped, values)


def check_exported(model: Net, wrapped: Any, values: dict[str, Tensor]) -> None:
    x = torch.rand(4, 5, dtype=torch.float64)
    exported = torch.export.export(model, (x,), strict=True)
    config = adaptc.IA3Config(target_modules=["first", "second"], feedforward_modules=[])
    program = adaptc.compile(exported, config)
    adaptc.swap(program, values)
    for sign in (1, -1):
        with torch.no_grad():
            expected = wrapped.base_model.model(sign * x)
        torch.testing.assert_close(program(sign * x), expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(adaptc.merge(program)(sign * x), expected, rtol=1e-11, atol=1e-11)


class TestThePass:
    def test_a_program_without_blocks_stays_the_object_it_was(self):
        program = torch.export.export(Net(lambda m, x: m.first(x)), (torch.randn(3, 5),))
        result = ExposeSubgraphParams()(program)
        assert result.output is program
        assert result.count == 0

    def test_the_program_given_stays_as_it_was_and_opens_once(self):
        program = torch.export.export(Net(nested), (torch.randn(3, 5),), strict=False)
        before = program.graph_module.print_readable(print_output=False)
        opened = ExposeSubgraphParams()(program)
        assert program.graph_module.print_readable(print_output=False) == before
        assert opened.count >= 7
        assert ExposeSubgraphParams()(opened.output).output is opened.output
        x = torch.randn(3, 5)
        assert torch.equal(opened.output.module()(x), program.module()(x))


class TestRefusals:
    def test_a_new_bias_has_no_place_inside(self):
        config = adaptc.LoraConfig(target_modules=["plain"], lora_bias=True)
        with pytest.raises(adaptc.TargetError, match=r"plain\.weight.*bias.*block.*has no bias"):
            adaptc.compile(Net(mapped), config, example_inputs=torch.randn(3, 5))

    def test_a_bias_computed_inside(self):
        def body(m: Any, x: Tensor) -> Tensor:
            with torch.no_grad():
                return F.linear(x, m.first.weight, m.first.bias * 2)

        config = adaptc.IA3Config(target_modules=["first"], feedforward_modules=[])
        with pytest.raises(adaptc.TargetError, match=r"first\.weight.*ia3.*block.*computes its bias"):
            adaptc.compile(Net(body), config, example_inputs=torch.randn(3, 5))

    def test_dropout_has_no_place_inside(self):
        config = adaptc.LoraConfig(target_modules=["first"], lora_dropout=0.5)
        with pytest.raises(adaptc.ConfigError, match=r"first\.weight.*dropout.*block"):
            adaptc.compile(Net(two_branches), config, example_inputs=torch.randn(3, 5), training=True)

    def test_tied_layers_in_a_branch_cannot_be_told_apart(self):
        model = Net(two_branches)
        model.second = nn.Linear(5, 5)
        model.second.weight, model.second.bias = model.first.weight, model.first.bias
        config = adaptc.LoraConfig(target_modules=["second"])
        with pytest.raises(adaptc.TargetError, match=r"second\.weight.*first\.weight"):
            adaptc.compile(model, config, example_inputs=torch.randn(3, 5))


def test_a_bias_that_is_trained_inside():
    """LoRA with ``bias``: the trained bias goes through a subgraph input too."""
    torch.manual_seed(0)
    model = Net(nested).double().eval()
    x = torch.rand(3, 5, dtype=torch.float64)
    config = adaptc.LoraConfig(r=3, target_modules=["first", "second"], bias="all", init_lora_weights=False)
    program = adaptc.compile(model, config, example_inputs=x)
    with torch.no_grad():
        for name, p in program.module().named_parameters():
            if p.requires_grad and "bias" in name:
                p.normal_()
    merged = adaptc.merge(program)
    state = {k: v for k, v in merged.state_dict.items() if k in model.state_dict()}
    got = program(x)
    # The bias that is read beside the layer is trained as well: it is the module's own.
    state["first.bias"] = merged.state_dict["first.bias"]
    torch.testing.assert_close(merged(x), got, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(torch.func.functional_call(model, state, (x,)), got, rtol=1e-11, atol=1e-11)
