"""check_method: what it tries, what it says, and that every row of its table can fail."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import adaptc
from adaptc import ConfigError, MethodError, TargetError
from adaptc.methods import FileFormat, InitialValues, Op, Slot, TargetedConfig
from adaptc.passes.protocol.method import Method
from adaptc.verification import check_method
from adaptc.verification.check_method import LAYERS, MethodReport
from tests.support.odd_methods import registered

PROMISES = [
    *("registered", "code has right sizes", "code keeps dtypes", "code serves all sizes", "first values fit"),
    *("identity is the base", "first values learn", "forms agree"),
]
USES = ["trains", "merges and unmerges", "adapter files", "swaps to other sizes", "program files"]


@dataclasses.dataclass(frozen=True)
class Turned(Method):
    """W' = W + s B A with a form around linear layers, refused at embeddings."""

    name: ClassVar[str] = "turned"
    r: int = 2

    def slots(self, op: Op) -> dict[str, Slot]:
        if op.kind == "embedding":
            raise TargetError("Turned has no meaning for an embedding")
        rows, columns = op.matrix_shape
        return {"turned_A": Slot((self.r, columns), free=(0,)), "turned_B": Slot((rows, self.r), free=(1,))}

    def scale(self, op: Op) -> float:
        return 1.5 / self.r

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: Any = None) -> InitialValues:
        values = {n: torch.zeros(s.shape, dtype=dtype) for n, s in self.slots(op).items()}
        values["turned_A"].normal_(generator=generator)
        return InitialValues(values)

    def weight(self, op: Op, W: Tensor, slots: Any, scale: Any) -> Tensor:
        return (W + op.unmatrix(slots["turned_B"] @ slots["turned_A"]) * scale).to(W.dtype)

    def has_apply(self, op: Op) -> bool:
        return op.kind == "linear"

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Any, slots: Any, scale: Any) -> Tensor:
        A, B = slots["turned_A"], slots["turned_B"]
        return (y + op.down_up(op.cast_input(x, A.dtype), A, B) * scale).to(y.dtype)


def config(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> Any:
    """A config of ``Turned`` with some of its functions replaced."""
    body = {"name": "turned", "__annotations__": {"name": ClassVar[str]}, **functions}
    method = dataclasses.dataclass(frozen=True)(type("Own", (Turned,), body))

    @dataclasses.dataclass
    class OwnConfig(TargetedConfig):
        peft_type: ClassVar[str] = "TURNED"
        r: int = 4

        def method(self, name: str, kind: str) -> Method:
            return method(self.r)

    registered(monkeypatch, OwnConfig, method)
    return OwnConfig(target_modules="nowhere")  # its targets are not looked at


def failed(report: MethodReport) -> set[str]:
    return {c.name for c in report.failed}


@pytest.mark.long
def test_a_right_method_passes_every_check_at_every_layer_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.get_rng_state()
    report = adaptc.methods.check_method(config(monkeypatch))
    assert torch.equal(torch.get_rng_state(), state)
    assert report.ok
    assert list(report.refused) == ["embedding"]
    assert {(c.name, c.layer) for c in report.checks} == {
        (name, layer) for name in [*PROMISES, *USES] for layer in LAYERS if layer != "embedding"
    }
    assert all(c.passed for c in report.checks)
    text = capsys.readouterr().out
    assert text == f"{report}\n"
    assert text.startswith("OwnConfig keeps its promises")
    assert "embedding: refused. " in text
    assert all(line in text for line in [*PROMISES, *USES])
    assert max(map(len, text.splitlines())) <= 120 + len("embedding: refused. ") + 200


class DoublingFiles(FileFormat):
    def write(self, op: Op, slots: Any) -> dict[str, torch.Tensor]:
        return {name: 2 * t for name, t in slots.items()}


#: functions replaced, and the check that fails
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "baked": (
        {
            "weight": lambda self, op, W, slots, scale: (
                W + op.unmatrix(slots["turned_B"] @ slots["turned_A"]).to(W.dtype) / self.r
            ),
            "has_apply": lambda self, op: False,
        },
        "code serves all sizes",
    ),
    "another dtype": (
        {
            "weight": lambda self, op, W, slots, scale: W + op.unmatrix(slots["turned_B"] @ slots["turned_A"]) * scale,
        },
        "code keeps dtypes",
    ),
    "another shape": ({"weight": lambda self, op, W, slots, scale: W.unsqueeze(0)}, "code has right sizes"),
    "forms": (
        {"apply": lambda self, op, x, y, W, b, slots, scale: (y * 1.0001).to(y.dtype)},
        "forms agree",
    ),
    "identity": (
        {"identity": lambda self, op, W, dtype: {n: t + 1 for n, t in Turned.identity(self, op, W, dtype).items()}},
        "identity is the base",
    ),
    "first values": (
        {"init": lambda self, op, W, dtype, generator=None: InitialValues(Turned.identity(self, op, W, dtype))},
        "first values learn",
    ),
    "sizes of first values": (
        {
            "init": lambda self, op, W, dtype, generator=None: InitialValues(
                {n: torch.randn(s.shape, dtype=dtype).t() for n, s in self.slots(op).items()}
            )
        },
        "first values fit",
    ),
    "options that are not kept": ({"options": lambda self: {}}, "program files"),
    "files that are not read back": (
        {"files": DoublingFiles()},
        "adapter files",
    ),
    "a merge that is refused": ({"check_merge": lambda self, op: "it does not want to"}, ""),
}


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_fails_the_check_it_belongs_to(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    functions, check = FAULTS[name]
    monkeypatch.setattr(check_method, "LAYERS", {n: LAYERS[n] for n in ("linear", "experts")})
    report = adaptc.methods.check_method(config(monkeypatch, **functions))
    if not check:
        assert report.ok
        assert {c.passed for c in report.checks if c.name == "merges and unmerges"} == {None}
        return
    assert check in failed(report)
    assert not report.ok
    text = capsys.readouterr().out
    assert text.startswith("OwnConfig does NOT keep its promises")
    assert f"{check}, at linear" in text
    assert "FAIL" in text
    if check in PROMISES:  # programs of it are not tried, and say the same
        assert not failed(report) & set(USES)


@pytest.mark.long
def test_an_unregistered_method_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    own = config(monkeypatch)
    monkeypatch.undo()
    report = adaptc.methods.check_method(own)
    assert "registered" in failed(report)
    assert "adaptc.methods.register_method" in str(report)


def test_a_method_that_takes_no_layer_cannot_be_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def slots(self: Any, op: Op) -> dict[str, Slot]:
        raise TargetError(f"no meaning for {op.kind}")

    report = adaptc.methods.check_method(config(monkeypatch, slots=slots))
    assert not report.ok
    assert set(report.refused) == set(LAYERS)
    assert "could not be tried" in str(report)


@pytest.mark.long
def test_failures_raise_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    functions, check = FAULTS["first values"]
    with pytest.raises(MethodError, match=check):
        adaptc.methods.check_method(config(monkeypatch, **functions), raise_on_failure=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("sizes", [(8, 8), (7, 8), (0, 4), (2, 4, 6)])
def test_sizes_that_would_hide_something_are_refused(monkeypatch: pytest.MonkeyPatch, sizes: Any) -> None:
    with pytest.raises(ConfigError, match="two different even numbers"):
        adaptc.methods.check_method(config(monkeypatch), sizes=sizes)


def test_what_is_no_config_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"takes a config, such as LoraConfig\(r=4\), not a Turned"):
        adaptc.methods.check_method(Turned())  # type: ignore[arg-type]


@pytest.mark.slow
def test_methods_of_adaptc_pass(capsys: pytest.CaptureFixture[str]) -> None:
    """The table says the same of methods that the tests know to be right: one plain, one with its own groups."""
    for own in (adaptc.LoraConfig(r=4), adaptc.IA3Config(feedforward_modules=[])):
        report = adaptc.methods.check_method(own, sizes=(12, 20))
        assert report.ok, str(report)
