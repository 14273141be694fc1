"""Find the keys of adapter files that are second names of a slot or of a base tensor.

PEFT writes a tensor that several of its modules share under each of them. It writes base tensors under their path in
the wrapped model. Each slot has one key here that is read, and its other keys must hold equal values.
"""

from __future__ import annotations

from adaptc.binding.binding import BindingSpec
from adaptc.passes.graph.storage import storage_key
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Slot


def base_weight_name(key: str) -> str:
    """Return the FQN of a base weight from its key in a file, which has PEFT's ``base_layer`` in its path."""
    return key.replace(".base_layer.", ".")


def slot_file_keys(a: Attachment, name: str, slot: Slot) -> list[str]:
    """Return all keys that files have for a slot of an attachment. The first is the one that is read."""
    first = a.file_key(name, slot)
    # A tensor shared by all sites is repeated under each site, and one shared by tied modules under each of these.
    again = f"{a.key if slot.shared else a.module}.{name}"
    return [first, again] if slot.repeated and again != first else [first]


def primary_key(spec: BindingSpec, key: str) -> str | None:
    """Return the key that is read for the tensor which ``key`` also names, or None where ``key`` is no second name.

    Such a tensor is a slot that files repeat, or one that is trained whole and has two names, like the bias of BERT's
    head.
    """
    for a in spec.attachments:
        if key.startswith((f"{a.key}.", f"{a.module}.")):
            for name, slot in a.method.slots(spec.ops[a.id]).items():
                first, *more = slot_file_keys(a, name, slot)
                if key in more:
                    return first
        if _is_other_name(spec, a, key):
            return next(slot_file_keys(a, n, s)[0] for n, s in a.method.slots(spec.ops[a.id]).items())
    return None


def _is_other_name(spec: BindingSpec, a: Attachment, key: str) -> bool:
    """Return whether ``key`` is another name of the base tensor that ``a`` trains as a whole."""
    # PEFT trains a copy of the module, whose tensors are tied to none outside of it.
    inside = key.startswith(f"{a.key}.")
    path = a.method.files.inner_path(key.removeprefix(f"{a.key}."))
    if path is None:
        return False
    fqn = f"{a.key}.{path}" if inside else key
    if fqn == a.fqn or fqn not in spec.weights or not (inside or a.param == "bias"):
        return False
    return storage_key(spec.weights[a.fqn]) == storage_key(spec.weights[fqn])
