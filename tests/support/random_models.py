"""Random small models of the layers adapters stand at, drawn from a seed, and what they compute with other weights.

A model is a list of steps over a tensor (batch, length, width): calls of layers, some of them again, tied weights,
branches, reads of a layer's own weight beside its call, and blocks (no_grad, autocast, cond, map) around steps.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as map_rows
from transformers.pytorch_utils import Conv1D

Step = tuple[Any, ...]
VOCABULARY = 21
WIDTHS = (6, 9, 15, 21)
#: blocks that torch captures at once, and those whose branches it compiles
SIMPLE_BLOCKS, BRANCH_BLOCKS = ("no_grad", "autocast"), ("cond", "map")


class RandomModel(nn.Module):
    """``made``: layer -> parameters its calls use instead of its own. ``python_branches``: branches are Python's own,
    since torch compiles its blocks to run them, and cannot for whatever a layer is wrapped in."""

    def __init__(self, seed: int, dtype: torch.dtype, branches: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.draw, self.count, self.kinds = Random(seed), 0, dict[str, str]()
        self.blocks = (*SIMPLE_BLOCKS, *(BRANCH_BLOCKS if branches else ()))
        self.call_parameters: dict[str, dict[str, Tensor]] = {}
        self.python_branches = False
        self.takes_ids = not dtype.is_complex and self.draw.random() < 0.4
        width = self.draw.choice(WIDTHS)
        self.input_width, self.complex = width, dtype.is_complex
        self.steps: list[Step] = []
        if self.takes_ids:
            self.steps.append(("call", self._layer("embedding", VOCABULARY, width)))
        steps, width = self._steps(width, self.draw.randint(2, 4), 0)
        self.steps += steps
        if not self.kinds:
            self.steps.append(("call", self._layer("linear", width, self.draw.choice(WIDTHS))))
        elif self.takes_ids and width == self.input_width and self.draw.random() < 0.5:
            name = self._layer("linear", width, VOCABULARY)
            self.get_submodule(name).weight = self.layer0.weight  # type: ignore[union-attr]
            self.steps.append(("call", name))
        with torch.no_grad():
            for p in self.parameters():
                if p.ndim == 1:
                    p.copy_(torch.randn_like(p))
        self.to(dtype).eval()
        del self.draw

    def inputs(self, batch: int, length: int) -> tuple[Tensor, ...]:
        if self.takes_ids:
            return (torch.randint(VOCABULARY, (batch, length)),)
        return (torch.randn(batch, length, self.input_width).to(next(self.parameters()).dtype),)

    # -- drawing -------------------------------------------------------------------------------------------------------

    def _layer(self, kind: str, i: int, o: int) -> str:
        draw, name = self.draw, f"layer{self.count}"
        self.count += 1
        bias = draw.random() < 0.7
        groups = 3 if kind == "conv1d" and i % 3 == o % 3 == 0 and draw.random() < 0.3 else 1
        layer: nn.Module
        if kind == "linear":
            layer = nn.Linear(i, o, bias=bias)
        elif kind == "addmm":
            layer = Conv1D(o, i)
        elif kind == "embedding":
            layer = nn.Embedding(i, o, padding_idx=draw.choice((None, 2)))
        elif kind == "conv1d":
            layer = nn.Conv1d(i, o, draw.choice((1, 3)), padding="same", groups=groups, bias=bias)
        else:
            layer = nn.Conv2d(i, o, (3, 1), padding=(1, 0), bias=bias)
        self.add_module(name, layer)
        self.kinds[name] = "conv1d_groups" if groups > 1 else kind if bias or kind != "linear" else "linear_nobias"
        return name

    def _steps(self, width: int, count: int, depth: int) -> tuple[list[Step], int]:
        out: list[Step] = []
        for _ in range(count):
            step, width = self._step(width, depth)
            out.append(step)
        return out, width

    def _step(self, width: int, depth: int) -> tuple[Step, int]:
        draw = self.draw
        again = [n for n in self.kinds if self._square_size(n) == (width, width)]
        roll = draw.random()
        if roll < 0.12 and again:
            return ("call", draw.choice(again)), width
        if roll < 0.2 and self.kinds:
            return ("read", draw.choice(list(self.kinds)), draw.choice(("weight", "bias"))), width
        if roll < 0.27 and not self.complex:
            name = f"norm{self.count}"
            self.count += 1
            self.add_module(name, nn.LayerNorm(width))
            return ("norm", name), width
        if roll < 0.6 and depth < 2:
            kind = draw.choice(self.blocks if not self.complex else ("no_grad",))
            if kind != "cond":
                steps, new = self._steps(width, draw.randint(1, 2), depth + 1)
                return (kind, steps), new
            left, _ = self._width_preserving_steps(width, depth)
            right, _ = self._width_preserving_steps(width, depth)
            return ("cond", left, right, draw.random() < 0.5), width
        if roll < 0.66 and depth < 2:
            return (
                "add",
                self._width_preserving_steps(width, depth)[0],
                self._width_preserving_steps(width, depth)[0],
            ), width
        kinds = ["linear", "linear", "conv1d", "conv2d", *([] if self.complex else ["addmm"])]
        new = draw.choice(WIDTHS)
        return ("call", self._layer(draw.choice(kinds), width, new)), new

    def _width_preserving_steps(self, width: int, depth: int) -> tuple[list[Step], int]:
        """Steps that end at the width they began with."""
        steps, new = self._steps(width, 1, depth + 1)
        return [*steps, ("call", self._layer("linear", new, width))], width

    def _square_size(self, name: str) -> tuple[int, int] | None:
        shape = self.get_submodule(name).weight.shape  # type: ignore[union-attr]
        ok = self.kinds[name] not in ("embedding", "conv1d_groups")
        return (shape[0], shape[1]) if ok and shape[0] == shape[1] else None  # type: ignore[return-value]

    # -- running -------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.steps, x)

    def run(self, steps: list[Step], x: Tensor) -> Tensor:
        for step in steps:
            x = self.run_step(step, x)
        return x

    def run_step(self, step: Step, x: Tensor) -> Tensor:
        kind = step[0]
        if kind == "call":
            return self.bound_activations(self.call(step[1], x))
        if kind == "norm":
            return self.get_submodule(step[1])(x)
        if kind == "read":
            layer = self.get_submodule(step[1])
            t = getattr(layer, step[2], None)
            t = layer.weight if t is None else t
            return x + t.mean()  # type: ignore[union-attr]
        if kind == "add":
            return self.run(step[1], x) + self.run(step[2], x)
        if kind == "no_grad":
            with torch.no_grad():
                return self.run(step[1], x)
        if kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                y = self.run(step[1], x)
            return y.to(x.dtype)
        if kind == "map" and self.python_branches:
            return torch.cat([self.run(step[1], row) for row in x.split(1)])
        if kind == "map":
            return map_rows(lambda row: self.run(step[1], row.unsqueeze(0)).squeeze(0), x)
        if self.python_branches:
            return self.run(step[1] if step[3] else step[2], x)
        taken = x.sum() > -(10**6) if step[3] else x.sum() > 10**6
        return torch.cond(taken, lambda t: self.run(step[1], t), lambda t: self.run(step[2], t), (x,))

    def bound_activations(self, y: Tensor) -> Tensor:
        return y * 0.5 if self.complex else torch.tanh(y)

    def call(self, name: str, x: Tensor) -> Tensor:
        layer: Any = self.get_submodule(name)
        if self.call_parameters:
            layer = LayerWithParameters(layer, self.call_parameters.get(name, {}))
        kind = self.kinds[name]
        if kind.startswith("conv1d"):
            return layer(x.mT).mT
        if kind == "conv2d":
            return layer(x.mT.unsqueeze(-1)).squeeze(-1).mT
        return layer(x.contiguous() if kind == "addmm" else x)

    def with_call_parameters(self, call_parameters: Mapping[str, dict[str, Tensor]]) -> RandomModel:
        """This model in the widest dtype, whose calls use other weights; what is read beside calls stays the base's."""
        twin = copy.deepcopy(self).to(torch.complex128 if self.complex else torch.float64)
        twin.call_parameters = {n: call_parameters.get(n, {}) for n in self.kinds}
        twin.python_branches = True
        return twin


class LayerWithParameters:
    """A layer called with other parameters; a dense weight of a grouped convolution makes it one group.

    A layer without a bias may get one.
    """

    def __init__(self, layer: nn.Module, made: Mapping[str, Tensor]) -> None:
        self.layer, self.parameters = layer, dict(made)
        if "weight" in made and made["weight"].shape != layer.weight.shape:  # type: ignore[union-attr]
            self.layer = copy.deepcopy(layer)
            self.layer.groups = 1  # type: ignore[assignment]
        if "bias" in made and layer.bias is None:
            self.layer = copy.deepcopy(self.layer)
            self.layer.bias = nn.Parameter(torch.zeros_like(made["bias"]))

    def __call__(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.layer, self.parameters, (x,))


def has_nested_blocks(steps: list[Step], inside: bool = False) -> bool:
    """Whether a block stands inside another one. torch writes such programs to files, and cannot read them."""
    for step in steps:
        block = step[0] in (*SIMPLE_BLOCKS, *BRANCH_BLOCKS)
        if (block and inside) or any(has_nested_blocks(p, inside or block) for p in step[1:] if isinstance(p, list)):
            return True
    return False


def blocks_of(steps: list[Step]) -> set[str]:
    """The kinds of steps a model is made of."""
    found: set[str] = set()
    for step in steps:
        found |= {step[0]} | {k for part in step[1:] if isinstance(part, list) for k in blocks_of(part)}
    return found
