"""Unload: take every adapter out of a program again.

After: no region, no slot; the graph computes the base and every base tensor is the object it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.export import ExportedProgram

from adaptc.passes._lifted import Lifted
from adaptc.passes._pass import Pass, PassResult
from adaptc.passes._regions import region_tag, remove_regions


@dataclass(frozen=True)
class Unload(Pass):
    name: ClassVar[str] = "unload"

    def apply(self, program: ExportedProgram) -> PassResult:
        lifted = Lifted(program)
        tags = [t for n in lifted.graph.nodes if (t := region_tag(n))]
        count = remove_regions(lifted, [t["site"] for t in tags])
        return PassResult(lifted.finish(), count)
