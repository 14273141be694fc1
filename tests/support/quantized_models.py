"""Models with layers that other libraries quantised, and the checks that every such model passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import peft
import pytest
import torch
from torch import Tensor, nn

import adaptc

TARGETS = ["up", "down"]

#: whether bitsandbytes multiplies few rows by a kernel of its own. It asks for the CPU's feature alone: where the CPU
#: has it, a kernel that is not used is a fault.
HAS_FEW_ROWS_KERNEL: bool = bitsandbytes.functional.has_avx512bf16()


class Net(nn.Module):
    """Two linear layers, ``up`` and ``down``, and a plain one behind them."""

    def __init__(self, sizes: tuple[int, int, int], seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(sizes[0], sizes[1])
        self.down = nn.Linear(sizes[1], sizes[2], bias=False)
        self.head = nn.Linear(sizes[2], 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(x))))


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module], names: list[str] = TARGETS) -> Any:
    """Return ``model`` in eval mode with ``make`` of each of its layers ``names`` in the place of that layer."""
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, make(model.get_submodule(name)))  # type: ignore[arg-type]
    return model.eval()


def plain_twin(model: Any, dequantize: Callable[[Any], Tensor], names: list[str] = TARGETS) -> Any:
    """Return a float32 :class:`Net` with the weights of ``model``, those of ``names`` by the library's own reading."""
    layers = {name: model.get_submodule(name) for name in ("up", "down", "head")}
    weights = {name: dequantize(m) if name in names else m.weight for name, m in layers.items()}
    twin = Net((weights["up"].shape[1], weights["down"].shape[1], weights["down"].shape[0])).eval()
    with torch.no_grad():
        for name, layer in layers.items():
            plain: Any = twin.get_submodule(name)
            plain.weight.copy_(weights[name])
            if plain.bias is not None:
                plain.bias.copy_(layer.bias)
    return twin


def adapters(build: Callable[[], nn.Module], path: Path, names: list[str] = TARGETS) -> list[tuple[str, nn.Module]]:
    """Return two LoRAs, each as (directory, model of PEFT that has it), made by PEFT on models that ``build`` gives."""
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=3, target_modules=names, init_lora_weights=False)
        model = peft.get_peft_model(build(), config).eval()  # type: ignore[arg-type]
        model.save_pretrained(path / str(seed))
        made.append((str(path / str(seed)), model))
    return made


def check_adapted(
    model: nn.Module, made: list[tuple[str, nn.Module]], inputs: tuple[Tensor, ...], tolerance: float
) -> Any:
    """Compile, swap, merge, unmerge and unload; compare each with PEFT's models. Returns the program."""
    (first, first_model), (second, second_model) = made
    with torch.no_grad():
        expected = [m(*inputs) for m in (first_model, second_model)]
    program = adaptc.compile(model, first, example_inputs=inputs)
    check_close(program(*inputs), expected[0], tolerance)
    base = program.base(*inputs)
    adaptc.swap(program, second)
    check_close(program(*inputs), expected[1], tolerance)
    merged = adaptc.merge(program, dequantize=True)
    check_close(merged(*inputs), expected[1], tolerance)
    assert torch.equal(adaptc.unmerge(merged)(*inputs), program(*inputs))
    assert torch.equal(adaptc.unload(program)(*inputs), base)
    return program


def check_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Assert that the largest difference is at most ``tolerance`` times the largest value."""
    difference, size = (found - expected).abs().max(), expected.abs().max()
    assert difference <= tolerance * size, (float(difference), float(size))


def check_refused(model: nn.Module, said: str, width: int) -> None:
    """A capture of a model with inputs of ``width`` is refused by a text that matches ``said``, and changes nothing."""
    before = [*model.modules(), *model.parameters()]
    config = adaptc.LoraConfig(r=2, target_modules="all-linear")
    with pytest.raises(adaptc.CaptureError, match=said):
        adaptc.compile(model, config, example_inputs=(torch.randn(3, width),))
    after = [*model.modules(), *model.parameters()]
    assert all(a is b for a, b in zip(after, before, strict=True))
