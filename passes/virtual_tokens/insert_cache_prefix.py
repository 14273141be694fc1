"""Inject a method that acts at the beginning of the cache, in a program that takes its cache from its caller.

Takes an opened step program whose slots are there, and a program attachment. Its method says what a cache begins with:
keys and values (a KV prefix), or embeddings of virtual tokens that the program makes them from.

It adds a tagged region that computes these, which nothing reads. The region only records what the program is adapted
by, as all regions do. The code that makes a cache computes the same once and writes it there, so a step costs no more.
Inputs that the method adds to a program are zero in the region.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from adaptc.passes.analysis.tokens.token_inputs import Lookup
from adaptc.passes.graph.lifted import Lifted
from adaptc.passes.graph.propagate import propagate
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.program_method import BEGINS, ProgramMethod
from adaptc.passes.protocol.regions import site_op
from adaptc.passes.protocol.trace import inline
from adaptc.passes.virtual_tokens.trace_program_method import traced_opening, values_of


def begin_cache(
    lifted: Lifted,
    a: Attachment,
    lookup: Lookup,
    keys: fx.Node,
    tag: Callable[[fx.Node, str, fx.Node], Callable[[str], dict[str, Any]]],
) -> None:
    """Add the region of attachment ``a``, which stands for ``keys``, the first input of the cache.

    ``lookup`` is the token lookup and ``tag`` gives the region's tags, as for ``change_places``.
    """
    assert isinstance(a.method, ProgramMethod)
    slots: Mapping[str, fx.Node] = {n: lifted.placeholders[f] for n, f in a.slots.items()}
    region = traced_opening(a.method, values_of(slots), site_op(lifted, a))
    before = set(lifted.graph.nodes)
    top = next(n for n in lifted.graph.nodes if n.op != "placeholder")
    inline(lifted.graph, region, list(slots.values()), top, lookup.node, tag(keys, BEGINS, lookup.node))
    added = set(lifted.graph.nodes) - before
    lifted.nodes.update({n.name: n for n in added})
    propagate(lifted.graph, added, lifted.program.graph_module)
