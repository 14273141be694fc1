"""Slots that no code of a package reads: what a cache begins with, and the tokens by which an adapter is invoked.

Who makes a cache, or the coefficients of a step, reads them instead. So they lie beside the code, of any size that
their method has for them, and what a program computed of them is left out of it.

Before: a program with its slots. After :func:`take_out`: the same without those that nothing follows from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch.export import ExportedProgram

from adaptc.passes.ir.effects import sweep
from adaptc.passes.ir.lifted import Lifted


def unread(program: ExportedProgram, fqns: Iterable[str]) -> frozenset[str]:
    """Those of these slots that nothing which a call gives, or writes, follows from. The program is as it was."""
    lifted = Lifted(program)
    sweep(lifted.graph)
    return frozenset(f for f in fqns if not lifted.placeholders[f].users)


def take_out(lifted: Lifted, fqns: Collection[str]) -> None:
    """Erase them, and whatever is not needed, from an opened program."""
    if fqns:
        sweep(lifted.graph)
    for fqn in fqns:
        if fqn in lifted.placeholders:  # else it had another name, which went with it
            lifted.remove(fqn)
