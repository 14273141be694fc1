"""Slots that are one tensor for a group of sites of an adapter, as Lily's factors are.

The program has a slot at each site, and so have files. Before: the methods of one adapter. After: which slots are to
hold one tensor. Whoever makes values for them makes one for all, so that it is trained once; what moves or copies
values keeps one tensor one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from adaptc.passes.ir.attachment import Attachment
from adaptc.passes.ir.method import Method
from adaptc.passes.ir.ops import Op


def groups(
    attachments: Sequence[Attachment], ops: Mapping[str, Op], methods: Mapping[str, Method], order: Iterable[str]
) -> dict[str, str]:
    """FQN of each slot that is of a group -> FQN of that of the group's first site. ``methods``: those of one adapter,
    by attachment id; ``order``: the FQNs of the model's parameters."""
    place = {fqn: i for i, fqn in enumerate(order)}
    present = [a for a in attachments if a.id in methods]
    present.sort(key=lambda a: place.get(a.fqn, len(place)))
    parts = {a.id: methods[a.id].unwrap(ops[a.id]) for a in present}
    out: dict[str, str] = {}
    for kind in dict.fromkeys(type(m) for m, _ in parts.values()):
        sites = [a for a in present if type(parts[a.id][0]) is kind]
        for a, firsts in zip(sites, kind.grouped_slots([parts[a.id] for a in sites]), strict=True):
            out |= {_fqn(a, name, ops): _fqn(sites[i], name, ops) for name, i in firsts.items()}
    return out


def _fqn(a: Attachment, name: str, ops: Mapping[str, Op]) -> str:
    return a.slots.get(name) or a.slot_fqn(name, a.method.slots(ops[a.id])[name])
