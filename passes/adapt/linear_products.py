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

from adaptc.passes.analysis.sites import find_consumers
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import argument
from adaptc.passes.graph.pass_infra import Pass, PassResult

aten = torch.ops.aten
_MATMULS = (aten.matmul.default, aten.mm.default)


@dataclass(frozen=True)
class MatmulsToLinear(Pass):
    """A pass that rewrites such matmuls; its count is that of the layers. Without any it returns the program itself."""

    name: ClassVar[str] = "matmuls_to_linear"

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        still = LiftedProgram(subject, edit=False)
        wanted = [fqn for fqn in still.placeholders if _match_matmul(still, fqn) is not None]
        if not wanted:
            return PassResult(subject, 0)
        lifted, count = LiftedProgram(subject), 0
        for fqn in wanted:
            found = _match_matmul(lifted, fqn)
            if found is not None:
                _rewrite_matmul(lifted, fqn, *found)
                count += 1
        return PassResult(lifted.finish(), count)


def _match_matmul(lifted: LiftedProgram, fqn: str) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Return (the weight as it is read, its transpose, the matmul) of a parameter that only one matmul reads.

    Gives None for other parameters.
    """
    source = lifted.placeholders[fqn]
    weight = source.meta["val"]
    if (
        lifted.input_specs[source.name].kind != InputKind.PARAMETER
        or not isinstance(weight, Tensor)
        or weight.ndim != 2
    ):
        return None
    read = list(find_consumers(source))
    if len(read) != 1 or not _is_transpose(read[0][0]) or len(read[0][0].users) != 1:
        return None
    transposed, weight_read = read[0]
    matmul = next(iter(transposed.users))
    left: Any = matmul.args[0] if matmul.target in _MATMULS else None
    if not isinstance(left, fx.Node) or left is transposed or matmul.args[1] is not transposed:
        return None
    x = left.meta.get("val")
    return (
        (weight_read, transposed, matmul) if isinstance(x, Tensor) and x.ndim > 1 and x.dtype == weight.dtype else None
    )


def _is_transpose(node: fx.Node) -> bool:
    """Return whether a node swaps the axes of a matrix."""
    if node.target in (aten.t.default, aten.numpy_T.default, aten.mT.default):
        return True
    if node.target is aten.permute.default:
        return [int(i) % 2 for i in argument(node, 1)] == [1, 0]
    return node.target is aten.transpose.int and {int(argument(node, i)) % 2 for i in (1, 2)} == {0, 1}


def _rewrite_matmul(
    lifted: LiftedProgram, fqn: str, weight_read: fx.Node, transposed: fx.Node, matmul: fx.Node
) -> None:
    bias, last = _match_bias(lifted, fqn, matmul), matmul
    if bias is not None:
        last = next(iter(matmul.users))
    arguments = (matmul.args[0], weight_read) if bias is None else (matmul.args[0], weight_read, bias)
    with lifted.graph.inserting_before(last):
        new = lifted.graph.call_function(aten.linear.default, arguments)
    new.meta = dict(matmul.meta) | {"val": last.meta["val"]}
    last.replace_all_uses_with(new)
    for node in dict.fromkeys((last, matmul, transposed)):
        lifted.graph.erase_node(node)
        lifted.nodes.pop(node.name, None)
    lifted.nodes[new.name] = new


def _match_bias(lifted: LiftedProgram, fqn: str, matmul: fx.Node) -> fx.Node | None:
    """Return the bias of the weight's module where it is added to the matmul and to nothing else; None otherwise."""
    if len(matmul.users) != 1:
        return None
    add = next(iter(matmul.users))
    if add.target is not aten.add.Tensor or add.kwargs or matmul not in add.args or len(add.args) != 2:
        return None
    other = add.args[1] if add.args[0] is matmul else add.args[0]
    own = lifted.placeholders.get(f"{fqn.rpartition('.')[0]}.bias".removeprefix("."))
    if (
        other is not own
        or own is None
        or len(own.users) != 1
        or lifted.input_specs[own.name].kind != InputKind.PARAMETER
    ):
        return None
    value, made = own.meta["val"], matmul.meta["val"]
    return own if value.shape == made.shape[-1:] and value.dtype == made.dtype else None
