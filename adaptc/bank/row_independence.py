"""Check whether the rows of a batch stay apart in a value: which axes may have them, and what changed with one of them.

It takes a value as the graph has it, and what changed there when each row of the inputs was replaced in turn. It gives
the axes along which the value may have rows, and for each whether all that changed is of the replaced row. For what a
program returns or writes to (:class:`End`), it gives the reason why rows are not apart.
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

from adaptc.passes.graph.lifted import Lifted
from adaptc.passes.graph.pytree import named_leaves, pytree
from adaptc.passes.protocol.bank_method import ORDERS, RowAxis
from adaptc.runtime.mutated_buffers import written_to

#: share of the largest change up to which a change is rounding: with one row replaced, others may be rounded otherwise
#: (matmuls of other sizes); what mixes rows changes them by far more
SHARE = 1e-3
MIXED = "what one row of the batch is changes what others are there, so rows are not apart"


@dataclass(frozen=True)
class End:
    """A value in which what rows compute leaves the program.

    ``name``: what users know it by. ``value``: the value in the graph. ``written``: whether calls write to it and later
    calls read it; all other ends are read by callers.
    """

    name: str
    value: Tensor
    written: bool = False

    def mixed(self, size: Any, changes: Sequence[Tensor | None]) -> str:
        """Return why rows are not apart there; '' where they are.

        ``size``: the number of rows in the graph. ``changes``: for each row what changed when it was replaced, as
        :func:`changed` gives it. Rows are apart where nothing changed, or where all that changed is of the replaced
        row. A number without axes that callers read (a loss) is of the whole batch, and of no row.
        """
        if reason := size_depends(changes):
            return reason
        if not any(bool(c.any()) for c in changes if c is not None) or not (self.value.ndim or self.written):
            return ""
        if len(changes) == 1 and not free(size):
            return ""
        ways = [*choices(self.value, size)]
        # A buffer may have room for more rows than a call has.
        ways += [RowAxis(i) for i in range(self.value.ndim)] if self.written else []
        if any(apart(way, changes) for way in ways):
            return ""
        return MIXED if ways else f"{tuple(self.value.shape)} has no axis for the {size} rows, which change it"


def ends_of(program: ExportedProgram) -> dict[str, End]:
    """Return name of a node -> what the program returns there, or writes to."""
    lifted = Lifted(program, edit=False)
    nodes, last = lifted.nodes, program.graph.output_node()
    out: dict[str, End] = {}
    inputs = {s.arg.name: str(s.target or s.arg.name) for s in program.graph_signature.input_specs}
    for name in sorted(written_to(program.graph)):
        out[name] = End(f"what is written to {inputs[name]!r}", nodes[name].meta["val"], True)
    leaves: list[Any] = []
    for spec, node in zip(program.graph_signature.output_specs, last.args[0], strict=True):  # type: ignore[arg-type]
        if spec.kind == OutputKind.USER_OUTPUT:
            leaves.append(node)
        elif (found := nodes.get(getattr(node, "name", ""))) is not None:
            out.setdefault(found.name, End(f"what is written to {spec.target!r}", found.meta["val"], True))
    of = program.call_spec.out_spec
    named = named_leaves(leaves if of is None else pytree.tree_unflatten(leaves, of))
    for path, node in named:
        value = getattr(node, "meta", {}).get("val")
        if isinstance(value, Tensor):
            out.setdefault(node.name, End(f"the output {path}" if len(named) > 1 else "the output", value))
    return out


def choices(value: Any, size: Any) -> Iterator[RowAxis]:
    """Yield the axes along which ``value`` may have the rows: first those of their number, then those of a multiple of
    it."""
    if not isinstance(value, Tensor):
        return
    rows = expression(size)
    for axis, n in enumerate(value.shape):
        if expression(n) == rows:
            yield RowAxis(axis)
    for axis, n in enumerate(value.shape):
        each = sympy.simplify(expression(n) / rows)
        whole = each.is_integer and (rows.is_number or rows.free_symbols.isdisjoint(each.free_symbols))
        if each != 1 and whole and (rows.is_number or rows.free_symbols <= expression(n).free_symbols):
            yield from (RowAxis(axis, order) for order in ORDERS[1:])


def expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def free(size: Any) -> bool:
    return not expression(size).is_number


def apart(where: RowAxis, changes: Sequence[Tensor | None]) -> bool:
    """Return whether each row, when it was replaced, changed only its own positions along the axis ``where``."""
    for row, changed in enumerate(changes):
        if changed is None:
            return False
        others = [i for i in range(changed.ndim) if i != where.axis]
        along = changed.any(others) if others and changed.ndim > 1 else changed.reshape(-1)
        places = along.nonzero().flatten()
        if not bool((where.rows(places, along.numel(), len(changes)) == row).all()):
            return False
    return True


def changed(a: Any, b: Any) -> Tensor | None:
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
    near = off <= max(SHARE * float(off.nan_to_num(posinf=0.0).max()), rounding * size)
    return ~(near | (a == b) | (a.isnan() & b.isnan()))


def size_depends(changes: Sequence[Tensor | None]) -> str:
    """Return why rows cannot be followed where a replaced row changed the shape of the value; '' where none did."""
    depends = "the number of values there depends on what they are, so rows cannot be followed"
    return depends if any(c is None for c in changes) else ""
