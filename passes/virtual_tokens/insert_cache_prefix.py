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
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.propagate import propagate_fakes
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.program_method import CACHE_PREFIX, ProgramMethod
from adaptc.passes.protocol.regions import site_op
from adaptc.passes.protocol.trace import inline
from adaptc.passes.virtual_tokens.trace_program_method import fake_values_of, trace_cache_prefix


def insert_cache_prefix(
    lifted: LiftedProgram,
    a: Attachment,
    lookup: Lookup,
    cache_input: fx.Node,
    tag: Callable[[fx.Node, str, fx.Node], Callable[[str], dict[str, Any]]],
) -> None:
    """Add the region of attachment ``a``, which stands for ``cache_input``, the first input of the cache.

    ``lookup`` is the token lookup and ``tag`` gives the region's tags, as for ``inject_program_method``.
    """
    assert isinstance(a.method, ProgramMethod)
    slots: Mapping[str, fx.Node] = {n: lifted.placeholders[f] for n, f in a.slots.items()}
    region = trace_cache_prefix(a.method, fake_values_of(slots), site_op(lifted, a))
    before = set(lifted.graph.nodes)
    top = next(n for n in lifted.graph.nodes if n.op != "placeholder")
    inline(lifted.graph, region, list(slots.values()), top, lookup.node, tag(cache_input, CACHE_PREFIX, lookup.node))
    added = set(lifted.graph.nodes) - before
    lifted.nodes.update({n.name: n for n in added})
    propagate_fakes(lifted.graph, added, lifted.program.graph_module)
