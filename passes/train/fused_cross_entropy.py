"""Fuse a linear head and its cross entropy into one step of a training graph.

Takes the graph of a module to train. logits = linear(x, W, b) and loss = cross_entropy(logits, labels) become one call
of ``head_loss.linear_cross_entropy``, which gives both. Values and gradients are equal up to the order of sums.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from adaptc.passes.graph.mutation import erase_dead_nodes, find_written_nodes
from adaptc.passes.graph.ops import argument
from adaptc.passes.graph.pass_infra import GraphPass, PassResult
from adaptc.passes.train.head_loss import INDEX_DTYPES, linear_cross_entropy

aten = torch.ops.aten

MEAN, SUM = 1, 2


@dataclass(frozen=True)
class FuseCrossEntropy(GraphPass):
    """A pass that fuses losses with their heads; its count is that of the losses.

    ``labelled_only`` leaves rows without a label out of the head. It fuses only losses whose logits the caller alone
    reads.
    """

    name: ClassVar[str] = "fuse_cross_entropy"

    labelled_only: bool = False

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        dirty, _ = find_written_nodes(subject)
        count = 0
        for node in subject.find_nodes(op="call_function", target=aten.cross_entropy_loss.default):
            found = _match_loss(node)
            if found is None:
                continue
            logits, linear = found
            reduction, ignore_index = argument(node, 3), argument(node, 4)
            x, w, b = (argument(linear, i) for i in range(3))
            # The layer is computed where the loss stands: nothing it reads may be written to in between.
            if not dirty.isdisjoint((logits, linear, x, w, b)):
                continue
            alone = _is_returned_only(node, logits, linear)
            if self.labelled_only and not alone:
                continue
            replaced = logits if set(linear.users) == {logits} else linear
            logits_dtype = loss_dtype = logits.args[1] if logits is not linear else None
            # A cast that did nothing at capture may be the loss's own, or that of the returned logits. It is taken for
            # the loss's, so the layer's own output is returned. Where the layer is read as well, that is certain.
            if replaced is linear or (alone and linear.meta["val"].dtype == loss_dtype):
                logits_dtype = None
            with subject.inserting_before(node):
                options = (logits_dtype, loss_dtype, reduction == MEAN, ignore_index, self.labelled_only)
                made = subject.call_function(linear_cross_entropy, (x, w, b, node.args[1], *options))
                new = [subject.call_function(operator.getitem, (made, i)) for i in range(2)]
            for old, piece in zip((replaced, node), new, strict=True):
                piece.meta = dict(old.meta)
                # Nodes before the new call cannot read it, so they keep the old logits.
                old.replace_all_uses_with(piece, delete_user_cb=_comes_after(made))
            count += 1
        erase_dead_nodes(subject)
        return PassResult(subject, count)


def _comes_after(node: fx.Node) -> Callable[[fx.Node], bool]:
    return lambda other: other > node


def _match_loss(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return (logits as the loss takes them, their linear layer); None for a loss that cannot be fused."""
    flat, labels, weight, reduction, _, smoothing = (argument(node, i) for i in range(6))
    value = labels.meta["val"]
    if weight is not None or reduction not in (MEAN, SUM) or smoothing != 0.0 or value.ndim != 1:
        return None
    if value.dtype not in INDEX_DTYPES:
        return None
    logits = _without_view(flat)
    if not isinstance(logits, fx.Node) or flat.meta["val"].shape[-1] != logits.meta["val"].shape[-1]:
        return None
    if logits.target is not aten.to.dtype:
        return (logits, logits) if logits.target is aten.linear.default else None
    layer = logits.args[0]
    if not isinstance(layer, fx.Node) or layer.target is not aten.linear.default:
        return None
    low, high = layer.meta["val"].dtype, logits.meta["val"].dtype
    return (logits, layer) if torch.promote_types(low, high) == high else None


def _without_view(flat: fx.Node) -> Any:
    return flat.args[0] if flat.target in (aten.view.default, aten.reshape.default) else flat


def _is_returned_only(node: fx.Node, logits: fx.Node, linear: fx.Node) -> bool:
    """Return whether only this loss and the caller read the logits: rows of zeros would change any other reader."""
    chain = {argument(node, 0), logits, linear}
    others = {user for n in chain for user in n.users} - {node, *chain}
    return all(user.op == "output" for user in others)
