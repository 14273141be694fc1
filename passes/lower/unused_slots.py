"""Find and remove the slots that no code of a package reads.

They are KV prefixes and prompts that a cache begins with, and the tokens that invoke an adapter. Whoever makes a cache,
or the coefficients of a step, reads them instead. So they lie beside the code, in any size that their method allows,
and the program has no input for them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch.export import ExportedProgram

from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.mutation import erase_dead_nodes


def find_unused_slots(program: ExportedProgram, fqns: Iterable[str]) -> frozenset[str]:
    """Return the slots in ``fqns`` whose values affect neither an output nor a tensor that a call writes to.

    The program is not changed.
    """
    lifted = LiftedProgram(program)
    erase_dead_nodes(lifted.graph)
    return frozenset(f for f in fqns if not lifted.placeholders[f].users)


def remove_slots(lifted: LiftedProgram, fqns: Collection[str]) -> None:
    """Erase the slots ``fqns``, and all nodes without effect, from an opened program."""
    if fqns:
        erase_dead_nodes(lifted.graph)
    for fqn in fqns:
        if fqn in lifted.placeholders:  # a tied slot goes with the first of its names
            lifted.remove_tensor(fqn)
