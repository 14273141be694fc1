"""Keys of adapter files that are another name of something: of a slot, or of a base tensor.

PEFT writes a tensor that several of its modules share under each of them, and base tensors by their path in the wrapped
model. Here each slot has one key that is read; the others must agree with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adaptc.passes._lifted import storage_key
from adaptc.passes._method import Attachment, Slot

if TYPE_CHECKING:
    from adaptc.binding import Slate


def base_name(key: str) -> str:
    """The FQN of a base weight, from its key in a file, where PEFT's wrappers are part of the path."""
    return key.replace(".base_layer.", ".")


def keys_of(a: Attachment, name: str, slot: Slot) -> list[str]:
    """All keys that files have for a slot of an attachment; the first is the one that is read."""
    first = a.file_key(name, slot)
    # What all sites share is repeated under each site, what tied modules have in common under each of them.
    again = f"{a.key if slot.shared else a.module}.{name}"
    return [first, again] if slot.repeated and again != first else [first]


def second_name(slate: Slate, key: str) -> str | None:
    """The key of the tensor that ``key`` is another name of: of a slot that files repeat, or of a tensor trained whole,
    as BERT's head has its bias under two."""
    for a in slate.attachments:
        method: Any = a.method
        if key.startswith((f"{a.key}.", f"{a.module}.")):
            for name, slot in method.slots(slate.ops[a.id]).items():
                first, *more = keys_of(a, name, slot)
                if key in more:
                    return first
        if method.name == "whole" and _same_tensor(slate, a, key):
            return f"{a.key}.{method.slot}"
    return None


def _same_tensor(slate: Slate, a: Attachment, key: str) -> bool:
    """Whether ``key`` is that of a tensor which is the one ``a`` trains as a whole, under another name."""
    method: Any = a.method
    # Beyond the module that is trained, a copy of it is tied to nothing.
    inside = key.startswith(f"{a.key}.")
    path = key.removeprefix(f"{a.key}.").removeprefix(f"{method.place}.").removeprefix(method.nested)
    fqn = f"{a.key}.{path}" if inside else key
    if fqn == a.fqn or fqn not in slate.weights or not (inside or a.param == "bias"):
        return False
    return storage_key(slate.weights[a.fqn]) == storage_key(slate.weights[fqn])
