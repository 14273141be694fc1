"""Switch a program between training and inference, as a module's ``train()`` and ``eval()`` do.

``torch.export`` writes each mode flag into an op's arguments (``ir.modes`` has the table). These passes rewrite the
flags. They also rewrite the dropout probability of scaled_dot_product_attention. While it is off, the node's custom
meta keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.export import ExportedProgram

from adaptc.passes.graph.lifted import LiftedProgram, copy_graph
from adaptc.passes.graph.ops import argument, custom_meta, set_argument
from adaptc.passes.graph.pass_infra import GraphPass, Pass, PassResult
from adaptc.passes.graph.train_eval import (
    BATCH_COUNTER,
    DROPOUT,
    DROPOUT_META,
    MODE_FLAGS,
    SDPA,
    SDPA_DROPOUT,
    training_mode_of,
)
from adaptc.passes.train.recomputed import RecomputedSegment

aten = torch.ops.aten


@dataclass(frozen=True)
class SetMode(Pass):
    """A pass that sets the mode of a program; its count is that of the ops that changed."""

    name: ClassVar[str] = "set_mode"

    training: bool = False

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        new = LiftedProgram(subject).finish()
        return PassResult(new, set_mode(new.graph_module, self.training))


@dataclass(frozen=True)
class SetGraphMode(GraphPass):
    """A pass that sets the mode of a module's graph in place; its count is that of the ops that changed.

    The graphs of autocast and no_grad blocks are submodules that several programs may share, so they are copied first.
    So are those of recomputed segments: a backward that is still to come must run them as its forward did.
    """

    name: ClassVar[str] = "set_mode"

    training: bool = False
    #: the switch for dropout layers in training; the dropout of attention acts in any case
    dropout: bool = True

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        module, count = subject.owning_module, 0
        for node in subject.nodes:
            inner = getattr(module, node.target, None) if node.op in ("get_attr", "call_module") else None
            holder, name = (inner, "body") if isinstance(inner, RecomputedSegment) else (module, node.target)
            body = getattr(holder, name, None) if inner is not None else None
            if isinstance(body, fx.GraphModule):
                copied = fx.GraphModule(body, copy_graph(body.graph))
                changed = set_mode(copied, self.training, self.dropout)
                if changed:
                    setattr(holder, name, copied)
                count += changed
            elif node.target is SDPA:
                count += self._set_attention_dropout(node)
            elif training_mode_of(node) is not None:
                flag = MODE_FLAGS[node.target]
                count += _update_argument(node, flag.position, self.training and (self.dropout or flag is not DROPOUT))
            elif node.target is aten.add_.Tensor and str(getattr(node.args[0], "target", "")).endswith(BATCH_COUNTER):
                count += _update_argument(node, 1, int(self.training))
        return PassResult(subject, count)

    def _set_attention_dropout(self, node: fx.Node) -> bool:
        p, custom = argument(node, SDPA_DROPOUT), dict(custom_meta(node))
        if self.training and not p and custom.get(DROPOUT_META):
            return _update_argument(node, SDPA_DROPOUT, custom[DROPOUT_META])
        if not self.training and p:
            node.meta["custom"] = {**custom, DROPOUT_META: p}
            return _update_argument(node, SDPA_DROPOUT, 0.0)
        return False


def set_mode(module: fx.GraphModule, training: bool, dropout: bool = True) -> int:
    """Set the mode of a module in place, and return how many ops changed.

    ``dropout=False`` keeps dropout layers off in training; the dropout of attention acts in any case.
    """
    count = SetGraphMode(training, dropout)(module.graph).count
    if count:
        module.recompile()
    return count


def _update_argument(node: fx.Node, position: int, value: Any) -> bool:
    if argument(node, position) == value:
        return False
    set_argument(node, position, value)
    return True
