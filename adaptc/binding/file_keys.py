"""Keys of adapter files that are another name of something: of a slot, or of a base tensor.

PEFT writes a tensor that several of its modules share under each of them, and base tensors by their path in the wrapped
model. Here each slot has one key that is read; the others must agree with it.
"""

from __future__ import annotations

from adaptc.binding.binding import BindingSpec
from adaptc.passes.ir.attachment import Attachment
from adaptc.passes.ir.method import Slot
from adaptc.passes.ir.storage import storage_key


def base_name(key: str) -> str:
    """The FQN of a base weight, from its key in a file, where PEFT's wrappers are part of the path."""
    return key.replace(".base_layer.", ".")


def keys_of(a: Attachment, name: str, slot: Slot) -> list[str]:
    """All keys that files have for a slot of an attachment; the first is the one that is read."""
    first = a.file_key(name, slot)
    # What all sites share is repeated under each site, what tied modules have in common under each of them.
    again = f"{a.key if slot.shared else a.module}.{name}"
    return [first, again] if slot.repeated and again != first else [first]


def second_name(spec: BindingSpec, key: str) -> str | None:
    """The key of the tensor that ``key`` is another name of: of a slot that files repeat, or of a tensor trained whole,
    as BERT's head has its bias under two."""
    for a in spec.attachments:
        if key.startswith((f"{a.key}.", f"{a.module}.")):
            for name, slot in a.method.slots(spec.ops[a.id]).items():
                first, *more = keys_of(a, name, slot)
                if key in more:
                    return first
        if _same_tensor(spec, a, key):
            return next(keys_of(a, n, s)[0] for n, s in a.method.slots(spec.ops[a.id]).items())
    return None


def _same_tensor(spec: BindingSpec, a: Attachment, key: str) -> bool:
    """Whether ``key`` is that of a tensor which is the one ``a`` trains as a whole, under another name."""
    # Beyond the module that is trained, a copy of it is tied to nothing.
    inside = key.startswith(f"{a.key}.")
    path = a.method.inner_path(key.removeprefix(f"{a.key}."))
    if path is None:
        return False
    fqn = f"{a.key}.{path}" if inside else key
    if fqn == a.fqn or fqn not in spec.weights or not (inside or a.param == "bias"):
        return False
    return storage_key(spec.weights[a.fqn]) == storage_key(spec.weights[fqn])
