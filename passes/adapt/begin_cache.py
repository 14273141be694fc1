"""What a cache begins with, in a program that takes its cache from its caller.

Before: an opened step program whose slots are there, and a program attachment whose method says what a cache begins
with: keys and values, or embeddings of which the program makes them. After: a tagged region that computes these, which
nothing reads. Who makes a cache computes the same once and writes it there, so that a step costs what it cost; the
region says of the program what it is adapted by, as all regions do. What a method is given is zero in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from adaptc.passes.adapt.trace_places import traced_opening, values_of
from adaptc.passes.analysis.token_places import Lookup
from adaptc.passes.ir.attachment import Attachment
from adaptc.passes.ir.lifted import Lifted
from adaptc.passes.ir.program_method import BEGINS, ProgramMethod
from adaptc.passes.ir.propagate import propagate
from adaptc.passes.ir.regions import site_op
from adaptc.passes.ir.trace import inline


def begin_cache(
    lifted: Lifted,
    a: Attachment,
    lookup: Lookup,
    keys: fx.Node,
    tag: Callable[[fx.Node, str, fx.Node], Callable[[str], dict[str, Any]]],
) -> None:
    """``keys``: the first input of the cache; the rest as for ``change_places``."""
    assert isinstance(a.method, ProgramMethod)
    slots: Mapping[str, fx.Node] = {n: lifted.placeholders[f] for n, f in a.slots.items()}
    region = traced_opening(a.method, values_of(slots), site_op(lifted, a))
    before = set(lifted.graph.nodes)
    top = next(n for n in lifted.graph.nodes if n.op != "placeholder")
    inline(lifted.graph, region, list(slots.values()), top, lookup.node, tag(keys, BEGINS, lookup.node))
    added = set(lifted.graph.nodes) - before
    lifted.nodes.update({n.name: n for n in added})
    propagate(lifted.graph, added, lifted.program.graph_module)
