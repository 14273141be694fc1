"""Find slots that are one tensor for a group of sites of an adapter, such as Lily's factors.

The program and its files have a slot at each site of the group. Code that makes values makes one tensor for all of
them, so that it is trained once. Code that moves or copies values keeps it one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Method


def find_slot_groups(
    attachments: Sequence[Attachment],
    ops: Mapping[str, Op],
    methods: Mapping[str, Method],
    parameter_order: Iterable[str],
) -> dict[str, str]:
    """Return for each slot of a group, by FQN, the FQN of the slot at the group's first site.

    ``methods`` are those of one adapter, by attachment id. ``parameter_order`` has the FQNs of the model's parameters.
    """
    place = {fqn: i for i, fqn in enumerate(parameter_order)}
    present = [a for a in attachments if a.id in methods]
    present.sort(key=lambda a: place.get(a.fqn, len(place)))
    parts = {a.id: methods[a.id].unwrap(ops[a.id]) for a in present}
    out: dict[str, str] = {}
    for kind in dict.fromkeys(cast(type[Method], type(m)) for m, _ in parts.values()):
        sites = [a for a in present if type(parts[a.id][0]) is kind]
        for a, firsts in zip(sites, kind.sharing.grouped_slots([parts[a.id] for a in sites]), strict=True):
            out |= {_fqn(a, name, ops): _fqn(sites[i], name, ops) for name, i in firsts.items()}
    return out


def _fqn(a: Attachment, name: str, ops: Mapping[str, Op]) -> str:
    return a.slots.get(name) or a.slot_fqn(name, a.method.slots(ops[a.id])[name])
