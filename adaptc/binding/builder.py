"""What a binding is built from, slot by slot.

Before: a spec, and tensors of one adapter that fit it. After: a :class:`Binding` whose values lie in no memory that is
the caller's, or an error and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.file_keys import base_name
from adaptc.binding.fits import fingerprint
from adaptc.binding.groups import groups
from adaptc.binding.misfits import Cast, check_casts, check_kind, finite_scale
from adaptc.errors import CheckpointError, ConfigError
from adaptc.methods import AdapterConfig
from adaptc.passes.adapt.bound_rows import shortened
from adaptc.passes.ir.attachment import Attachment
from adaptc.passes.ir.method import Method, Slot
from adaptc.passes.ir.storage import memory_of, storage_key

#: where PEFT's models keep a module that is trained as a whole, and what it was
WRAPPED = re.compile(r"\.(original_module|modules_to_save\.[^.]+)\.(.*\.)?bias$")
#: names of layers whose base weights PEFT may write to a file
EMBEDDINGS = ("embed_tokens", "lm_head")


class Builder:
    """Collects values slot by slot."""

    def __init__(self, spec: BindingSpec, config: AdapterConfig, theirs: Iterable[Tensor] = ()) -> None:
        """``theirs``: tensors whose memory no value may lie in."""
        self.spec, self.config = spec, config
        self.theirs = frozenset(memory_of(t) for t in theirs if t.numel())
        self.casts: list[Cast] = []
        self.values: dict[str, Tensor] = {}
        self.given: dict[str, tuple[str, Tensor]] = {}
        self.groups: Mapping[str, str] = {}
        self.firsts: dict[tuple[Any, ...], str] = {}
        self.of_file = False
        self.methods: dict[str, Method] = {}
        self.base: dict[str, Tensor] = {}
        self.carried: dict[str, Tensor] = {}

    def share(self, methods: Mapping[str, Method]) -> None:
        """Before any values: the methods that the adapter has, some of whose slots may be one tensor."""
        self.groups = groups(self.spec.attachments, self.spec.ops, methods, self.spec.weights)

    def put(self, a: Attachment, method: Method, tensors: Mapping[str, Tensor], base: Tensor | None) -> None:
        op = self.spec.ops[a.id]
        self._set(a, tensors, method.scale(op), True)
        self.methods[a.id] = method
        if base is not None:
            if a.tied:
                raise ConfigError(
                    f"the first values of {method} change the base weight {a.fqn!r}, which other layers read too. Use "
                    "a scheme that leaves the base alone (init_lora_weights=True, 'gaussian', 'orthogonal'), or untie "
                    "the weight in the model."
                )
            self._replace(a.fqn, op.stored(base).contiguous())

    def _replace(self, fqn: str, value: Tensor) -> None:
        """Another base weight, under every name it has."""
        new, old = torch.nn.Parameter(value.detach(), requires_grad=False), storage_key(self.spec.weights[fqn])
        self.base |= {f: new for f, t in self.spec.weights.items() if f == fqn or storage_key(t) == old}

    def beside(self, key: str, value: Tensor, source: str) -> bool:
        """Take a tensor that no slot is for: one the program does not read, or a base weight.

        PEFT writes the weights of adapted or resized embeddings to the file and loads them into the base.
        """
        if WRAPPED.search(key):  # with bias="all" PEFT also writes the insides of its wrappers, copies of other keys
            return True
        fqn = self.spec.unread.get(key) or base_name(key)
        inside = key != fqn and key.endswith(".weight")  # a bias in a wrapper is one the adapter has trained
        if fqn not in self.spec.weights or not (inside or key in self.spec.unread or self._embeds(key)):
            return False
        base = self.spec.weights[fqn]
        if base.shape != value.shape:
            raise CheckpointError(
                f"{source}: {key!r} has shape {tuple(value.shape)}, and the model has {tuple(base.shape)}. The "
                "adapter was made for another model, or for one with a resized vocabulary: resize this one first."
            )
        if key in self.spec.unread:
            self.carried[key] = self._own(value)
            return True
        check_kind(key, value, base.dtype, source)
        new = value.to(base)
        self.casts.append(Cast(key, fqn, value, new))
        if (bound := self.spec.bound(fqn)) is not None:
            new = shortened(new, bound)
        if torch.equal(base, new):
            new = base.detach()
        else:
            new = self._own(new)
            self._replace(fqn, new)
        self.carried[key] = new  # or saving the adapter again would lose it
        return True

    def _own(self, value: Tensor) -> Tensor:
        """``value`` in memory that is not the caller's: it is copied only if it is not so already."""
        return value.detach().clone() if memory_of(value) in self.theirs else value

    def _embeds(self, key: str) -> bool:
        """Whether ``key`` is a weight that is, by PEFT's names, an embedding or an output head."""
        module = key.removesuffix(".weight")
        saved = self.config.modules_to_save or ()
        return module.rpartition(".")[2] in EMBEDDINGS and not any(module.endswith(m) for m in saved)

    def identities(self, present: Mapping[str, Method]) -> None:
        """Values for all sites the adapter does not have. Where they share a slot, or an input,
        which the sizes of the slots go with, it has the others' sizes."""
        kinds: dict[Any, Method] = {}
        for a in self.spec.attachments:
            if (m := present.get(a.id)) is not None:
                inner = m.unwrap(self.spec.ops[a.id])[0]
                kinds[type(inner), a.adapter] = inner
        for a in self.spec.attachments:
            if a.id in present:
                continue
            op = self.spec.ops[a.id]
            kin = (
                kinds.get((type(a.method.unwrap(op)[0]), a.adapter)) if a.method.shares() or a.method.extras() else None
            )
            method = a.method if kin is None else a.method.rewrap(kin)
            values = method.absent(op, self.spec.canonical(a), self.spec.dtype(a))
            self._set(a, values, a.method.scale(op), False)

    def _set(self, a: Attachment, tensors: Mapping[str, Tensor], scale: float | None, present: bool) -> None:
        dtype, device = self.spec.dtype(a), self.spec.weights[a.fqn].device
        for name, slot in a.method.slots(self.spec.ops[a.id]).items():
            fqn = a.slots.get(name) or a.slot_fqn(name, slot)
            wanted = (device, slot.dtype or dtype)
            first = self.firsts.setdefault((self.groups[fqn], *wanted), fqn) if fqn in self.groups else fqn
            if first in self.values:
                self._check_one(a, name, slot, first, tensors[name])
                self.values[fqn] = self.values[first]
            else:
                # What several sites share may belong to several programs too, and is nobody's to write to.
                given = cut_or_filled(tensors[name], slot)
                value = given.to(*wanted, copy=slot.shared)
                if present:
                    self.casts.append(Cast(a.file_key(name, slot), a.fqn, given, value))
                if not self.spec.trainable:  # or else it is copied anyhow
                    value = self._own(value)
                self.values[fqn] = self.spec.wrap(value, slot.trainable, present)
                if present and not slot.shared:
                    self.given[fqn] = a.file_key(name, slot), given
        if scale is not None:
            scale = finite_scale(scale, a, self.config)
            # float32 scale is exact enough for every dtype below float64 and keeps half precision half.
            kind = torch.float64 if dtype == torch.float64 else torch.float32
            fqn = a.scale_slot or a.scale_fqn
            self.values[fqn] = torch.tensor(scale, dtype=kind, device=device)

    def _check_one(self, a: Attachment, name: str, slot: Slot, fqn: str, value: Tensor) -> None:
        """Raises CheckpointError where a slot that several sites have is given values that differ."""
        key, first = self.given.get(fqn, ("", value))
        if self.of_file and first is not value and not torch.equal(first, value.to(first)):
            why = f"{self.config.peft_type} has one for both" if fqn in self.groups else "ensure_weight_tying"
            raise CheckpointError(
                f"{a.file_key(name, slot)!r} and {key!r}, of a layer it is tied to ({why}), are one tensor, and differ "
                "in the file"
            )

    def done(self, source: str) -> Binding:
        check_casts(self.casts, source)
        name = self.spec.attachments[0].adapter if self.spec.attachments else "default"
        bases = {fqn: fingerprint(self.spec.weights[fqn]) for fqn in self.base}
        return Binding(self.values, self.methods, self.config, self.base, name, source, self.carried, bases=bases)


def cut_or_filled(value: Tensor, slot: Slot) -> Tensor:
    """``value`` with the length ``slot`` has along the axes that are cut: cut, or filled up with zeros that nobody
    reads."""
    for axis in slot.shared_axes_cut:
        have, want = value.shape[axis], slot.shape[axis]
        if have > want:
            value = value.narrow(axis, 0, want)
        elif have < want:
            room = [want - have if i == axis else n for i, n in enumerate(value.shape)]
            value = torch.cat([value, value.new_zeros(room)], axis)
    return value
