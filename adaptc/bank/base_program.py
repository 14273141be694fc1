"""Check the options of a bank, and find what its code is made of: the base, and the sites where rows have adapters.

The base is one exported program. A KV prefix that an adapter puts at the beginning of a cache is no site here: whoever
makes the cache gives each row its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor
from torch.export import ExportedProgram

from adaptc.errors import ConfigError, did_you_mean, listing
from adaptc.passes.adapt.unload import Unload
from adaptc.passes.graph.graph_lock import hold_graph_lock, with_graph_lock
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import Op
from adaptc.passes.graph.subprogram import extract_subprogram
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.program_method import CACHE_PREFIX
from adaptc.passes.protocol.regions import region_tag
from adaptc.runtime.mutated_buffers import written_placeholders
from adaptc.state.core import ProgramCore
from adaptc.state.merge_program import unload_program


def check_bank_options(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for a keyword that is neither a limit of a bank nor an option of adapters."""
    known = ("config", "adapter_name", "key_mapping", "component")
    for name in options:
        if name not in known:
            limits = ("capacity", "max_rank", "max_bytes", "evict", "loader", "axis")
            if name == "scale":
                raise ConfigError(
                    "scale is of one adapter: bank.add(name, adapter, scale=...), or a weight in its rows"
                )
            raise ConfigError(f"a bank has no option {name!r}{did_you_mean(name, [*limits, *known])}")


def take_base_program(program: ProgramCore) -> BaseProgram:
    """Return the program without its adapters, and the sites where rows can have their own.

    Raises ConfigError for a program without adapter sites, and for one whose adapters act together.
    """
    adaptation = program.adaptation
    if not adaptation.attachments:
        raise ConfigError("the program has no adapter sites, so there is nothing for a bank: compile it with a config")
    if program.current is not None and len(parts := program.current.joint_adapters) > 1:
        raise ConfigError(
            f"the program has adapters that act together ({listing(map(repr, parts))}), which no row has apart: "
            "compile it for [one, another], and give rows a mix"
        )
    with hold_graph_lock():
        if adaptation.training:
            bare: ExportedProgram = Unload({k: program.base_tensors[k] for k in program.originals})(program).output
        else:
            bare = unload_program(program)
        base = program.base_tensors
        tags = [tag for node in program.graph.nodes if (tag := region_tag(node)) is not None]
        begins = {tag["site"] for tag in tags if tag["region"] == CACHE_PREFIX}
        sites = [one for one in adaptation.attachments if one.id not in begins]
        return BaseProgram(
            bare, sites, program.ops, base, adaptation.fills, adaptation.forward_arg_names, adaptation.training
        )


@dataclass(frozen=True, eq=False)
class BaseProgram:
    """A program whose adapters were taken out, and the sites where they stood.

    ``base``: FQN -> base tensor. ``fills``, ``forward_arg_names``: as for :class:`Inputs`. ``training``: the adapters
    train.
    """

    program: ExportedProgram
    attachments: Sequence[Attachment]
    ops: Mapping[str, Op]
    base: Mapping[str, Tensor]
    fills: Mapping[str, Sequence[str]]
    forward_arg_names: Sequence[str]
    training: bool

    @property
    def adapter_inputs(self) -> frozenset[str]:
        """Return the names of the inputs that adapters add to the code for rows."""
        return frozenset(n for a in self.attachments for n in a.method.extra_inputs.extras())

    @property
    def written_tensors(self) -> frozenset[str]:
        """Return the FQNs of base tensors that calls write to."""
        lifted = LiftedProgram(self.program, edit=False)
        names = written_placeholders(self.program.graph)
        found = {f for f, node in lifted.placeholders.items() if node.name in names}
        outputs = self.program.graph_signature
        mutated = {*outputs.buffers_to_mutate.values(), *outputs.parameters_to_mutate.values()}
        return frozenset((found | mutated) & self.base.keys())

    @with_graph_lock
    def take_part(self, outputs: Sequence[str]) -> Self:
        """Return the part that computes these outputs, with the sites that are in it; a weight that several parts read
        is in each."""
        program = extract_subprogram(self.program, outputs)
        nodes = {n.name for n in program.graph.nodes}
        inside = [replace(a, consumers=tuple(c for c in a.consumers if c in nodes)) for a in self.attachments]
        return replace(
            self, program=program, attachments=[a for a in inside if a.consumers], fills={}, forward_arg_names=()
        )
