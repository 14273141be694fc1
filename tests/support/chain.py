"""Layers of different sizes in a row, with one adapter on three of them: for methods whose sites share tensors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adaptc

FILE = "adapter_model.safetensors"
#: its layers are taller than wide, wider than tall, and in between
TARGETS = ["q", "k", "v"]


class Chain(nn.Module):
    """(batch, 12) -> (batch, 4)"""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(12, 20), nn.Linear(20, 8), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.v(torch.tanh(self.k(torch.tanh(self.q(x)))))))


def chain(dtype: torch.dtype = torch.float64) -> Chain:
    torch.manual_seed(2)
    return Chain().to(dtype).eval()


def inputs(batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(batch)
    return torch.randn(batch, 12).to(dtype)


def randomize(named: Mapping[str, Tensor], seed: int = 4) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in named.values():
            p.copy_(torch.randn(p.shape) * 0.5)


def peft_config(name: str, **options: Any) -> Any:
    """PEFT's config of this name, on :data:`TARGETS` unless told otherwise; PEFT warns of projections not saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(peft, name)(**{"target_modules": TARGETS, **options})


def peft_chain(
    config: Any, path: Path, dtype: torch.dtype = torch.float64, random_values: bool = True, seed: int | None = None
) -> Any:
    """PEFT's model of the chain, with random tensors unless told otherwise, saved to ``path``."""
    base = chain(dtype)
    if seed is not None:
        torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config).eval()
        if random_values:
            randomize({n: p for n, p in model.named_parameters() if p.requires_grad})
        model.save_pretrained(str(path))
    return model


def load_peft_chain(path: Path, dtype: torch.dtype = torch.float64) -> Any:
    """What PEFT makes of an adapter directory; no key may be unexpected, and none missing by PEFT's own rule."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        model = peft.PeftModel.from_pretrained(chain(dtype), str(path)).eval()
        assert not model.load_adapter(str(path), "default").unexpected_keys
    return model


def compile_chain(adapter: Any, dtype: torch.dtype = torch.float64, **options: Any) -> adaptc.AdaptedProgram:
    return adaptc.compile(chain(dtype), adapter, example_inputs=inputs(3, dtype), **options)


def slots_by_file_key(program: adaptc.AdaptedProgram) -> dict[str, Tensor]:
    """Key in files -> value, of all slots of the program."""
    found = program.binding.values
    return {
        a.file_key(n, s): found[a.slots[n]]
        for a in program.adaptation.attachments
        for n, s in a.method.slots(program.ops[a.id]).items()
    }


def copy_adapter_with(path: Path, new: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of an adapter directory with other tensors."""
    tensors = copy.deepcopy(load_file(path / FILE))
    change(tensors)
    new.mkdir()
    save_file(tensors, new / FILE)
    (new / "adapter_config.json").write_bytes((path / "adapter_config.json").read_bytes())
    return new


def as_stored(config: Any) -> dict[str, Any]:
    """A config of either library as files have it, without what is not set."""
    values = {k: getattr(v, "value", v) for k, v in config.to_dict().items() if k != "peft_version"}
    return {k: sorted(v) if isinstance(v, (set, list)) else v for k, v in values.items() if v is not None}


def tensor_files_are_equal(a: Path, b: Path) -> bool:
    left, right = load_file(a / FILE), load_file(b / FILE)
    return left.keys() == right.keys() and all(
        torch.equal(t, right[k]) and t.dtype == right[k].dtype for k, t in left.items()
    )
