"""Hold a program without adapters, and the sites where rows have adapters of their own.

Code for rows is made of it, for the program as a whole or for a part of it that computes some of its outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor
from torch.export import ExportedProgram

from adaptc.passes.ir.attachment import Attachment
from adaptc.passes.ir.graph_lock import exclusive
from adaptc.passes.ir.lifted import Lifted
from adaptc.passes.ir.ops import Op
from adaptc.passes.ir.subprogram import part_of
from adaptc.runtime.mutated_buffers import written_to


@dataclass(frozen=True, eq=False)
class Bare:
    """A program whose adapters were taken out, and the sites where they stood.

    ``base``: FQN -> base tensor. ``fills``, ``takes``: as for :class:`Inputs`. ``training``: the adapters train.
    """

    program: ExportedProgram
    attachments: Sequence[Attachment]
    ops: Mapping[str, Op]
    base: Mapping[str, Tensor]
    fills: Mapping[str, Sequence[str]]
    takes: Sequence[str]
    training: bool

    @property
    def added(self) -> frozenset[str]:
        """Return the names of the inputs that adapters add to the code for rows."""
        return frozenset(n for a in self.attachments for n in a.method.extras())

    @property
    def written(self) -> frozenset[str]:
        """Return the FQNs of base tensors that calls write to."""
        lifted = Lifted(self.program, edit=False)
        names = written_to(self.program.graph)
        found = {f for f, node in lifted.placeholders.items() if node.name in names}
        outputs = self.program.graph_signature
        mutated = {*outputs.buffers_to_mutate.values(), *outputs.parameters_to_mutate.values()}
        return frozenset((found | mutated) & self.base.keys())

    @exclusive
    def part(self, outputs: Sequence[str]) -> Self:
        """Return the part that computes these outputs, with the sites that are in it; a weight that several parts read
        is in each."""
        program = part_of(self.program, outputs)
        nodes = {n.name for n in program.graph.nodes}
        inside = [replace(a, consumers=tuple(c for c in a.consumers if c in nodes)) for a in self.attachments]
        return replace(self, program=program, attachments=[a for a in inside if a.consumers], fills={}, takes=())
