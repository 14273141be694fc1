"""Choose the kind of matmul for each frozen base layer of a training graph, and write it into the graph.

Takes a graph and functions that say which kind is fastest on this CPU. The graph is that of a module to train, whose
other steps are fused, or a lifted one that gradients flow through. Values and gradients stay the same up to rounding.

It covers matmuls with a frozen parameter on a CPU: those of fused layers, of the head before a loss, and of every other
linear layer. Quantised weights have matmuls of their own. A choice does not fix the number of rows: each matmul reads
it in its call. For a base in float32 bfloat16 is chosen for, too, since autocast may be on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, fx, nn

from adaptc.passes.graph.ops import argument
from adaptc.passes.graph.pass_infra import GraphPass, PassResult
from adaptc.passes.protocol.matmul_op import LINEAR
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.passes.train.base_products import DtypeKinds, frozen_linear
from adaptc.passes.train.fused_lora_linear import lora_linears
from adaptc.passes.train.head_loss import linear_cross_entropy

aten = torch.ops.aten

FORWARD, GRADIENTS = "matmuls in training", "gradients of inputs"


class ChosenMatmul(Protocol):
    """A kind of matmul, and the classes of row counts that it is for."""

    @property
    def kind(self) -> str: ...
    @property
    def classes(self) -> tuple[int, ...]: ...


#: (rows, columns, dtype of a weight) -> the kind of matmul with it
ChooseMatmul = Callable[[int, int, torch.dtype], ChosenMatmul]


@dataclass(frozen=True)
class ChooseBaseMatmuls(GraphPass):
    """A pass that writes kinds of matmul into a graph.

    ``choose_forward`` and ``choose_gradient`` choose for the forward and for the gradient of the input. The count is
    that of the weights with a kind that is not torch's own. ``data`` maps a caption, with direction and dtype, to the
    choices for all weights. ``base``: name of a placeholder -> its weight, for a lifted graph.
    """

    name: ClassVar[str] = "choose_base_matmuls"

    choose_forward: ChooseMatmul = field(repr=False)
    choose_gradient: ChooseMatmul = field(repr=False)
    base: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        module: Any = subject.owning_module
        choices_by_caption: dict[str, list[ChosenMatmul]] = {}
        count = 0
        for node in subject.nodes:
            if node.target is lora_linears:
                kinds = [
                    self._choose_kinds(module, w, b, choices_by_caption)
                    for w, b in zip(node.args[2], node.args[3], strict=True)
                ]
                node.kwargs = {**node.kwargs, "kinds": tuple(kinds)} if any(kinds) else node.kwargs
                count += sum(map(bool, kinds))
            elif node.target in (linear_cross_entropy, aten.linear.default):
                x, w, b = (argument(node, i) if node.target is aten.linear.default else node.args[i] for i in range(3))
                kinds = self._choose_kinds(module, w, b, choices_by_caption)
                count += bool(kinds)
                if kinds and node.target is linear_cross_entropy:
                    node.kwargs = {**node.kwargs, "kinds": kinds}
                elif kinds:
                    node.target, node.args, node.kwargs = frozen_linear, (x, w, b, kinds), {}
        return PassResult(subject, count, data={what: tuple(choices) for what, choices in choices_by_caption.items()})

    def _choose_kinds(
        self, module: Any, weight: Any, bias: Any, choices_by_caption: dict[str, list[ChosenMatmul]]
    ) -> tuple[DtypeKinds, ...]:
        w = self._find_frozen(module, weight)
        if w is None or w.ndim != 2 or w.device.type != "cpu" or isinstance(w, QuantizedTensor):
            return ()
        if bias is not None and self._find_frozen(module, bias) is None:
            return ()
        out, width = w.shape
        kinds: list[DtypeKinds] = []
        for dtype in _dtypes_in_training(w.dtype):
            name = str(dtype).removeprefix("torch.")
            one, other = self.choose_forward(out, width, dtype), self.choose_gradient(out, width, dtype)
            choices_by_caption.setdefault(f"{FORWARD}, {name}", []).append(one)
            choices_by_caption.setdefault(f"{GRADIENTS}, {name}", []).append(other)
            if (one.kind, other.kind) != (LINEAR, LINEAR):
                kinds.append((dtype, one.kind, one.classes, other.kind, other.classes))
        return tuple(kinds)

    def _find_frozen(self, module: Any, node: Any) -> Tensor | None:
        """Return the frozen weight that a node reads; None for anything else."""
        if not isinstance(node, fx.Node) or node.op not in ("placeholder", "get_attr"):
            return None
        name = str(node.target)
        value = self.base.get(node.name) if node.op == "placeholder" else attrgetter(name)(module)
        is_weight = isinstance(value, nn.Parameter) or node.op == "placeholder"
        return value if is_weight and value is not None and not value.requires_grad else None


def _dtypes_in_training(dtype: torch.dtype) -> Sequence[torch.dtype]:
    return (dtype, torch.bfloat16) if dtype == torch.float32 else (dtype,)
