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
from adaptc.passes.analysis.tokens.decoder_inputs import find_decoder_lookup, find_decoder_values
from adaptc.passes.analysis.tokens.token_inputs import Lookup, cache_of_lookup, find_lookups, find_program_values
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.propagate import propagate_fakes
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.coefficients import ExtraInput
from adaptc.passes.protocol.program_method import (
    DECODER_TOKEN_VALUES,
    DECODER_VALUES,
    PROGRAM_VALUES,
    TOKEN_COUNT_SIZE,
    ProgramMethod,
    ProgramValue,
)
from adaptc.passes.protocol.regions import site_op
from adaptc.passes.protocol.trace import inline
from adaptc.passes.virtual_tokens.insert_cache_prefix import insert_cache_prefix
from adaptc.passes.virtual_tokens.insert_kv_prefix import insert_kv_prefix
from adaptc.passes.virtual_tokens.trace_program_method import fake_values_of, trace_place

Tag = Callable[[fx.Node, str, fx.Node], Callable[[str], dict[str, Any]]]


def inject_program_method(
    lifted: LiftedProgram, a: Attachment, latest_outputs: dict[tuple[str, ...], fx.Node], tag: Tag
) -> None:
    """Inject the program attachment ``a``.

    ``latest_outputs`` maps nodes to the outputs of regions that were injected for them, and gets this attachment's.
    ``tag`` is called with a place's node, the place's name and the lookup. It gives a function from the role of a
    region's node to the node's tag. Raises TargetError where the program has no place for the method.
    """
    method = a.method
    assert isinstance(method, ProgramMethod)
    lookup = _find_lookup(lifted, a)
    if (first := cache_of_lookup(lifted, lookup)) is not None:
        insert_cache_prefix(lifted, a, lookup, first, tag)
        return
    found = [
        *find_program_values(lifted, method, lookup),
        *(find_decoder_values(lifted, method) if method.has_decoder_tokens() else ()),
    ]
    places = sorted(found, key=lambda p: (*PROGRAM_VALUES, *DECODER_VALUES).index(p.name))
    there = {None, *(p.name for p in places)}
    wanted = {n: e for n, e in method.extra_inputs.extras().items() if e.place in there}
    extra_inputs = {
        name: _add_extra_input(lifted, name, extra, lookup, latest_outputs) for name, extra in wanted.items()
    }
    slots = {n: lifted.placeholders[f] for n, f in a.slots.items()}
    # The lengths that virtual tokens make longer: new length -> (old length, the adapter's free size).
    more = method.virtual_token_count(fake_values_of(slots))
    own = [lookup.ids.meta["val"].shape[1]]
    own += [p.node.meta["val"].shape[1] for p in places if p.name in DECODER_TOKEN_VALUES]
    sums = {str(length + more): (str(length), TOKEN_COUNT_SIZE) for length in own} if more else {}
    changed: set[fx.Node] = set()
    try:
        if method.changes("past_key_values"):
            insert_kv_prefix(lifted, a, lookup, places, extra_inputs, tag)
            return
        for place in places:
            if place.read_nodes:
                propagate_fakes(lifted.graph, changed, lifted.program.graph_module)
            changed |= _change_place(lifted, a, place, slots, extra_inputs, latest_outputs, tag, lookup, sums)
        propagate_fakes(lifted.graph, changed, lifted.program.graph_module)
    except PassError as error:
        raise TargetError(
            f"{method.name} cannot put virtual tokens before those of {lookup.ids.name!r}: the program has sizes that "
            f"do not follow from the length of its inputs ({error}). Capture the model with that length free, or leave "
            f"the method out."
        ) from error


def _find_lookup(lifted: LiftedProgram, a: Attachment) -> Lookup:
    found = [x for x in find_lookups(lifted) if x.node.name in a.consumers]
    if not found and (decoded := find_decoder_lookup(lifted)[0]) is not None and decoded.node.name in a.consumers:
        return decoded
    if len(found) != 1:
        raise PassError(f"site {a.id!r}: {len(found)} of {a.consumers} look up what a caller gives")
    return found[0]


def _add_extra_input(
    lifted: LiftedProgram, name: str, extra: ExtraInput, lookup: Lookup, latest_outputs: dict[tuple[str, ...], fx.Node]
) -> fx.Node:
    """Return the input ``name`` that a method adds to the program; another attachment may have added it before."""
    if (name, "extra input") not in latest_outputs:
        axes = [("batch", "length").index(axis) for axis in extra.axes]
        latest_outputs[(name, "extra input")] = lifted.add_input(name, lookup.ids, axes, extra.dtype)
    return latest_outputs[(name, "extra input")]


def _change_place(
    lifted: LiftedProgram,
    a: Attachment,
    place: ProgramValue,
    slots: Mapping[str, fx.Node],
    extra_inputs: Mapping[str, fx.Node],
    latest_outputs: dict[tuple[str, ...], fx.Node],
    tag: Tag,
    lookup: Lookup,
    sums: Mapping[str, Sequence[str]],
) -> set[fx.Node]:
    node, readers, method = place.node, list(place.readers), a.method
    assert isinstance(method, ProgramMethod)
    while (node.name,) in latest_outputs:
        node = latest_outputs[(node.name,)]
        readers = list(node.users)
    reads = [latest_outputs.get((n.name,), n) for n in place.read_nodes]
    values, op = [n.meta["val"] for n in reads], site_op(lifted, a)
    region = trace_place(
        method, place, node.meta["val"], fake_values_of(slots), fake_values_of(extra_inputs), values, op, sums
    )
    existing = set(lifted.graph.nodes)
    inputs = [node, *slots.values(), *extra_inputs.values(), *reads]
    # Before its first reader, and not right after it: an in-place op may write to it in between.
    first = set(readers) if node.op != "placeholder" else None
    at = next(n for n in lifted.graph.nodes if (n.op != "placeholder" if first is None else n in first))
    out = inline(lifted.graph, region, inputs, at, lookup.node, tag(node, place.region_kind, lookup.node))
    for reader in readers:
        reader.replace_input_with(node, out)
    latest_outputs[(node.name,)] = out
    new = set(lifted.graph.nodes) - existing
    lifted.nodes.update({n.name: n for n in new})
    return new
