"""Unload adapters: take all of them out of a program, or make some part of the program for good.

After :class:`Unload` no region and no slot is left. The graph computes the base, and every base tensor is the object it
was. After :class:`KeepRegions` the same nodes and tensors are there, which no adapter's tag marks any more. What the
program computes does not change, and nothing can be swapped at these sites afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram

from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.pass_infra import Pass, PassResult
from adaptc.passes.protocol.regions import COEFFICIENT_ROLE, node_tag, region_tag, remove_regions


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


@dataclass(frozen=True)
class KeepRegions(Pass):
    """A pass that takes the tags off the regions of the attachments ``ids``; its count is that of the nodes.

    ``values`` maps the FQNs of slots and scales to the tensors that the program keeps.
    """

    name: ClassVar[str] = "keep_regions"

    ids: frozenset[str] = field(repr=False)
    values: Mapping[str, Tensor] = field(repr=False)

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        lifted, count = LiftedProgram(subject), 0
        slot_fqns: dict[str, None] = {}
        for node in lifted.graph.nodes:
            tag = node_tag(node)
            if tag is None or (tag["role"] != COEFFICIENT_ROLE and tag["site"] not in self.ids):
                continue
            if tag["role"] == "out":
                scale = tag["attachment"]["scale_slot"]
                slot_fqns.update(dict.fromkeys([*tag["attachment"]["slots"].values(), *([scale] if scale else [])]))
            node.meta["custom"] = {k: v for k, v in node.meta["custom"].items() if k != "adaptc"}
            count += 1
        for fqn in slot_fqns:
            _rename(lifted, fqn, self.values[fqn])
        return PassResult(lifted.finish(), count)


def _rename(lifted: LiftedProgram, fqn: str, value: Tensor) -> None:
    """Give a slot a name that no later adapter's slot has, and ``value``."""
    name = f"{fqn}_merged"
    while name in lifted.state_dict:
        name += "_merged"
    is_parameter = isinstance(lifted.tensor(fqn), torch.nn.Parameter)
    frozen = torch.nn.Parameter(value.detach(), requires_grad=False) if is_parameter else value.detach()
    lifted.placeholders[fqn].replace_all_uses_with(lifted.add_tensor(name, frozen))
    lifted.remove_tensor(fqn)
