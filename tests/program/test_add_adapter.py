"""One more adapter by name: where there is room, or in another program on the same base, and never unasked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import AdaptcError, IA3Config, LoraConfig, MergeError, OFTConfig, SwapError, TargetError
from tests.support.subject import assert_close, assert_valid


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 12), nn.Linear(12, 5, bias=False)
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.norm(self.up(x))))


X = torch.randn(4, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LORA = LoraConfig(r=3, lora_alpha=4, target_modules=["up", "down"], init_lora_weights=False)
CONFIGS: dict[str, Any] = {
    "lora": LORA,
    "lora of a head": LoraConfig(r=2, target_modules=["up"], modules_to_save=["down"], init_lora_weights=False),
    "dora": LORA.replace(use_dora=True),
    "ia3": IA3Config(target_modules=["up"], feedforward_modules=[], init_ia3_weights=False),
    "oft": OFTConfig(oft_block_size=4, target_modules=["down"], init_weights=False),
    "pissa": LORA.replace(init_lora_weights="pissa"),
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(11)
    return Net().double().requires_grad_(False).eval()


@pytest.fixture(scope="module")
def folder(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        adaptc.save_adapter(adaptc.compile(model, config, example_inputs=X), path / name)
    return path


@pytest.mark.long
@pytest.mark.parametrize("first", list(CONFIGS))
def test_another_program_has_both(model: nn.Module, folder: Path, first: str) -> None:
    """Equal to one that was compiled for both, with the first one's factor, and the old program as it was."""
    old = adaptc.compile(model, folder / first, example_inputs=X, adapter_name="one")
    scaled = first in ("lora", "pissa", "dora")
    if scaled:
        old.set_active({"one": 0.5})
    before, binding = old(X), old.binding
    with pytest.raises(SwapError, match=r"no sites of lora .* at up, down.*recompile=True"):
        old.add_adapter("two", folder / "lora")
    new = old.add_adapter("two", folder / "lora", recompile=True)
    assert new is not old
    assert_valid(new)
    both = adaptc.compile(model, {"one": folder / first, "two": folder / "lora"}, example_inputs=X)
    if scaled:
        both.set_active({"one": 0.5, "two": None})
    assert_close(new(X), both(X), 1e-9)
    assert new.available_adapters == ["one", "two"]
    assert old.binding is binding
    assert torch.equal(old(X), before)
    new.set_active(["one"])
    assert_close(new(X), before, 1e-9)
    third = new.add_adapter("three", folder / "ia3", recompile=True)
    assert third.active_adapters == ["one", "three"]
    third.set_active(["one", "two"])
    assert_close(third(X), both(X), 1e-9)
    assert adaptc.verify(third, model).ok


def test_what_trains_goes_on_training(model: nn.Module) -> None:
    old = adaptc.compile(model, LORA, example_inputs=X, training=True)
    new = old.add_adapter("two", LoraConfig(r=2, target_modules=["down"]), recompile=True)
    assert new.adaptation.training
    trained = {n: t for n, t in old.binding.values.items() if t.requires_grad}
    assert trained
    assert all(new.binding.values[n] is t for n, t in trained.items())
    module = new.module()
    module.train()
    module(X).sum().backward()
    assert all(t.grad is not None for t in new.binding.values.values() if t.requires_grad)


@pytest.mark.long
def test_sites_that_one_has_left_are_taken(model: nn.Module, folder: Path) -> None:
    program = adaptc.compile(model, {"one": folder / "ia3", "two": folder / "lora"}, example_inputs=X)
    program(X)
    program.delete_adapter("two")
    without = program(X)
    with adaptc.debug.assert_no_recompiles():
        for adapter in (folder / "lora", LoraConfig(r=5, target_modules=["up"], init_lora_weights=False)):
            assert program.add_adapter("two", adapter) is program
            assert not torch.allclose(program(X), without, rtol=1e-3)
            program.delete_adapter("two")
            assert torch.equal(program(X), without)
    for other in ("dora", "oft", "lora of a head"):
        with pytest.raises(SwapError, match="recompile=True"):
            program.add_adapter("two", folder / other)
    assert program.available_adapters == ["one"]
    assert torch.equal(program(X), without)


@pytest.mark.long
def test_what_is_refused(model: nn.Module, folder: Path, tmp_path: Path) -> None:
    program = adaptc.compile(model, folder / "lora", example_inputs=X)
    for name, adapter, kind, match in (
        ("default", folder / "ia3", AdaptcError, "called 'default' already"),
        ("a.b", folder / "ia3", AdaptcError, "without dots"),
        ("two", LoraConfig(target_modules=["nothing"]), TargetError, "nothing"),
        ("two", tmp_path / "nowhere", AdaptcError, "nowhere"),
    ):
        with pytest.raises(kind, match=match):
            program.add_adapter(name, adapter, recompile=True)
    lost = adaptc.load(adaptc.save(adaptc.compile(model, folder / "pissa", example_inputs=X), tmp_path / "program.pt2"))
    with pytest.raises(MergeError, match="Compile the original model"):
        lost.add_adapter("two", folder / "lora", recompile=True)
    with pytest.raises(SwapError, match="cannot be turned off"):
        lost.set_active([])
    merged = adaptc.merge(program)
    with pytest.raises(AdaptcError, match="no adapter"):
        merged.add_adapter("two", folder / "lora")
