"""Methods that break a promise are refused when first used, by a message that says which promise and where."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import ConfigError, MethodError, TargetError
from adaptc.methods import InitialValues, Op, Slot, TargetedConfig, config_class
from adaptc.methods._shared.registry import CONFIGS
from adaptc.passes.protocol.method import Method
from adaptc.passes.protocol.method_checks import (
    TRACED_PROMISES,
    VALUE_PROMISES,
    check_promises,
    code_serves_all_sizes,
)
from adaptc.passes.protocol.method_names import check_names
from tests.support.method_table import BY_NAME, ENTRIES
from tests.support.odd_methods import registered
from tests.support.subject import Subject


@dataclasses.dataclass(frozen=True)
class Plain(Method):
    """W + s B A, as it should be: each wrong method below is this one with one function replaced."""

    name: ClassVar[str] = "plain"
    r: int = 2

    def slots(self, op: Op) -> dict[str, Slot]:
        rows, columns = op.matrix_shape
        return {"plain_A": Slot((self.r, columns), free=(0,)), "plain_B": Slot((rows, self.r), free=(1,))}

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: Any = None) -> InitialValues:
        values = {n: torch.zeros(s.shape, dtype=dtype, device=W.device) for n, s in self.slots(op).items()}
        values["plain_A"].normal_(generator=generator)
        return InitialValues(values)

    def weight(self, op: Op, W: Tensor, slots: Any, scale: Any) -> Tensor:
        change = slots["plain_B"] @ slots["plain_A"]
        return W + op.unmatrix(change if scale is None else change * scale).to(W.dtype)


class DeLoRA(Plain):
    """The scale over the rank and the norms (arXiv 2503.18225), with the rank taken from where it must not be."""

    def weight(self, op: Op, W: Tensor, slots: Any, scale: Any) -> Tensor:
        A, B = slots["plain_A"], slots["plain_B"]
        norms = A.norm(dim=1, keepdim=True) * B.norm(dim=0).unsqueeze(1) + 1e-6
        return W + op.unmatrix(B @ (A / norms) * (4.0 / self.r)).to(W.dtype)

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: Any = None) -> InitialValues:
        return InitialValues({n: torch.randn(s.shape, dtype=dtype) for n, s in self.slots(op).items()})


def changed(W: Tensor, slots: Any) -> Tensor:
    return W + (slots["plain_B"] @ slots["plain_A"]).reshape(W.shape)


CAPTURED = torch.randn(10, 6)


def zeros(self: Plain, op: Op, *_: Any) -> InitialValues:
    return InitialValues({n: torch.zeros(s.shape, dtype=torch.float64) for n, s in self.slots(op).items()})


def stops(W: Tensor, slots: Any) -> Tensor:
    return W + (slots["plain_B"].detach() @ slots["plain_A"].detach()).reshape(W.shape)


def bent(self: Plain, op: Op, x: Tensor, y: Tensor, *rest: Any) -> Tensor:
    slots = rest[2]
    return y + op.down_up(x, slots["plain_A"], slots["plain_B"] * 1.001).to(y.dtype)


#: what is wrong: functions of the class, and what the error says
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rank of a field": (
        {"weight": lambda self, op, W, slots, scale: W + (changed(W, slots) - W) / self.r},
        r"Wrong\.weight\(\) depends on .*rank.*aten\.div\.Tensor\(sub, 2\) for r=2, and .*\(sub, 5\) for r=5",
    ),
    "rank of a tensor": (
        {"weight": lambda self, op, W, slots, scale: W + (changed(W, slots) - W) / slots["plain_A"].shape[0]},
        r"Wrong\.weight\(\) depends on",
    ),
    "rank in a shape": (
        {
            "weight": lambda self, op, W, slots, scale: changed(
                W, {**slots, "plain_A": slots["plain_A"].view(self.r, 6)}
            )
        },
        r"Wrong\.weight\(\) depends on",
    ),
    "a loop over the rank": (
        {"weight": lambda self, op, W, slots, scale: sum((changed(W, slots) * 0 for _ in range(self.r)), W)},
        r"Wrong\.weight\(\) depends on",
    ),
    "alpha in the code": (
        {"alpha": 3.0, "weight": lambda self, op, W, slots, scale: W + (changed(W, slots) - W) * self.alpha},
        r"Wrong\.weight\(\) depends on the field 'alpha'",
    ),
    "rank in apply": (
        {
            "weight": lambda self, op, W, slots, scale: changed(W, slots),
            "apply": lambda self, op, x, y, W, b, slots, scale: (
                y + op.down_up(x, slots["plain_A"], slots["plain_B"]) * (self.r / 2)
            ),
        },
        r"Wrong\.apply\(\) depends on",
    ),
    "another form over a changed weight": (
        {
            "weight": lambda self, op, W, slots, scale: changed(W, slots),
            "weight_over": lambda self, op, base, W, slots, scale: changed(W, slots) + 1,
        },
        r"weight_over\(\) of a base that is the weight itself must be what weight\(\) makes of it; .* they differ by",
    ),
    "too many axes": (
        {"weight": lambda self, op, W, slots, scale: changed(W, slots).unsqueeze(0)},
        r"weight\(\) must return a tensor of shape \(10, 6\) and dtype torch.float32, got \(1, 10, 6\)",
    ),
    "transposed": (
        {"weight": lambda self, op, W, slots, scale: changed(W, slots).t()},
        r"must return a tensor of shape \(10, 6\).*got \(6, 10\).*a linear with a weight \(10, 6\)",
    ),
    "another dtype": (
        {"weight": lambda self, op, W, slots, scale: changed(W, slots).double()},
        r"dtype torch.float32, got \(10, 6\) and torch.float64",
    ),
    "no tensor": ({"weight": lambda self, op, W, slots, scale: [W]}, r"weight\(\)"),
    "a choice by values": (
        {"weight": lambda self, op, W, slots, scale: W if slots["plain_B"].sum() > 0 else changed(W, slots)},
        r"weight\(\) chooses by values.*torch\.where",
    ),
    "a number of a tensor": (
        {"weight": lambda self, op, W, slots, scale: changed(W, slots) * math.tanh(slots["plain_B"].norm().item())},
        r"weight\(\) chooses by values",
    ),
    "a tensor from outside": (
        {"weight": lambda self, op, W, slots, scale: changed(W, slots) + CAPTURED * 0},
        r"weight\(\) uses a tensor that is none of its arguments: make it a slot",
    ),
    "an exception": (
        {"weight": lambda self, op, W, slots, scale: slots["plain_C"]},
        r"weight\(\) cannot be traced: KeyError: 'plain_C'",
    ),
    "first values at zero": (
        {"init": zeros},
        r"init\(\) gives first values .*learned: .*'plain_B' is zero \(zero at the start: 'plain_A', 'plain_B'\)",
    ),
    "no gradient": (
        {"weight": lambda self, op, W, slots, scale: stops(W, slots)},
        r"the gradient of 'plain_A', 'plain_B' is zero \(zero at the start: 'plain_B'\)\. Start",
    ),
    "another shape than announced": (
        {
            "init": lambda self, op, W, dtype, generator=None: InitialValues(
                {n: torch.ones(3, 3) for n in self.slots(op)}
            )
        },
        r"init\(\) must give 'plain_A' the shape \(2, 6\), as slots\(\) says, got \(3, 3\)",
    ),
    "other slots than announced": (
        {"init": lambda self, op, W, dtype, generator=None: InitialValues({"B": torch.ones(3, 3)})},
        r"init\(\) must give the slots \['plain_A', 'plain_B'\], got \['B'\]",
    ),
    "a dtype of its own": (
        {
            "init": lambda self, op, W, dtype, generator=None: InitialValues(
                {n: torch.ones(s.shape) for n, s in self.slots(op).items()}
            )
        },
        r"init\(\) was asked for values of torch.float64 and gave .*'plain_A': torch.float32",
    ),
    "an exception with values": (
        {"init": lambda self, op, W, dtype, generator=None: [][0]},
        r"Wrong failed where it was tried whether first values fit, at a linear .*IndexError: list index out of range",
    ),
    "a weight that is written to": (
        {"init": lambda self, op, W, *rest: (W.add_(1), Plain.init(self, op, W, *rest))[1]},
        r"init\(\) changed the weight it was given",
    ),
    "an identity that is none": (
        {"slots": lambda self, op: {n: dataclasses.replace(s, fill=1.0) for n, s in Plain.slots(self, op).items()}},
        r"with the values of identity\(\) the weight must be that of the layer without an adapter",
    ),
    "forms that differ a little": (
        {"apply": bent},
        r"form around the layer \(input, apply\) must be the layer with the weight that weight\(\) makes.*differ by",
    ),
    "values that are not finite": (
        {"weight": lambda self, op, W, slots, scale: changed(W, slots) + slots["plain_B"].sum().sqrt() * 0},
        r"gradients at the first values are not finite",
    ),
}


def wrong(monkeypatch: pytest.MonkeyPatch, functions: dict[str, Any], base: type[Plain] = Plain) -> Any:
    """A config of a registered method with these functions, or fields."""
    fields = {k: type(v) for k, v in functions.items() if not callable(v)}
    body = {"name": "wrong", "__annotations__": {"name": ClassVar[str], **fields}, **functions}
    method = dataclasses.dataclass(frozen=True)(type("Wrong", (base,), body))

    @dataclasses.dataclass
    class WrongConfig(TargetedConfig):
        peft_type: ClassVar[str] = "WRONG"
        r: int = 2

        def method(self, name: str, kind: str) -> Method:
            return method(self.r)

    registered(monkeypatch, WrongConfig, method)
    return WrongConfig


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 10)).eval()


def refused(config: Any, model: nn.Module | None = None, *shape: int) -> str:
    with pytest.raises(MethodError) as caught:
        adaptc.compile(model or net(), config, example_inputs=torch.randn(*(shape or (3, 6))))
    return str(caught.value)


@pytest.mark.parametrize("name", list(WRONG))
def test_a_wrong_method_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    functions, message = WRONG[name]
    with pytest.raises(MethodError, match=message):
        adaptc.compile(net(), wrong(monkeypatch, functions)(target_modules=["0"]), example_inputs=torch.randn(3, 6))


def test_delora_compiled_at_rank_2_is_never_swapped_to_rank_6(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be off by twice the adapter's effect, without any error, and a verification would pass."""
    config = wrong(monkeypatch, {}, DeLoRA)
    assert "depends on" in refused(config(r=2, target_modules=["0"]))
    assert "depends on" in refused(config(r=6, target_modules=["0"]))


def test_delora_with_the_rank_in_its_scale_is_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    def weight(self: Any, op: Op, W: Tensor, slots: Any, scale: Any) -> Tensor:
        A, B = slots["plain_A"], slots["plain_B"]
        norms = A.norm(dim=1, keepdim=True) * B.norm(dim=0).unsqueeze(1) + 1e-6
        return W + op.unmatrix(B @ (A / norms) * scale).to(W.dtype)

    config = wrong(monkeypatch, {"weight": weight, "scale": lambda self, op: 4.0 / self.r}, DeLoRA)
    # Its first values change the layer, as those of the paper do without their copy of them.
    x, model = torch.randn(5, 6), net()
    six = adaptc.compile(model, config(r=6, target_modules=["0"]), example_inputs=x)
    two = adaptc.compile(model, config(r=2, target_modules=["0"]), example_inputs=x)
    adaptc.swap(two, adaptc.save_adapter(six, tmp_path))
    torch.testing.assert_close(two(x), six(x))
    assert not torch.allclose(six(x), model(x))


def test_half_precision_is_asked_for_where_the_base_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = wrong(monkeypatch, {"weight": lambda self, op, W, slots, scale: changed(W, slots)})(target_modules=["0"])
    adaptc.compile(net(), config, example_inputs=torch.randn(3, 6))
    with pytest.raises(MethodError, match=r"dtype torch.bfloat16, got \(10, 6\) and torch.float32"):
        adaptc.compile(net().bfloat16(), config, example_inputs=torch.randn(3, 6).bfloat16())


def test_torch_where_is_no_choice_by_values(monkeypatch: pytest.MonkeyPatch) -> None:
    config = wrong(
        monkeypatch,
        {"weight": lambda self, op, W, slots, scale: torch.where(slots["plain_B"].sum() > 9, W, changed(W, slots))},
    )
    adaptc.compile(net(), config(target_modules=["0"]), example_inputs=torch.randn(3, 6))


def test_trying_a_method_leaves_random_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """First values are those that the seed gives, whether or not the method was tried before."""
    config = wrong(monkeypatch, {})(target_modules=["0"])
    values = []
    for _ in range(2):  # only the first compilation tries it
        torch.manual_seed(11)
        program = adaptc.compile(net(), config, example_inputs=torch.zeros(3, 6))
        values.append(torch.cat([t.flatten() for t in program.binding.values.values()]))
    assert torch.equal(*values)


def test_values_are_tried_once_per_method_and_code_at_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size at which the code is wrong is found, though values are tried where the weight is smallest."""
    functions = {
        "weight": lambda self, op, W, slots, scale: changed(W, slots) * (1 if op.out_features == 4 else self.r / 2)
    }
    config = wrong(monkeypatch, functions)(target_modules=["0", "1"])
    message = refused(config, nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 30)).eval())
    assert "a linear with a weight (30, 4)" in message


# -- what can be told when it is registered ---------------------------------------------------------------------------


def test_an_unregistered_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It could be saved, and never be loaded."""

    @dataclasses.dataclass(frozen=True)
    class Unknown(Plain):
        name: ClassVar[str] = "unknown"

    @dataclasses.dataclass
    class UnknownConfig(TargetedConfig):
        peft_type: ClassVar[str] = "UNKNOWN"

        def method(self, name: str, kind: str) -> Method:
            return Unknown()

    with pytest.raises(ConfigError, match=r"'unknown' \(Unknown\) is not registered.*adaptc\.methods\.register_method"):
        adaptc.compile(net(), UnknownConfig(target_modules=["0"]), example_inputs=torch.randn(3, 6))
    registered(monkeypatch, UnknownConfig, Unknown)

    @dataclasses.dataclass(frozen=True)
    class Namesake(Plain):
        name: ClassVar[str] = "unknown"

    monkeypatch.setattr(UnknownConfig, "method", lambda self, name, kind: Namesake())
    with pytest.raises(ConfigError, match=r"'unknown' is the name of .*another class of that name"):
        adaptc.compile(net(), UnknownConfig(target_modules=["0"]), example_inputs=torch.randn(3, 6))


def test_a_class_that_is_no_method_is_refused_when_registered() -> None:
    @dataclasses.dataclass
    class Config(TargetedConfig):
        peft_type: ClassVar[str] = "LACKING"

    class NotADataclass(Plain):
        name: ClassVar[str] = "lacking"

    @dataclasses.dataclass(frozen=True)
    class Slotless(Method):
        name: ClassVar[str] = "lacking"

        def weight(self, *args: Any) -> Tensor:
            return args[1]

    @dataclasses.dataclass(frozen=True)
    class Weightless(Method):
        name: ClassVar[str] = "lacking"

        def slots(self, op: Op) -> dict[str, Slot]:
            return {}

    for method, message in (
        (NotADataclass, r"NotADataclass must be .* decorated with @dataclass\(frozen=True\)"),
        (Slotless, r"Slotless must define slots\(op\)"),
        (Weightless, r"Weightless must define weight\(op, W, slots, scale\)"),
        (nn.Linear, "Linear must be derived from adaptc.methods.Method"),
    ):
        with pytest.raises(ConfigError, match=message):
            adaptc.methods.register_method(Config, method)
    with pytest.raises(ConfigError, match=r"dict must be derived from adaptc.methods.TargetedConfig"):
        adaptc.methods.register_method(dict, Plain)


# -- adaptc's own ------------------------------------------------------------------------------------------------------


@pytest.mark.few(16)
@pytest.mark.parametrize("layer", ["linear", "embedding", "conv2d_groups", "conv_transpose", "experts"])
@pytest.mark.parametrize("entry", [e.name for e in ENTRIES])
def test_the_methods_of_the_table_keep_every_promise(entry: str, layer: str) -> None:
    """``compile`` does not try them, so this does."""
    if layer not in BY_NAME[entry].layers():
        layer = BY_NAME[entry].layers()[0]
    s = Subject(BY_NAME[entry], layer)
    (a,) = (program := s.compile(s.config())).adaptation.attachments
    method, op = a.method.evaluated().unwrap(program.ops[a.id])
    for promise in (*TRACED_PROMISES, *VALUE_PROMISES):
        promise(method, op)


def test_the_promise_of_sizes_sees_what_a_built_in_method_would_do_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for methods of one's own only: LoRA with its scale in the code is found in the same way."""
    lora = adaptc.methods.method_from_dict({"method": "lora", "options": {"r": 4, "alpha": 8}})
    op = Op("linear", (10, 6), torch.ops.aten.linear.default)
    code_serves_all_sizes(lora, op)
    right: Callable[..., Tensor] = type(lora).weight
    monkeypatch.setattr(type(lora), "weight", lambda self, op, W, slots, scale: right(self, op, W, slots, 8 / self.r))
    with pytest.raises(MethodError, match=r"Lora\.weight\(\) depends on"):
        code_serves_all_sizes(lora, op)
    with pytest.raises(TargetError):
        lora.slots(Op("weight", (7,)))


@pytest.mark.parametrize(("name", "what"), [("structure", "a function"), ("sizes", "an object")])
def test_an_option_that_hides_a_name_of_the_protocol_is_refused(name: str, what: str) -> None:
    Hiding = dataclasses.make_dataclass("Hiding", [(name, int, 3)], bases=(Plain,), frozen=True)
    with pytest.raises(MethodError, match=f"has an option called {name!r}, as {what} of every method is"):
        check_promises(Hiding(), Op("linear", (3, 5)))


@pytest.mark.parametrize("name", ["trained", "check_merge", "has_apply", "from_options", "files", "sharing"])
def test_a_value_of_the_class_that_hides_a_function_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``trained = True`` in a class is no field, and was called all the same."""
    Hiding = dataclasses.dataclass(frozen=True)(type("Hiding", (Plain,), {"name": "hiding", name: True}))

    @dataclasses.dataclass
    class HidingConfig(TargetedConfig):
        peft_type: ClassVar[str] = "HIDING"

        def method(self, name: str, kind: str) -> Method:
            return Hiding()

    registered(monkeypatch, HidingConfig, Hiding)
    own = HidingConfig(target_modules=["0"])
    for adapters in (own, [own, adaptc.LoraConfig(r=2, target_modules=["0"])]):
        with pytest.raises(MethodError, match=rf"Hiding\.{name} is True, and (a function|that name is for an object)"):
            adaptc.compile(net(), adapters, example_inputs=torch.randn(3, 6))


def test_no_method_has_one() -> None:
    configs = [config_class(kind) for kind in CONFIGS]  # which imports them
    found, left = set[Any](), [Method]
    while left:
        found |= (new := set(left.pop().__subclasses__()) - found)
        left += new
    own = [c for c in found if c.__module__.startswith("adaptc.methods.")]
    assert len(own) >= len(configs) - 2  # two names of one method, and layers that train as they are
    for one in own:
        check_names(one)
