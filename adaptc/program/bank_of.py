"""Check the options of a bank, and find what its code is made of: the base, and the sites where rows have adapters.

The base is one exported program. A KV prefix that an adapter puts at the beginning of a cache is no site here: whoever
makes the cache gives each row its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.export import ExportedProgram

from adaptc.errors import ConfigError, did_you_mean, listing
from adaptc.passes.adapt.unload import Unload
from adaptc.passes.ir.graph_lock import on_graphs
from adaptc.passes.ir.program_method import BEGINS
from adaptc.passes.ir.regions import region_tag
from adaptc.program.core import ProgramCore
from adaptc.program.unload import unloaded
from adaptc.rows.bare import Bare


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for a keyword that is neither a limit of a bank nor an option of adapters."""
    known = ("config", "adapter_name", "key_mapping", "component")
    for name in options:
        if name not in known:
            limits = ("capacity", "max_rank", "max_bytes", "evict", "loader")
            if name == "scale":
                raise ConfigError(
                    "scale is of one adapter: bank.add(name, adapter, scale=...), or a weight in its rows"
                )
            raise ConfigError(f"a bank has no option {name!r}{did_you_mean(name, [*limits, *known])}")


def bare_of(program: ProgramCore) -> Bare:
    """Return the program without its adapters, and the sites where rows can have their own.

    Raises ConfigError for a program without adapter sites, and for one whose adapters act together.
    """
    a = program.adaptation
    if not a.attachments:
        raise ConfigError("the program has no adapter sites, so there is nothing for a bank: compile it with a config")
    if program.current is not None and len(parts := program.current.parts) > 1:
        raise ConfigError(
            f"the program has adapters that act together ({listing(map(repr, parts))}), which no row has apart: "
            "compile it for [one, another], and give rows a mix"
        )
    with on_graphs():
        if a.training:
            bare: ExportedProgram = Unload({k: program.base_tensors[k] for k in program.originals})(program).output
        else:
            bare = unloaded(program)
        base = program.base_tensors
        tags = [tag for node in program.graph.nodes if (tag := region_tag(node)) is not None]
        begins = {tag["site"] for tag in tags if tag["region"] == BEGINS}
        sites = [one for one in a.attachments if one.id not in begins]
        return Bare(bare, sites, program.ops, base, a.fills, a.takes, a.training)
