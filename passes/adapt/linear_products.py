"""Rewrite matmuls with a transposed parameter as linear layers.

A layer may compute ``x @ W.T`` or ``x @ W.T + b`` itself, as Falcon's does. It becomes ``linear(x, W)`` or
``linear(x, W, b)``, for which every method has a form. Without a bias torch gives the same bits. With a bias it rounds
once, and not after the matmul as well. Methods that change the bias then see it.

A matmul stays where its weight is read anywhere else (a tied head), lies in a block of control flow, or is not a
matrix. A bias is included where it is a parameter of the weight's own module that is added to nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from adaptc.passes.analysis.sites import consumers
from adaptc.passes.graph.lifted import Lifted
from adaptc.passes.graph.ops import argument
from adaptc.passes.graph.pass_infra import Pass, PassResult

aten = torch.ops.aten
_PRODUCTS = (aten.matmul.default, aten.mm.default)


@dataclass(frozen=True)
class LinearProducts(Pass):
    """A pass that rewrites such matmuls; its count is that of the layers. Without any it returns the program itself."""

    name: ClassVar[str] = "linear_products"

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        still = Lifted(subject, edit=False)
        wanted = [fqn for fqn in still.placeholders if _product_of(still, fqn) is not None]
        if not wanted:
            return PassResult(subject, 0)
        lifted, count = Lifted(subject), 0
        for fqn in wanted:
            found = _product_of(lifted, fqn)
            if found is not None:
                _rewrite(lifted, fqn, *found)
                count += 1
        return PassResult(lifted.finish(), count)


def _product_of(lifted: Lifted, fqn: str) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Return (the weight as it is read, its transpose, the matmul) of a parameter that only one matmul reads.

    Gives None for other parameters.
    """
    source = lifted.placeholders[fqn]
    weight = source.meta["val"]
    if lifted.specs[source.name].kind != InputKind.PARAMETER or not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    read = list(consumers(source))
    if len(read) != 1 or not _transposes(read[0][0]) or len(read[0][0].users) != 1:
        return None
    turned, held = read[0]
    product = next(iter(turned.users))
    left: Any = product.args[0] if product.target in _PRODUCTS else None
    if not isinstance(left, fx.Node) or left is turned or product.args[1] is not turned:
        return None
    x = left.meta.get("val")
    return (held, turned, product) if isinstance(x, Tensor) and x.ndim > 1 and x.dtype == weight.dtype else None


def _transposes(node: fx.Node) -> bool:
    """Return whether a node swaps the axes of a matrix."""
    if node.target in (aten.t.default, aten.numpy_T.default, aten.mT.default):
        return True
    if node.target is aten.permute.default:
        return [int(i) % 2 for i in argument(node, 1)] == [1, 0]
    return node.target is aten.transpose.int and {int(argument(node, i)) % 2 for i in (1, 2)} == {0, 1}


def _rewrite(lifted: Lifted, fqn: str, held: fx.Node, turned: fx.Node, product: fx.Node) -> None:
    bias, last = _bias(lifted, fqn, product), product
    if bias is not None:
        last = next(iter(product.users))
    arguments = (product.args[0], held) if bias is None else (product.args[0], held, bias)
    with lifted.graph.inserting_before(last):
        new = lifted.graph.call_function(aten.linear.default, arguments)
    new.meta = dict(product.meta) | {"val": last.meta["val"]}
    last.replace_all_uses_with(new)
    for node in dict.fromkeys((last, product, turned)):
        lifted.graph.erase_node(node)
        lifted.nodes.pop(node.name, None)
    lifted.nodes[new.name] = new


def _bias(lifted: Lifted, fqn: str, product: fx.Node) -> fx.Node | None:
    """Return the bias of the weight's module where it is added to the matmul and to nothing else; None otherwise."""
    if len(product.users) != 1:
        return None
    add = next(iter(product.users))
    if add.target is not aten.add.Tensor or add.kwargs or product not in add.args or len(add.args) != 2:
        return None
    other = add.args[1] if add.args[0] is product else add.args[0]
    own = lifted.placeholders.get(f"{fqn.rpartition('.')[0]}.bias".removeprefix("."))
    if other is not own or own is None or len(own.users) != 1 or lifted.specs[own.name].kind != InputKind.PARAMETER:
        return None
    value, made = own.meta["val"], product.meta["val"]
    return own if value.shape == made.shape[-1:] and value.dtype == made.dtype else None
