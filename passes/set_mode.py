"""Switch a program between training and inference: the flags a module's ``train()`` and ``eval()`` would have set.

``torch.export`` bakes each flag into an op's arguments. This pass rewrites them: dropout and batch-norm flags,
recurrent layers' train flags, and the dropout probability of scaled_dot_product_attention, which is remembered in the
node's custom meta while it is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.export import ExportedProgram

from adaptc.passes._lifted import Lifted, copy_graph
from adaptc.passes._pass import Pass, PassResult

aten = torch.ops.aten

#: op -> position of its train flag
FLAGS: dict[Any, int] = {
    aten.dropout.default: 2,
    aten.dropout_.default: 2,
    aten.native_dropout.default: 2,
    aten.feature_dropout.default: 2,
    aten.feature_dropout_.default: 2,
    aten.alpha_dropout.default: 2,
    aten.feature_alpha_dropout.default: 2,
    aten.batch_norm.default: 5,
    aten.instance_norm.default: 5,
    aten.rrelu.default: 3,
    aten.lstm.input: 6,
    aten.gru.input: 6,
    aten.rnn_tanh.input: 6,
    aten.rnn_relu.input: 6,
}
SDPA = aten.scaled_dot_product_attention.default
KEPT = "adaptc_dropout_p"
#: the buffer in which batch norm counts its training batches
COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class SetMode(Pass):
    name: ClassVar[str] = "set_mode"

    training: bool = False

    def apply(self, program: ExportedProgram) -> PassResult:
        new = Lifted(program).finish()
        return PassResult(new, set_mode(new.graph_module, self.training))


def set_mode(module: fx.GraphModule, training: bool) -> int:
    """Rewrite the flags of a graph module in place; returns how many ops changed.

    The graphs of autocast and no_grad blocks are submodules, which several programs may share: they are copied first.
    """
    count = 0
    for node in module.graph.nodes:
        inner = getattr(module, node.target, None) if node.op == "get_attr" else None
        if isinstance(inner, fx.GraphModule):
            copied = fx.GraphModule(inner, copy_graph(inner.graph))
            changed = set_mode(copied, training)
            if changed:
                setattr(module, node.target, copied)
            count += changed
        elif node.target in FLAGS:
            count += _set(node, FLAGS[node.target], training)
        elif node.target is SDPA:
            count += _attention(node, training)
        elif node.target is aten.add_.Tensor and str(getattr(node.args[0], "target", "")).endswith(COUNTER):
            count += _set(node, 1, int(training))
    if count:
        module.recompile()
    return count


def _set(node: fx.Node, position: int, value: Any) -> bool:
    name = node.target._schema.arguments[position].name  # type: ignore[union-attr]  # OpOverload
    if position < len(node.args):
        if node.args[position] == value:
            return False
        node.update_arg(position, value)
    else:
        if node.kwargs.get(name) == value:
            return False
        node.update_kwarg(name, value)
    return True


def _attention(node: fx.Node, training: bool) -> bool:
    p = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    custom = dict(node.meta.get("custom") or {})
    if training and not p and custom.get(KEPT):
        return _set(node, 4, custom[KEPT])
    if not training and p:
        node.meta["custom"] = {**custom, KEPT: p}
        return _set(node, 4, 0.0)
    return False
