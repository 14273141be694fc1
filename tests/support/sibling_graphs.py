"""What tests of fused siblings share: layers on one input with adapters, and their graphs before and after fusing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from adaptc.passes.graph.lifted import copy_graph
from adaptc.passes.optimize.canonicalize import Canonicalize
from adaptc.passes.optimize.emit_fused_siblings import StackedWeight
from adaptc.passes.optimize.fold_scales import FoldScales
from adaptc.passes.optimize.fuse_siblings import FuseSiblings
from tests.support.pass_checks import export

LOW = 3


class Layers(nn.Module):
    """Linear layers of some widths on one input, LoRA on those in ``adapted``; ``body(self, x)`` reads them. ``slots``:
    the type of the adapters, float32 beside layers in half precision if None."""

    def __init__(
        self,
        body: Callable[[Any, Tensor], Any],
        widths: tuple[int, ...] = (7, 11, 2),
        adapted: tuple[int, ...] = (0, 1, 2),
        bias: tuple[bool, ...] = (False, False, False),
        dtype: torch.dtype = torch.float64,
        slots: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.layers = nn.ModuleList([nn.Linear(5, w, b) for w, b in zip(widths, bias, strict=True)]).to(dtype)
        high = torch.float32 if dtype.itemsize < 4 else dtype
        named = [(f"{n}{i}", s) for i in adapted for n, s in self.shapes(i, widths)]
        self.slots = nn.ParameterDict({n: nn.Parameter(torch.randn(s, dtype=high)) for n, s in named})
        if slots is not None:  # the scale stays: it is float32 beside adapters of any type
            for n, s in named:
                self.slots[n].data = self.slots[n].data.to(slots if s else torch.float32)
        self.adapted, self.body = adapted, body

    @staticmethod
    def shapes(i: int, widths: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        return [("a", (LOW + i, 5)), ("b", (widths[i], LOW + i)), ("s", ())]

    def layer_output(self, i: int, x: Tensor) -> Tensor:
        y = self.layers[i](x)
        if i not in self.adapted:
            return y
        a, b, s = (self.slots[f"{n}{i}"] for n in "abs")
        low = x if x.dtype == a.dtype else x.to(a.dtype)
        return (y + nn.functional.linear(nn.functional.linear(low, a), b) * s).to(y.dtype)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


class Fused:
    """A program of ``ModelLayers``, its graph, and the graph fused in one way."""

    def __init__(self, model: Layers, x: Tensor, stacked: bool, wide: bool = False) -> None:
        self.program = export(
            model.eval(), x, dynamic_shapes=(dict.fromkeys(range(x.ndim - 1), torch.export.Dim.AUTO),)
        )
        self.graph = copy_graph(self.program.graph)
        Canonicalize({"x"})(self.graph)
        specs = [s for s in self.program.graph_signature.input_specs if s.target is not None]
        slots = {s.arg.name for s in specs if str(s.target).startswith("slots.")}
        base = {s.arg.name for s in specs} - slots
        FoldScales([base, slots])(self.graph)
        fuse = FuseSiblings(base, [base, slots], {"x"}, stacked, wide)
        self.groups = fuse.find_groups_in(self.graph)
        self.packs: tuple[StackedWeight, ...] = fuse(self.graph).data
        self.values: dict[str, Tensor] = {s.arg.name: self.program.state_dict[s.target] for s in specs}  # type: ignore[index]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        packed = {p.name: torch.cat([self.values[m] for m in p.parameter_names]) for p in self.packs}
        names = [n.name for n in self.graph.find_nodes(op="placeholder")]
        with torch.no_grad():
            return fx.GraphModule({}, self.graph)(*({**self.values, **packed, "x": x}[n] for n in names))

    def count(self, op: str) -> int:
        return sum(str(n.target) == f"aten.{op}" for n in self.graph.nodes)


def read_all_layers(m: Any, x: Tensor) -> Tensor:
    """Reads every layer, through views too."""
    ys = [m.layer_output(i, x) for i in range(len(m.layers))]
    first = ys[0].view(*ys[0].shape[:-1], 1, -1).transpose(-1, -2).sum((-1, -2))
    return first + sum(y.sin().sum(-1) for y in ys)


def concat_outputs(m: Any, x: Tensor) -> Tensor:
    """What every layer gives, side by side."""
    return torch.cat([m.layer_output(i, x) for i in range(len(m.layers))], -1)
