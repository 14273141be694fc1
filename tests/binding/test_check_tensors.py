"""A ready binding is only taken by a program that it fits: shapes, dtypes, code and the base it was made for."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import CheckpointError, LoraConfig, SwapError

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def compiled(seed: int = 3, width: int = 7, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    torch.manual_seed(seed)
    config = {"r": 2, "target_modules": ["up", "down"], "init_lora_weights": False, **config}
    net = Net(width).eval().to(dtype)
    return adaptc.compile(net, LoraConfig(**config), example_inputs=torch.randn(2, 5, dtype=dtype))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"width": 11}, r"'up.lora_B.default.weight' has shape \(11, 2\), expected \(7, 2\) at 'up.weight'"),
        ({"dtype": torch.float64}, "is torch.float64, expected torch.float32"),
        ({"use_dora": True}, "other sites"),
    ],
    ids=["shape", "dtype", "method"],
)
def test_a_binding_of_another_program_is_refused(options: dict[str, Any], says: str) -> None:
    program, other = compiled(), compiled(4, **options)
    before, bound = program(X), program.binding
    for take in (adaptc.swap, adaptc.AdaptedProgram.bind):
        with pytest.raises(SwapError, match=says):
            take(program, other.binding)
    assert program.binding is bound
    assert torch.equal(program(X), before)


@pytest.mark.parametrize("peft_type", ["LOHA", "VERA", "BOFT", "POLY"])
def test_tensors_with_the_config_of_another_method_are_refused(peft_type: str, tmp_path: Path) -> None:
    program = compiled()
    folder = adaptc.save_adapter(compiled(4), tmp_path / "adapter")
    config = folder / "adapter_config.json"
    kept = {n: v for n, v in json.loads(config.read_text()).items() if n in ("target_modules", "r")}
    config.write_text(json.dumps({**kept, "peft_type": peft_type}))
    before, bank = program(X), program.bank({"one": program.binding})
    for take in (
        lambda: adaptc.swap(program, folder),
        lambda: program.bind(folder),
        lambda: bank.add("two", folder),
    ):
        with (
            warnings.catch_warnings(action="ignore", category=adaptc.AdaptcWarning),
            pytest.raises(
                CheckpointError,
                match=f"its config says {peft_type}, and 'up' has the tensor 'lora_A.weight' of the method 'lora'",
            ),
        ):
            take()
    assert torch.equal(program(X), before)
    assert list(bank) == ["one"]


@pytest.mark.long
def test_a_binding_that_fits_is_taken_from_any_program() -> None:
    program, other = compiled(), compiled(4, r=5)
    adaptc.swap(program, other.binding)
    tensors = {k.replace(".default", ""): v for k, v in other.binding.values.items() if "lora_" in k}
    fresh = compiled()
    adaptc.swap(fresh, tensors, config=LoraConfig(r=5, target_modules=["up", "down"]))
    torch.testing.assert_close(program(X), fresh(X), rtol=1e-6, atol=1e-6)  # tensors lie elsewhere in memory


def test_pissa_goes_with_its_base(tmp_path: Path) -> None:
    pissa = compiled(3, init_lora_weights="pissa")
    same, other = compiled(3, init_lora_weights="pissa"), compiled(4, init_lora_weights="pissa")
    adaptc.swap(same, pissa.binding)
    assert torch.equal(same(X), pissa(X))
    with pytest.raises(SwapError, match=r"changed the base weight 'up\.weight', and here that weight is another one"):
        adaptc.swap(other, pissa.binding)
    loaded = adaptc.load(adaptc.save(pissa, tmp_path / "p.pt2"))
    with pytest.raises(SwapError, match="only its own adapter's version"):
        adaptc.swap(loaded, compiled(3).binding)
    own = loaded.binding
    adaptc.swap(loaded, own)
    torch.testing.assert_close(loaded(X), pissa(X))
