"""Build a binding slot by slot, from a spec and one adapter's tensors that fit it.

No value of the :class:`Binding` shares memory with the caller's tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.check_binding import fingerprint
from adaptc.binding.check_tensors import Cast, check_casts, check_number_kind, finite_scale
from adaptc.binding.file_keys import base_weight_name
from adaptc.binding.grouped_slots import find_slot_groups
from adaptc.errors import CheckpointError, ConfigError
from adaptc.methods import AdapterConfig
from adaptc.passes.adapt.embedding_max_norm import limit_row_norms
from adaptc.passes.graph.storage import memory_address, storage_key
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Method, Slot
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor

#: keys of biases inside PEFT's wrapper of a module that is trained as a whole, and of the original module
WRAPPED_BIAS_KEY = re.compile(r"\.(original_module|modules_to_save\.[^.]+)\.(.*\.)?bias$")
#: names of layers whose base weights PEFT may write to a file
EMBEDDING_NAMES = ("embed_tokens", "lm_head")


class BindingBuilder:
    """A collector of slot values for one binding."""

    def __init__(self, spec: BindingSpec, config: AdapterConfig, caller_tensors: Iterable[Tensor] = ()) -> None:
        """Start without values. No value may share the memory of a tensor in ``caller_tensors``."""
        self.spec, self.config = spec, config
        self.caller_memory = frozenset(memory_address(t) for t in caller_tensors if t.numel())
        self.casts: list[Cast] = []
        self.values: dict[str, Tensor] = {}
        self.file_values: dict[str, tuple[str, Tensor]] = {}
        self.slot_groups: Mapping[str, str] = {}
        self.first_slots: dict[tuple[Any, ...], str] = {}
        self.is_from_file = False
        self.methods: dict[str, Method] = {}
        self.changed_base: dict[str, Tensor] = {}
        self.extra_tensors: dict[str, Tensor] = {}
        self.idle_tensors: dict[str, Tensor] = {}

    def find_shared_slots(self, methods: Mapping[str, Method]) -> None:
        """Note which slots of these methods are one tensor. Call it before any values are put."""
        self.slot_groups = find_slot_groups(self.spec.attachments, self.spec.ops, methods, self.spec.weights)

    def add_site(self, a: Attachment, method: Method, tensors: Mapping[str, Tensor], base: Tensor | None) -> None:
        op = self.spec.ops[a.id]
        self._set_site(a, tensors, method.scale(op), True)
        self.methods[a.id] = method
        if base is not None:
            if a.tied:
                raise ConfigError(
                    f"the first values of {method} change the base weight {a.fqn!r}, which other layers read too. Use "
                    "a scheme that leaves the base alone (init_lora_weights=True, 'gaussian', 'orthogonal'), or untie "
                    "the weight in the model."
                )
            if isinstance(self.spec.weights[a.fqn], QuantizedTensor):
                raise ConfigError(
                    f"the first values of {method} change the base weight {a.fqn!r}, which is quantised and would "
                    "become a plain one. Use a scheme that leaves the base alone (init_lora_weights=True, 'gaussian', "
                    "'orthogonal'), or 'loftq' on the float model, which is quantised after that."
                )
            plain = base.dequantize() if isinstance(base, QuantizedTensor) else base
            self._replace_base(a.fqn, op.stored(plain).contiguous())

    def _replace_base(self, fqn: str, value: Tensor) -> None:
        """Replace a base weight under each of its names."""
        new, old = torch.nn.Parameter(value.detach(), requires_grad=False), storage_key(self.spec.weights[fqn])
        self.changed_base |= {f: new for f, t in self.spec.weights.items() if f == fqn or storage_key(t) == old}

    def take_without_slot(self, key: str, value: Tensor, source: str) -> bool:
        """Take a tensor without a slot: of an idle layer, one that the program does not read, or a base weight.

        PEFT writes the weights of adapted or resized embeddings to the file, and loads them into the base. Returns
        False where the tensor is of no such kind. Raises CheckpointError for a wrong shape or kind of numbers.
        """
        if WRAPPED_BIAS_KEY.search(
            key
        ):  # with bias="all" PEFT also writes its wrappers' inner biases, copies of other keys
            return True
        if key not in self.spec.unread and self.spec.is_of_idle_layer(key):
            self.idle_tensors[key] = self._copy_if_shared(value)
            return True
        fqn = self.spec.unread.get(key) or base_weight_name(key)
        inside = key != fqn and key.endswith(".weight")  # a bias inside a wrapper was trained by the adapter
        if fqn not in self.spec.weights or not (inside or key in self.spec.unread or self._is_embedding_key(key)):
            return False
        base = self.spec.weights[fqn]
        if base.shape != value.shape:
            raise CheckpointError(
                f"{source}: {key!r} has shape {tuple(value.shape)}, and the model has {tuple(base.shape)}. The "
                "adapter was made for another model, or for one with a resized vocabulary: resize this one first."
            )
        if key in self.spec.unread:
            self.extra_tensors[key] = self._copy_if_shared(value)
            return True
        check_number_kind(key, value, base.dtype, source)
        new = value.to(base)
        self.casts.append(Cast(key, fqn, value, new))
        if (bound := self.spec.max_norm_of(fqn)) is not None:
            new = limit_row_norms(new, bound)
        if torch.equal(base, new):
            new = base.detach()
        else:
            new = self._copy_if_shared(new)
            self._replace_base(fqn, new)
        self.extra_tensors[key] = new  # or saving the adapter again would lose it
        return True

    def _copy_if_shared(self, value: Tensor) -> Tensor:
        """Return ``value``, copied where it shares memory with the caller's tensors."""
        if self.caller_memory and memory_address(value) in self.caller_memory:
            return value.detach().clone()
        return value

    def _is_embedding_key(self, key: str) -> bool:
        """Return whether ``key`` is the weight of an embedding or output head by PEFT's names, and is not trained as a
        whole."""
        module = key.removesuffix(".weight")
        saved = self.config.modules_to_save or ()
        return module.rpartition(".")[2] in EMBEDDING_NAMES and not any(module.endswith(m) for m in saved)

    def fill_absent_sites(self, methods: Mapping[str, Method]) -> None:
        """Set values for all sites that the adapter does not have.

        Where such a site shares a slot or an extra input with the adapter's other sites, its values have the sizes of
        theirs.
        """
        by_family: dict[Any, Method] = {}
        for a in self.spec.attachments:
            if (m := methods.get(a.id)) is not None:
                inner = m.unwrap(self.spec.ops[a.id])[0]
                by_family[type(inner), a.adapter] = inner
        for a in self.spec.attachments:
            if a.id in methods:
                continue
            op = self.spec.ops[a.id]
            kin = (
                by_family.get((type(a.method.unwrap(op)[0]), a.adapter))
                if a.method.sharing.shares() or a.method.extra_inputs.extras()
                else None
            )
            method = a.method if kin is None else a.method.rewrap(kin)
            values = method.absent(op, self.spec.canonical_weight(a), self.spec.adapter_dtype(a))
            self._set_site(a, values, a.method.scale(op), False)

    def _set_site(self, a: Attachment, tensors: Mapping[str, Tensor], scale: float | None, is_present: bool) -> None:
        dtype, device = self.spec.adapter_dtype(a), self.spec.weights[a.fqn].device
        for name, slot in a.method.slots(self.spec.ops[a.id]).items():
            fqn = a.slots.get(name) or a.slot_fqn(name, slot)
            conversion = (device, slot.dtype or dtype)
            first = (
                self.first_slots.setdefault((self.slot_groups[fqn], *conversion), fqn)
                if fqn in self.slot_groups
                else fqn
            )
            if first in self.values:
                self._check_shared_value(a, name, slot, first, tensors[name])
                self.values[fqn] = self.values[first]
            else:
                # A shared tensor may belong to several programs, too, and none of them may write to it.
                # First values may be the weight itself, and what an adapter trains is stored plain.
                plain = t.dequantize() if isinstance(t := tensors[name], QuantizedTensor) else t
                original = resize_shared_axes(plain, slot)
                value = original.to(*conversion, copy=slot.shared)
                if is_present:
                    self.casts.append(Cast(a.file_key(name, slot), a.fqn, original, value))
                # Training writes to parameters and running statistics, and must not write to the caller's tensors.
                value = value.detach().clone() if self.spec.trainable else self._copy_if_shared(value.detach())
                if slot.trainable:
                    learns = self.spec.trainable and is_present and (value.is_floating_point() or value.is_complex())
                    value = torch.nn.Parameter(value, requires_grad=learns)
                self.values[fqn] = value
                if is_present and not slot.shared:
                    self.file_values[fqn] = a.file_key(name, slot), original
        if scale is not None:
            scale = finite_scale(scale, a, self.config)
            # float32 scale is exact enough for every dtype below float64 and keeps half precision half.
            kind = torch.float64 if dtype == torch.float64 else torch.float32
            fqn = a.scale_slot or a.scale_fqn
            self.values[fqn] = torch.tensor(scale, dtype=kind, device=device)

    def _check_shared_value(self, a: Attachment, name: str, slot: Slot, fqn: str, value: Tensor) -> None:
        """Raise CheckpointError where a file gives different values for one slot that several sites share."""
        key, first = self.file_values.get(fqn, ("", value))
        if self.is_from_file and first is not value and not torch.equal(first, value.to(first)):
            why = f"{self.config.peft_type} has one for both" if fqn in self.slot_groups else "ensure_weight_tying"
            raise CheckpointError(
                f"{a.file_key(name, slot)!r} and {key!r}, of a layer it is tied to ({why}), are one tensor, and differ "
                "in the file"
            )

    def build(self, source: str) -> Binding:
        check_casts(self.casts, source)
        name = self.spec.attachments[0].adapter if self.spec.attachments else "default"
        bases = {fqn: fingerprint(self.spec.weights[fqn]) for fqn in self.changed_base}
        return Binding(
            self.values,
            self.methods,
            self.config,
            self.changed_base,
            name,
            source,
            self.extra_tensors,
            base_fingerprints=bases,
            idle_tensors=self.idle_tensors,
        )


def resize_shared_axes(value: Tensor, slot: Slot) -> Tensor:
    """Return ``value`` with the length that ``slot`` has along its cut axes: cut, or filled up with zeros that nothing
    reads."""
    for axis in slot.shared_axes_cut:
        have, want = value.shape[axis], slot.shape[axis]
        if have > want:
            value = value.narrow(axis, 0, want)
        elif have < want:
            room = [want - have if i == axis else n for i, n in enumerate(value.shape)]
            value = torch.cat([value, value.new_zeros(room)], axis)
    return value
