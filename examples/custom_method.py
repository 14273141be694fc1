"""A method of your own, in your own file: W' = diag(gain) (W + up down) and b' = gain b. Takes a few seconds.

What it does to a weight and a bias is all one writes: merge, swaps, files and every kind of layer follow. ``apply`` is
optional, and spares a linear layer the making of a weight. Axes listed as free may differ from adapter to adapter.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import adaptc
from adaptc.methods import InitialValues, Method, Op, Slot, TargetedConfig, register_method


@dataclass
class GainConfig(TargetedConfig):
    peft_type: ClassVar[str] = "GAIN"
    r: int = 4

    def method(self, name: str, kind: str) -> Gain:
        return Gain(self.r)


@dataclass(frozen=True)
class Gain(Method):
    name: ClassVar[str] = "gain"
    r: int = 4

    def slots(self, op: Op) -> dict[str, Slot]:
        rows, columns = op.matrix_shape
        down, up = Slot((self.r, columns), free=(0,)), Slot((rows, self.r), free=(1,))
        return {"gain_factor": Slot((rows,), fill=1.0), "gain_down": down, "gain_up": up}

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: Any = None) -> InitialValues:
        values = self.filled(op, W, dtype)
        return InitialValues(values | {"gain_down": values["gain_down"].normal_(std=0.1, generator=generator)})

    def weight(self, op: Op, W: Tensor, slots: Any, scale: Any) -> Tensor:
        changed = op.matrix(W) + slots["gain_up"] @ slots["gain_down"]
        return op.unmatrix(slots["gain_factor"].unsqueeze(1) * changed).to(W.dtype)

    def bias(self, op: Op, b: Tensor | None, slots: Any, scale: Any) -> Tensor | None:
        return None if b is None else (slots["gain_factor"] * b).to(b.dtype)

    def has_apply(self, op: Op) -> bool:
        return op.kind == "linear"

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Any, slots: Any, scale: Any) -> Tensor:
        low = op.down_up(op.cast_input(x, slots["gain_up"].dtype), slots["gain_down"], slots["gain_up"])
        return (slots["gain_factor"] * (y + low)).to(y.dtype)


register_method(GainConfig, Gain)


def main() -> int:
    """Returns the exit status: 0 when every program says what it should."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(3, 5, 2), nn.Tanh(), nn.Flatten(), nn.Linear(20, 7)).eval()
    x, wanted = torch.randn(64, 3, 5), torch.randn(64, 7)
    config = GainConfig(r=6, target_modules=["0", "3"])
    program = adaptc.compile(net, config, example_inputs=x)
    module = program.module()
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.02)
    for _ in range(100):
        nn.functional.mse_loss(module(x), wanted).backward()
        optimizer.step()
        optimizer.zero_grad()
    losses = [nn.functional.mse_loss(f(x), wanted).item() for f in (net, program)]
    print(adaptc.report(program), f"\n\nloss {losses[0]:.3f} before, {losses[1]:.3f} after")
    with tempfile.TemporaryDirectory() as folder:
        adapter = adaptc.save_adapter(program, Path(folder, "adapter"))
        other = adaptc.compile(net, config.replace(r=2), example_inputs=x[:2])  # so small that apply is cheaper
        print(adaptc.swap(other, adapter))  # to another rank, in the same code
        loaded = adaptc.load(adaptc.save(program, Path(folder, "program.pt2")))
    same = {"swapped": other, "merged": adaptc.merge(program), "loaded": loaded}
    print("the same outputs:", agree := {n: torch.allclose(p(x), program(x), atol=1e-5) for n, p in same.items()})
    return 0 if losses[1] < losses[0] / 2 and all(agree.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
