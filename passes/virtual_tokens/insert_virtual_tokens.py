"""Inject a program method: change token ids, masks, embeddings and its other places.

Takes an opened program whose slots are there, and a program attachment (``passes.protocol.program_method``). Each place
gets a tagged region that computes the method's value for it. Every reader of the place reads that instead, with new
fake values. ``insert_kv_prefix`` injects a KV prefix, ``insert_cache_prefix`` the methods of a program that takes a
cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from adaptc.errors import PassError, TargetError
from adaptc.passes.analysis.tokens.decoder_inputs import decoder_lookup, decoder_places
from adaptc.passes.analysis.tokens.token_inputs import Lookup, cache_begun_by, find_places, lookups
from adaptc.passes.graph.lifted import Lifted
from adaptc.passes.graph.propagate import propagate
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.coefficients import Extra
from adaptc.passes.protocol.program_method import (
    DECODER_LENGTHS,
    DECODER_PLACES,
    FREE,
    PLACES,
    ProgramMethod,
    ProgramPlace,
)
from adaptc.passes.protocol.regions import site_op
from adaptc.passes.protocol.trace import inline
from adaptc.passes.virtual_tokens.insert_cache_prefix import begin_cache
from adaptc.passes.virtual_tokens.insert_kv_prefix import put_in_front
from adaptc.passes.virtual_tokens.trace_program_method import traced, values_of

Tag = Callable[[fx.Node, str, fx.Node], Callable[[str], dict[str, Any]]]


def change_places(lifted: Lifted, a: Attachment, latest: dict[tuple[str, ...], fx.Node], tag: Tag) -> None:
    """Inject the program attachment ``a``.

    ``latest`` maps nodes to the outputs of regions that were injected for them, and gets this attachment's. ``tag`` is
    called with a place's node, the place's name and the lookup. It gives a function from the role of a region's node to
    the node's tag. Raises TargetError where the program has no place for the method.
    """
    method = a.method
    assert isinstance(method, ProgramMethod)
    lookup = _lookup(lifted, a)
    if (first := cache_begun_by(lifted, lookup)) is not None:
        begin_cache(lifted, a, lookup, first, tag)
        return
    found = [
        *find_places(lifted, method, lookup),
        *(decoder_places(lifted, method) if method.decodes() else ()),
    ]
    places = sorted(found, key=lambda p: (*PLACES, *DECODER_PLACES).index(p.name))
    there = {None, *(p.name for p in places)}
    wanted = {n: e for n, e in method.extras().items() if e.place in there}
    given = {name: _added(lifted, name, extra, lookup, latest) for name, extra in wanted.items()}
    slots = {n: lifted.placeholders[f] for n, f in a.slots.items()}
    # The lengths that virtual tokens make longer: new length -> (old length, the adapter's free size).
    more = method.lengthens(values_of(slots))
    own = [lookup.ids.meta["val"].shape[1]]
    own += [p.node.meta["val"].shape[1] for p in places if p.name in DECODER_LENGTHS]
    sums = {str(length + more): (str(length), FREE) for length in own} if more else {}
    changed: set[fx.Node] = set()
    try:
        if method.changes("cached"):
            put_in_front(lifted, a, lookup, places, given, tag)
            return
        for place in places:
            if place.reads:
                propagate(lifted.graph, changed, lifted.program.graph_module)
            changed |= _change(lifted, a, place, slots, given, latest, tag, lookup, sums)
        propagate(lifted.graph, changed, lifted.program.graph_module)
    except PassError as error:
        raise TargetError(
            f"{method.name} cannot put tokens in front of those of {lookup.ids.name!r}: the program has sizes that do "
            f"not follow from the length of its inputs ({error}). Capture the model with that length free, or leave "
            f"the method out."
        ) from error


def _lookup(lifted: Lifted, a: Attachment) -> Lookup:
    found = [x for x in lookups(lifted) if x.node.name in a.consumers]
    if not found and (decoded := decoder_lookup(lifted)[0]) is not None and decoded.node.name in a.consumers:
        return decoded
    if len(found) != 1:
        raise PassError(f"site {a.id!r}: {len(found)} of {a.consumers} look up what a caller gives")
    return found[0]


def _added(lifted: Lifted, name: str, extra: Extra, lookup: Lookup, latest: dict[tuple[str, ...], fx.Node]) -> fx.Node:
    """Return the input ``name`` that a method adds to the program; another attachment may have added it before."""
    if (name, "given") not in latest:
        axes = [("batch", "length").index(axis) for axis in extra.axes]
        latest[(name, "given")] = lifted.add_input(name, lookup.ids, axes, extra.dtype)
    return latest[(name, "given")]


def _change(
    lifted: Lifted,
    a: Attachment,
    place: ProgramPlace,
    slots: Mapping[str, fx.Node],
    given: Mapping[str, fx.Node],
    latest: dict[tuple[str, ...], fx.Node],
    tag: Tag,
    lookup: Lookup,
    sums: Mapping[str, Sequence[str]],
) -> set[fx.Node]:
    node, readers, method = place.node, list(place.readers), a.method
    assert isinstance(method, ProgramMethod)
    while (node.name,) in latest:
        node = latest[(node.name,)]
        readers = list(node.users)
    reads = [latest.get((n.name,), n) for n in place.reads]
    values, op = [n.meta["val"] for n in reads], site_op(lifted, a)
    region = traced(method, place, node.meta["val"], values_of(slots), values_of(given), values, op, sums)
    before = set(lifted.graph.nodes)
    inputs = [node, *slots.values(), *given.values(), *reads]
    # Before its first reader, and not right after it: an in-place op may write to it in between.
    first = set(readers) if node.op != "placeholder" else None
    at = next(n for n in lifted.graph.nodes if (n.op != "placeholder" if first is None else n in first))
    out = inline(lifted.graph, region, inputs, at, lookup.node, tag(node, place.name, lookup.node))
    for reader in readers:
        reader.replace_input_with(node, out)
    latest[(node.name,)] = out
    new = set(lifted.graph.nodes) - before
    lifted.nodes.update({n.name: n for n in new})
    return new
