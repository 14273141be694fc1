"""Find the input whose batch rows lie along the first axis of a value.

A value has one entry per row, (batch, ...), or a stretch of entries per row, (batch * length, ...). The second kind
comes from the first by a reshape, and by ops that work on each entry of the first axis alone. Nothing is run and
nothing is changed.
"""

from __future__ import annotations

from typing import Any

import sympy
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from adaptc.passes.analysis.tokens.token_axes import entrywise_inputs, sizes_of
from adaptc.passes.graph.lifted import LiftedProgram


def find_batch_input(lifted: LiftedProgram, value: fx.Node) -> fx.Node | None:
    """Return the first user input whose first axis is the batch of ``value``; None where there is none.

    An input must have two axes or more to count.
    """
    if not isinstance(value.meta.get("val"), Tensor) or not value.meta["val"].ndim:
        return None
    entries, stack, seen = sizes_of(value.meta["val"])[0], [value], {value}
    while stack:
        node = stack.pop()
        tensor = node.meta.get("val")
        if isinstance(tensor, Tensor) and tensor.ndim:
            found = _input_with_batch(lifted, sizes_of(tensor))
            if found is not None:
                return found if _is_multiple(entries, sizes_of(found.meta["val"])[0]) else None
            # (batch * length, ...): a value it is made of may have the batch as an axis of its own.
            more = [n for n in entrywise_inputs(node) if n not in seen]
            seen.update(more)
            stack += more
    return None


def _input_with_batch(lifted: LiftedProgram, shape: list[Any]) -> fx.Node | None:
    rows = shape[0]
    if len(shape) > 2 and rows == shape[1] and rows.is_number:
        return None  # the first two axes have one fixed size, so nothing tells rows and tokens apart
    for name, spec in lifted.input_specs.items():
        tensor = lifted.nodes[name].meta.get("val")
        # An input of one axis may be a flat list of tokens, which says nothing of the batch.
        if spec.kind != InputKind.USER_INPUT or not isinstance(tensor, Tensor):
            continue
        if tensor.ndim > 1 and sizes_of(tensor)[0] == rows:
            return lifted.nodes[name]
    return None


def _is_multiple(entries: Any, rows: Any) -> bool:
    entries_per_row = sympy.simplify(entries / rows)
    return bool(
        entries_per_row.is_integer if rows.is_number else rows.free_symbols.isdisjoint(entries_per_row.free_symbols)
    )
