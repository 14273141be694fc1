"""Unload: take every adapter out of a program again.

No region and no slot is left. The graph computes the base, and every base tensor is the object it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor
from torch.export import ExportedProgram

from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.pass_infra import Pass, PassResult
from adaptc.passes.protocol.regions import region_tag, remove_regions


@dataclass(frozen=True)
class Unload(Pass):
    """A pass that removes all adapters; its count is that of the regions removed.

    ``originals`` are base parameters to put back, for adapters that came with their own version of them.
    """

    name: ClassVar[str] = "unload"

    originals: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        lifted = LiftedProgram(subject)
        tags = [t for n in lifted.graph.nodes if (t := region_tag(n))]
        count = remove_regions(lifted, [t["site"] for t in tags])
        for fqn, tensor in self.originals.items():
            lifted.set_tensor(fqn, tensor)
        return PassResult(lifted.finish(), count)
