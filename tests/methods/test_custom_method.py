"""A method from a user's own file: examples/custom_method.py as a script, and its method at several layers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import adaptc
from adaptc.methods import InitialValues, Method, Op, Slot, TargetedConfig
from adaptc.methods._shared import registry as _registry
from tests.support.custom_models import OneLayer
from tests.support.method_checks import CHECKS, check_rows
from tests.support.method_table import Entry
from tests.support.subject import Subject


@dataclass(frozen=True)
class Behind(Method):
    """What a layer gives, bent once more: no weight does that, and nothing else says so."""

    name: ClassVar[str] = "behind"

    def slots(self, op: Op) -> dict[str, Slot]:
        return {"behind_gain": Slot((op.out_features,))}

    def apply(self, op: Op, x: Any, y: Any, W: Any, b: Any, slots: Any, scale: Any) -> torch.Tensor:
        return (y + slots["behind_gain"] * torch.tanh(y)).to(y.dtype)


class CommonSharing(adaptc.methods.SharedSlots):
    def settle_shared_sizes(self, sites: Any) -> list[Any]:
        return [replace(m, inputs=max(o.matrix_shape[1] for _, o in sites)) for m, _ in sites]


@dataclass(frozen=True)
class Common(Method):
    """W' = W + B A with one A for all layers, whose rank an adapter chooses."""

    name: ClassVar[str] = "common"
    swappable: ClassVar[frozenset[str]] = Method.swappable | {"inputs"}
    sharing = CommonSharing(shares=True)
    r: int = 4
    inputs: int = 0

    def slots(self, op: Op) -> dict[str, Slot]:
        rows, columns = op.matrix_shape
        down = (self.r, max(self.inputs, columns))
        return {
            "common_A": Slot(down, free=(0,), shared=True, shared_axes_cut=(1,)),
            "common_B": Slot((rows, self.r), free=(1,)),
        }

    def init(self, op: Op, W: Any, dtype: torch.dtype, generator: Any = None) -> InitialValues:
        return InitialValues({n: torch.randn_like(t) for n, t in self.filled(op, W, dtype).items()})

    def weight(self, op: Op, W: Any, slots: Any, scale: Any) -> torch.Tensor:
        down = slots["common_A"].narrow(1, 0, op.matrix_shape[1])
        return (W + op.unmatrix(slots["common_B"] @ down)).to(W.dtype)


@dataclass
class BehindConfig(TargetedConfig):
    peft_type: ClassVar[str] = "BEHIND"

    def method(self, name: str, kind: str) -> Behind:
        return Behind()


@dataclass
class CommonConfig(TargetedConfig):
    peft_type: ClassVar[str] = "COMMON"
    r: int = 4

    def method(self, name: str, kind: str) -> Common:
        return Common(self.r)


EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_method.py"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered is registered for one test."""
    for table in ("CONFIGS", "METHODS", "_registered_classes"):
        monkeypatch.setattr(_registry, table, dict(getattr(_registry, table)))


@pytest.fixture
def example(registry: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example as a module, its method registered for one test."""
    spec = importlib.util.spec_from_file_location("custom_method", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "custom_method", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
def test_the_script_runs_in_few_lines(tmp_path: Path) -> None:
    """Its classes are those of ``__main__``, which no other process could import."""
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 95
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "{'swapped': True, 'merged': True, 'loaded': True}" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(5, 7), torch.linspace(-2, 3, 15).reshape(3, 5)),
        (nn.Conv2d(4, 6, 3, groups=2, bias=False), torch.linspace(-2, 3, 3 * 4 * 5 * 7).reshape(3, 4, 5, 7)),
        (nn.Embedding(13, 7), torch.tensor([[3, 12], [0, 3], [5, 5]])),
    ],
    ids=lambda v: type(v).__name__,
)
def test_its_forms_agree(example: ModuleType, layer: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
    adaptc.methods.register_method(example.GainConfig, example.Gain)
    net = OneLayer(layer).eval()
    config = example.GainConfig(r=3, target_modules=["layer"])
    program = adaptc.compile(net, config, example_inputs=x, training=True)
    torch.testing.assert_close(program(x), net(x))
    torch.manual_seed(1)
    for p in program.module().parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    adapter = adaptc.save_adapter(program, tmp_path)
    wide = config.replace(r=5)
    forms = ("apply", "weight") if isinstance(layer, nn.Linear) else ("weight",)
    for form in forms:
        other = adaptc.compile(net, wide, example_inputs=x, form=form)
        assert [a.form for a in other.adaptation.attachments] == [form]
        adaptc.swap(other, adapter)
        torch.testing.assert_close(other(x), program(x))
        torch.testing.assert_close(adaptc.merge(other)(x), program(x))
    assert not torch.allclose(program(x), net(x))


@pytest.mark.few(5)
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
@pytest.mark.parametrize("layer", ["linear", "embedding", "conv2d_groups", "conv_transpose", "experts"])
def test_it_passes_the_generic_checks(
    example: ModuleType, check: Callable[..., None], layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the built-in methods must do, a method of one's own does as well: all it takes is an entry."""
    checked(example, check, layer, tmp_path, monkeypatch)


@pytest.mark.long
def test_rows_of_a_bank_have_a_bias_of_their_own(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a call has other weights for each row, and the method changes the bias as well."""
    checked(example, check_rows, "conv2d_groups", tmp_path, monkeypatch)


def checked(
    example: ModuleType, check: Callable[..., None], layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adaptc.methods.register_method(example.GainConfig, example.Gain)
    monkeypatch.setattr(adaptc, "GainConfig", example.GainConfig, raising=False)
    subject = Subject(Entry("gain", "GainConfig", {"r": 4}, peft=(), other_config={"r": 3}), layer)
    assert subject.directory.is_dir()
    try:
        check(subject, tmp_path)
    finally:
        subject._temporary.cleanup()


def test_names_that_are_taken(example: ModuleType) -> None:
    adaptc.methods.register_method(example.GainConfig, example.Gain)
    adaptc.methods.register_method(example.GainConfig, example.Gain)

    @dataclass
    class GainConfig(example.GainConfig):
        peft_type: ClassVar[str] = "LORA"

    with pytest.raises(adaptc.ConfigError, match="'LORA' is the name of"):
        adaptc.methods.register_method(GainConfig, example.Gain)


def test_a_method_without_a_weight_is_not_merged_and_says_so(registry: None) -> None:
    adaptc.methods.register_method(BehindConfig, Behind)
    net, x = OneLayer(nn.Linear(5, 7)).eval(), torch.randn(3, 5)
    program = adaptc.compile(net, BehindConfig(target_modules=["layer"]), example_inputs=x)
    with pytest.raises(adaptc.MergeError, match=r"'layer.weight\|behind' cannot be merged: behind has no form"):
        adaptc.merge(program)
    assert adaptc.verify(program, net).ok


@pytest.mark.few(2)
@pytest.mark.parametrize("layers", [["0"], ["1"], ["0", "2"]], ids="-".join)
def test_layers_that_an_adapter_lacks_have_what_it_shares_in_its_size(
    registry: None, layers: list[str], tmp_path: Path
) -> None:
    """The shared tensor is one in the program: of the adapter's rank, and as long as its widest layer reads."""
    adaptc.methods.register_method(CommonConfig, Common)
    net, x = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4), nn.Linear(4, 8)).eval(), torch.randn(3, 6)
    program = adaptc.compile(net, CommonConfig(r=5, target_modules=["0", "1", "2"]), example_inputs=x)
    other = adaptc.compile(net, CommonConfig(r=3, target_modules=layers), example_inputs=x)
    adaptc.swap(program, adaptc.save_adapter(other, tmp_path / "other"))
    assert not torch.allclose(other(x), net(x))
    torch.testing.assert_close(program(x), other(x))
    torch.testing.assert_close(adaptc.merge(program)(x), other(x))


@dataclass(frozen=True)
class Older(Method):
    """A method as one wrote it for an older adaptc."""

    name: ClassVar[str] = "older"
    kin: ClassVar[str] = "older"
    exact_sizes: ClassVar[bool] = False
    r: int = 4

    def slots(self, op: Op) -> dict[str, Slot]:
        rows, columns = op.matrix_shape
        return {
            "older_A": Slot((self.r, columns), free=(0,)),
            "older_B": Slot((rows, self.r), free=(1,)),
        }

    def minimal(self, op: Op) -> Older:
        return replace(self, r=2)

    def read(self, op: Op, found: Any) -> dict[str, Any]:
        return dict(found)

    @classmethod
    def settle_shared_sizes(cls, sites: Any) -> list[Any]:
        return [m for m, _ in sites]

    def clash(self, other: Any) -> str:
        return ""

    def weight(self, op: Op, W: Any, slots: Any, scale: Any) -> torch.Tensor:
        return (W + op.unmatrix(slots["older_B"] @ slots["older_A"])).to(W.dtype)


@dataclass
class OlderConfig(TargetedConfig):
    peft_type: ClassVar[str] = "OLDER"

    def method(self, name: str, kind: str) -> Older:
        return Older()


@dataclass(frozen=True)
class OlderPrompt(adaptc.methods.VirtualTokens):
    name: ClassVar[str] = "older_prompt"

    def lengthens(self, slots: Any) -> int:
        return 3

    def embedded(self, value: Any, slots: Any, given: Any) -> Any:
        return value


@dataclass
class OlderPromptConfig(adaptc.methods.ProgramConfig):
    peft_type: ClassVar[str] = "OLDER_PROMPT"

    def method(self, name: str, kind: str) -> OlderPrompt:
        return OlderPrompt(3)


def test_hooks_of_an_older_adaptc_are_refused_with_what_they_are_called_now() -> None:
    told = {
        "Older was written for an older adaptc",
        "kin is called slot_family now",
        "clash is called conflict_with now",
        "exact_sizes is sizes.exact now",
        "minimal is sizes.minimal now",
        "read is files.read now",
        "settle_shared_sizes is sharing.settle_shared_sizes now",
        "sizes = YourSizeRule(), an object of a class derived from adaptc.methods.SizeRule",
        "files = YourFileFormat(), an object of a class derived from adaptc.methods.FileFormat",
        "sharing = YourSharedSlots(), an object of a class derived from adaptc.methods.SharedSlots",
        "examples/writing_methods.md",
    }
    calls: list[Any] = [
        lambda: adaptc.methods.register_method(OlderConfig, Older),
        lambda: adaptc.methods.check_method(OlderConfig()),
        lambda: adaptc.compile(
            nn.Sequential(nn.Linear(3, 5)), OlderConfig(target_modules=["0"]), example_inputs=torch.ones(2, 3)
        ),
    ]
    for call in calls:
        with pytest.raises(adaptc.MethodError) as caught:
            call()
        assert {part for part in told if part not in str(caught.value)} == set()


def test_older_places_of_a_program_are_refused_with_what_they_are_called_now() -> None:
    with pytest.raises(adaptc.MethodError, match="lengthens is called virtual_token_count now; embedded is called"):
        adaptc.methods.register_method(OlderPromptConfig, OlderPrompt)
