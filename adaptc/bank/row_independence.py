"""Check whether the rows of a batch stay apart in a value: which axes may have them, and what changed with one of them.

It takes a value as the graph has it, and what changed there when each row of the inputs was replaced in turn. It gives
the axes along which the value may have rows, and for each whether all that changed is of the replaced row. For what a
program returns or writes to (:class:`ProgramOutput`), it gives the reason why rows are not apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.pytree import named_leaves, pytree
from adaptc.passes.protocol.bank_method import ROW_LAYOUTS, RowAxis
from adaptc.runtime.mutated_buffers import written_placeholders
from adaptc.torch_typing import symbolic_expression

#: share of the largest change up to which a change is rounding: with one row replaced, others may be rounded otherwise
#: (matmuls of other sizes); what mixes rows changes them by far more
ROUNDING_SHARE = 1e-3
ROWS_ARE_MIXED = "what one row of the batch is changes what others are there, so rows are not apart"


@dataclass(frozen=True)
class ProgramOutput:
    """A value in which what rows compute leaves the program.

    ``name``: what users know it by. ``value``: the value in the graph. ``is_written``: whether calls write to it and
    later calls read it; all other ends are read by callers.
    """

    name: str
    value: Tensor
    is_written: bool = False

    def why_mixed(self, size: Any, changes: Sequence[Tensor | None]) -> str:
        """Return why rows are not apart there; '' where they are.

        ``size``: the number of rows in the graph. ``changes``: for each row what changed when it was replaced, as
        :func:`changed` gives it. Rows are apart where nothing changed, or where all that changed is of the replaced
        row. A number without axes that callers read (a loss) is of the whole batch, and of no row.
        """
        if reason := why_shape_changed(changes):
            return reason
        if not any(bool(c.any()) for c in changes if c is not None) or not (self.value.ndim or self.is_written):
            return ""
        if len(changes) == 1 and not is_free_size(size):
            return ""
        ways = [*candidate_axes(self.value, size)]
        # A buffer may have room for more rows than a call has.
        ways += [RowAxis(i) for i in range(self.value.ndim)] if self.is_written else []
        if any(are_rows_apart(way, changes) for way in ways):
            return ""
        return ROWS_ARE_MIXED if ways else f"{tuple(self.value.shape)} has no axis for the {size} rows, which change it"


def program_outputs(program: ExportedProgram) -> dict[str, ProgramOutput]:
    """Return name of a node -> what the program returns there, or writes to."""
    lifted = LiftedProgram(program, edit=False)
    nodes, last = lifted.nodes, program.graph.output_node()
    outputs: dict[str, ProgramOutput] = {}
    inputs = {s.arg.name: str(s.target or s.arg.name) for s in program.graph_signature.input_specs}
    for name in sorted(written_placeholders(program.graph)):
        outputs[name] = ProgramOutput(f"what is written to {inputs[name]!r}", nodes[name].meta["val"], True)
    leaves: list[Any] = []
    values: Any = last.args[0]
    for spec, node in zip(program.graph_signature.output_specs, values, strict=True):
        if spec.kind == OutputKind.USER_OUTPUT:
            leaves.append(node)
        elif (found := nodes.get(getattr(node, "name", ""))) is not None:
            outputs.setdefault(
                found.name, ProgramOutput(f"what is written to {spec.target!r}", found.meta["val"], True)
            )
    of = program.call_spec.out_spec
    named = named_leaves(leaves if of is None else pytree.tree_unflatten(leaves, of))
    for path, node in named:
        value = getattr(node, "meta", {}).get("val")
        if isinstance(value, Tensor):
            outputs.setdefault(
                node.name, ProgramOutput(f"the output {path}" if len(named) > 1 else "the output", value)
            )
    return outputs


def candidate_axes(value: Any, size: Any) -> Iterator[RowAxis]:
    """Yield the axes along which ``value`` may have the rows: first those of their number, then those of a multiple of
    it."""
    if not isinstance(value, Tensor):
        return
    rows = size_expression(size)
    for axis, n in enumerate(value.shape):
        if size_expression(n) == rows:
            yield RowAxis(axis)
    for axis, n in enumerate(value.shape):
        each = sympy.simplify(size_expression(n) / rows)
        whole = each.is_integer and (rows.is_number or rows.free_symbols.isdisjoint(each.free_symbols))
        if each != 1 and whole and (rows.is_number or rows.free_symbols <= size_expression(n).free_symbols):
            yield from (RowAxis(axis, order) for order in ROW_LAYOUTS[1:])


def size_expression(size: Any) -> Any:
    return symbolic_expression(size) if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def is_free_size(size: Any) -> bool:
    return not size_expression(size).is_number


def are_rows_apart(row_axis: RowAxis, changes: Sequence[Tensor | None]) -> bool:
    """Return whether each row, when it was replaced, changed only its own positions along the axis ``row_axis``."""
    for row, changed in enumerate(changes):
        if changed is None:
            return False
        others = [i for i in range(changed.ndim) if i != row_axis.axis]
        along = changed.any(others) if others and changed.ndim > 1 else changed.reshape(-1)
        places = along.nonzero().flatten()
        if not bool((row_axis.row_indices(places, along.numel(), len(changes)) == row).all()):
            return False
    return True


def changed_elements(a: Any, b: Any) -> Tensor | None:
    """Return where two values of a node differ by more than rounding, a bool tensor of their shape; None where shapes
    differ."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return None
    if not (a.is_floating_point() or a.is_complex()):
        return a != b
    if not a.numel():
        return torch.zeros_like(a, dtype=torch.bool)
    off, rounding = (a - b).abs(), 4 * torch.finfo(a.dtype).eps
    size = float(a.abs().nan_to_num(posinf=0.0).max())
    near = off <= max(ROUNDING_SHARE * float(off.nan_to_num(posinf=0.0).max()), rounding * size)
    return ~(near | (a == b) | (a.isnan() & b.isnan()))


def why_shape_changed(changes: Sequence[Tensor | None]) -> str:
    """Return why rows cannot be followed where a replaced row changed the shape of the value; '' where none did."""
    depends = "the number of values there depends on what they are, so rows cannot be followed"
    return depends if any(c is None for c in changes) else ""
