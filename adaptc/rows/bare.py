"""A program without adapters, and the sites where rows have adapters of their own.

Before: a program whose adapters were taken out, and where they stood. After: what code for rows is made beside, of the
program as a whole or of a part of it, which computes some of its outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor
from torch.export import ExportedProgram

from adaptc.passes.ir.attachment import Attachment
from adaptc.passes.ir.exclusive import exclusive
from adaptc.passes.ir.lifted import Lifted
from adaptc.passes.ir.ops import Op
from adaptc.passes.ir.part import part_of
from adaptc.runtime.state import written_to


@dataclass(frozen=True, eq=False)
class Bare:
    """``base``: base tensors by FQN. ``fills``, ``takes``: as for :class:`Inputs`. ``training``: the adapters train."""

    program: ExportedProgram
    attachments: Sequence[Attachment]
    ops: Mapping[str, Op]
    base: Mapping[str, Tensor]
    fills: Mapping[str, Sequence[str]]
    takes: Sequence[str]
    training: bool

    @property
    def added(self) -> frozenset[str]:
        """The inputs that adapters add to the code for rows."""
        return frozenset(n for a in self.attachments for n in a.method.extras())

    @property
    def written(self) -> frozenset[str]:
        """FQNs of base tensors that calls write to."""
        lifted = Lifted(self.program, edit=False)
        names = written_to(self.program.graph)
        found = {f for f, node in lifted.placeholders.items() if node.name in names}
        outputs = self.program.graph_signature
        mutated = {*outputs.buffers_to_mutate.values(), *outputs.parameters_to_mutate.values()}
        return frozenset((found | mutated) & self.base.keys())

    @exclusive
    def part(self, outputs: Sequence[str]) -> Self:
        """The part of these outputs, with the sites that are in it; a weight that several parts read is in each."""
        program = part_of(self.program, outputs)
        nodes = {n.name for n in program.graph.nodes}
        inside = [replace(a, consumers=tuple(c for c in a.consumers if c in nodes)) for a in self.attachments]
        return replace(self, program=program, attachments=[a for a in inside if a.consumers], fills={}, takes=())
