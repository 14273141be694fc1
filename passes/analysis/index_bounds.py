"""Find the range of each integer input that indexes rows of a table: token ids, position_ids, task ids.

Plain PyTorch raises for an index that is out of range. Compiled code ends the process instead, so its caller has to
check the inputs first.

Takes an opened program and does not change it. Only tables of a known size count, and slots only where they keep their
size. Inputs are followed through casts and through views that keep every element.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from adaptc.passes.analysis.tokens.token_inputs import integer_input_of
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import CASTS, argument

aten = torch.ops.aten

_VIEWS = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.expand.default),
    *(aten.squeeze.dim, aten.squeeze.default, aten.clone.default, aten.alias.default, aten.contiguous.default),
    *(aten.permute.default, aten.transpose.int, aten.flatten.using_ints),
)

Bounds = dict[str, tuple[int, int]]


def find_index_bounds(lifted: LiftedProgram, slots: Collection[str] = ()) -> Bounds:
    """Return input name -> (least, greatest) value that the input may hold.

    ``slots`` names the placeholders of tables whose size may change from call to call; they set no bound.
    """
    out: Bounds = {}
    for node in lifted.graph.nodes:
        for source, low, high in _indexed_inputs(lifted, node, slots):
            known = out.get(source.name, (low, high))
            out[source.name] = max(low, known[0]), min(high, known[1])
    return out


def _indexed_inputs(lifted: LiftedProgram, node: fx.Node, slots: Collection[str]) -> list[tuple[fx.Node, int, int]]:
    """Return (input, least, greatest) for each input that ``node`` uses to index rows of a table."""
    if node.target is aten.embedding.default:
        found = [(argument(node, 0), 0, argument(node, 1), False)]
    elif node.target is aten.index_select.default:
        found = [(argument(node, 0), argument(node, 1), argument(node, 2), False)]
    elif node.target is aten.index.Tensor:
        indices = [(i, n) for i, n in enumerate(argument(node, 1)) if n is not None]
        found = [(argument(node, 0), i, n, True) for i, n in indices]
    else:
        return []
    out: list[tuple[fx.Node, int, int]] = []
    for table, dim, index, negative in found:
        source, shape = _index_input(lifted, index), table.meta["val"].shape
        if source is not None and isinstance(shape[dim], int) and _before_views(table).name not in slots:
            rows = shape[dim]
            out.append((source, -rows if negative else 0, rows - 1))
    return out


def _before_views(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and node.target in (*_VIEWS, *CASTS):
        node = node.all_input_nodes[0]
    return node


def _before_expand(node: fx.Node) -> fx.Node | None:
    """Return the tensor that ``node`` is a copy of, where it selects one index of an expanded axis; else None."""
    node = _before_views(node)
    if node.target is not aten.select.int:
        return None
    copies, axis = argument(node, 0), argument(node, 1)
    if copies.target is not aten.expand.default:
        return None
    original = copies.args[0]
    shape, own = copies.meta["val"].shape, original.meta["val"].shape
    return original if len(shape) == len(own) and own[axis] == 1 else None


def _index_input(lifted: LiftedProgram, index: fx.Node) -> fx.Node | None:
    """Return the input whose values ``index`` holds; None where there is none, or where it is a mask."""
    found = integer_input_of(lifted, index, _VIEWS)
    while found is None and (copied := _before_expand(index)) is not None:
        index, found = copied, integer_input_of(lifted, copied, _VIEWS)
    return None if found is None or found.meta["val"].dtype in (torch.bool, torch.uint8) else found
