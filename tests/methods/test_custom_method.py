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
from adaptc.methods._shared import registry as _registry
from tests.support.custom_models import OneLayer
from tests.support.method_checks import CHECKS, check_rows
from tests.support.method_table import Entry
from tests.support.subject import Subject


@dataclass(frozen=True)
class Behind(adaptc.methods.Method):
    """What a layer gives, bent once more: no weight does that, and nothing else says so."""

    name: ClassVar[str] = "behind"

    def slots(self, op: adaptc.methods.Op) -> dict[str, adaptc.methods.Slot]:
        return {"behind_gain": adaptc.methods.Slot((op.out_features,))}

    def apply(self, op: adaptc.methods.Op, x: Any, y: Any, W: Any, b: Any, slots: Any, scale: Any) -> torch.Tensor:
        return (y + slots["behind_gain"] * torch.tanh(y)).to(y.dtype)


@dataclass(frozen=True)
class Common(adaptc.methods.Method):
    """W' = W + B A with one A for all layers, whose rank an adapter chooses."""

    name: ClassVar[str] = "common"
    swappable: ClassVar[frozenset[str]] = adaptc.methods.Method.swappable | {"inputs"}
    r: int = 4
    inputs: int = 0

    def slots(self, op: adaptc.methods.Op) -> dict[str, adaptc.methods.Slot]:
        rows, columns = op.matrix_shape
        down = (self.r, max(self.inputs, columns))
        return {
            "common_A": adaptc.methods.Slot(down, free=(0,), shared=True, shared_axes_cut=(1,)),
            "common_B": adaptc.methods.Slot((rows, self.r), free=(1,)),
        }

    def shares(self) -> bool:
        return True

    @classmethod
    def settle_shared_sizes(cls, sites: Any) -> list[Any]:
        return [replace(m, inputs=max(o.matrix_shape[1] for _, o in sites)) for m, _ in sites]

    def minimal(self, op: adaptc.methods.Op) -> Common:
        return replace(self, r=2)

    def init(self, op: adaptc.methods.Op, W: Any, dtype: torch.dtype, generator: Any = None) -> adaptc.methods.Initial:
        return adaptc.methods.Initial({n: torch.randn_like(t) for n, t in self.filled(op, W, dtype).items()})

    def weight(self, op: adaptc.methods.Op, W: Any, slots: Any, scale: Any) -> torch.Tensor:
        down = slots["common_A"].narrow(1, 0, op.matrix_shape[1])
        return (W + op.unmatrix(slots["common_B"] @ down)).to(W.dtype)


@dataclass
class BehindConfig(adaptc.methods.TargetedConfig):
    peft_type: ClassVar[str] = "BEHIND"

    def method(self, name: str, kind: str) -> Behind:
        return Behind()


@dataclass
class CommonConfig(adaptc.methods.TargetedConfig):
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


@pytest.mark.few(12)
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
@pytest.mark.parametrize("layer", ["linear", "embedding", "conv2d_groups", "conv_transpose", "experts"])
def test_it_passes_the_generic_checks(
    example: ModuleType, check: Callable[..., None], layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the built-in methods must do, a method of one's own does as well: all it takes is an entry."""
    checked(example, check, layer, tmp_path, monkeypatch)


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
