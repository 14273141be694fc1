"""Fit adapters to a package: pad their values to the shapes of its constants, in their dtypes, on its device.

:meth:`AdapterPadder.pad` gives a value for every constant that adapters fill, or raises and changes nothing. The
compiled code checks no shapes itself and would read past the end of a tensor, so shapes are checked here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.archives.refusal import UnsafeFile
from adaptc.binding.binding import Binding
from adaptc.binding.common_to_sites import settle_shared_slots
from adaptc.binding.sources.configs import config_from_dict
from adaptc.errors import CheckpointError, SwapError, errors_name
from adaptc.methods import AdapterConfig
from adaptc.packages.constants import PackagedBinding
from adaptc.packages.manifest import Manifest, SlotCapacity
from adaptc.passes.graph.storage import memory_address
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Method
from adaptc.program.files.stored_sites import StoredSite

Shape = tuple[tuple[int, ...], torch.dtype]


def unused_slot_key(index: int, fqn: str) -> str:
    """Return the name in the file of a slot that no code reads, of the adapter at an index of a bank."""
    return f"member.{index}.{fqn}"


class AdapterPadder:
    """The padder of adapters for one package, from its manifest and the ``tensors`` of its file.

    ``path`` is the file, for messages. Raises UnsafeFile where a tensor is missing, or of another shape or dtype.
    """

    def __init__(self, manifest: Manifest, tensors: Mapping[str, Tensor], device: torch.device, path: Path) -> None:
        self.manifest, self.device, self.path = manifest, device, path
        shapes = _constant_shapes(manifest, tensors)
        self._unused_slots = frozenset(f for f, room in manifest.rooms.items() if room.unread)
        #: FQN -> shape and dtype of each constant of the compiled code that adapters fill
        self.shapes = {f: shape for f, shape in shapes.items() if f not in self._unused_slots}
        required = shapes if manifest.bank is None else self.shapes
        current = {f: tensors.get(f"current.{f}") for f in required}
        for fqn, value in current.items():
            if value is None or (tuple(value.shape), value.dtype) != shapes[fqn]:
                raise UnsafeFile(f"the tensor 'current.{fqn}' is missing, or of another shape or dtype")
        #: the values the code was compiled with
        self._packaged_values = {f: t.to(device) for f, t in current.items() if t is not None}
        self.stored_tensors = {k: t.to(device) for k, t in tensors.items() if not k.startswith("current.")}
        for place in range(0 if manifest.bank is None else len(manifest.bank["names"])):
            for fqn, value in self.unused_slots_of(place).items():
                room = manifest.rooms[fqn]
                if (value.ndim, value.dtype) != (len(room.shape), room.dtype):
                    raise UnsafeFile(f"the tensor {unused_slot_key(place, fqn)!r} is of another shape or dtype")

    def packaged_binding(self, owner_token: object) -> PackagedBinding:
        """Return the adapter that the package was made with. It may be called once: the values are not kept here."""
        m = self.manifest
        present_sites, config = set(m.header["present"]), config_from_dict(m.header["config"])
        ops = {s.attachment.id: s.op for s in m.sites}
        found = [s.attachment for s in m.sites if s.attachment.id in present_sites]
        rebound = {a.id: a.method.rebind(config, a).sizes.specialized_for(ops[a.id]) for a in found}
        methods = settle_shared_slots(rebound, ops, [s.attachment.fqn for s in m.sites])
        (constants, values), self._packaged_values = self._split_unused(self._packaged_values), {}
        factors = {site: f for site, f in m.header.get("factors", {}).items() if site in present_sites}
        name = m.sites[0].attachment.adapter
        binding = Binding(values, methods, config, name=name, source=str(self.path), scale_factors=factors)
        return PackagedBinding(**vars(binding), constants=constants, owner_token=owner_token)

    def unused_slots_of(self, index: int) -> dict[str, Tensor]:
        """Return the slots that no code reads, by FQN, of the adapter that a bank was packaged with at ``place``."""
        found = {fqn: self.stored_tensors.get(unused_slot_key(index, fqn)) for fqn in self._unused_slots}
        return {fqn: value for fqn, value in found.items() if value is not None}

    def rank_capacities(self) -> dict[str, int]:
        """Return the largest rank that there is capacity for at each site with a rank, by the FQN of its parameter."""
        found = {s.attachment.fqn: self.rank_capacity(s) for s in self.manifest.sites}
        return {fqn: rank for fqn, rank in found.items() if rank is not None}

    def rank_capacity(self, s: StoredSite) -> int | None:
        rooms = self.manifest.rooms
        shapes = {n: torch.empty(rooms[f].shape, device="meta") for n, f in s.attachment.slots.items()}
        return s.attachment.method.sizes.with_sizes_of(s.op, shapes).sizes.rank()

    def site_weights(self) -> dict[str, Tensor]:
        """Return the base weight of each site, by FQN; NaN (0 where not floating) for one that is not in the file."""
        weights: dict[str, Tensor] = {}
        for s in self.manifest.sites:
            fqn = s.attachment.fqn
            unknown = torch.tensor(float("nan") if s.dtype.is_floating_point else 0, device=self.device).to(s.dtype)
            weights[fqn] = self.stored_tensors.get(f"base.{fqn}", unknown.expand(s.shape))
        return weights

    def check_base(self, config: AdapterConfig) -> None:
        """Raise SwapError for an adapter of ``config`` that changes base weights which the file does not hold."""
        for s in self.manifest.sites:
            a = s.attachment
            method = a.method.rebind(config, a)
            if method.files.needs_base() and a.fqn not in self.manifest.bases:
                raise SwapError(
                    f"an adapter of this {type(config).__name__} has values that follow from the base weight "
                    f"{a.fqn!r}, which the package does not hold. Swap the adapter into the program, and package that."
                )
            if method.changes_base_at_init() and a.fqn not in self.manifest.bases:
                quantised = (
                    ""
                    if method.base_scheme() is None
                    else " Where the package holds the quantised weights that the adapter was trained on, set "
                    "init_lora_weights to true in its config."
                )
                raise SwapError(
                    f"an adapter of this {type(config).__name__} changes the base weight {a.fqn!r} by its first "
                    "values, and the package does not hold the base. Package the program with such an adapter as its "
                    "current one, or convert the adapter to plain LoRA with PEFT's "
                    f"save_pretrained(path_initial_model_for_weight_conversion=...).{quantised}"
                )

    def pad(self, binding: Binding, owner_token: object) -> PackagedBinding:
        """Return ``binding`` as the compiled code takes it, in memory of its own.

        Raises SwapError for a rank above the capacity, and for changed base weights that are fixed in the package.
        Raises CheckpointError for values that are not finite in the package's dtype.
        """
        padded: dict[str, Tensor] = {}
        # Sites that the adapter has come first: a slot that they share with a site it lacks gets their value.
        for s in sorted(self.manifest.sites, key=lambda s: s.attachment.id not in binding.methods):
            a = s.attachment
            method = binding.methods.get(a.id)
            specs = {} if method is None else method.slots(s.op)
            for name, fqn in a.slots.items():
                if fqn in padded or (fqn in self._unused_slots and name not in specs):
                    continue  # left out: whoever reads an unread slot must see that the adapter lacks it
                adapter_value = binding.values.get(fqn)
                padded[fqn] = self._slot_value(s, name, adapter_value if name in specs else None, binding)
            if a.scale_slot is not None:
                padded[a.scale_slot] = self._scale_value(a, binding)
        unpackaged = sorted(set(binding.changed_base) - set(self.manifest.bases))
        if unpackaged:
            raise SwapError(f"{binding.source}: the adapter changes {unpackaged[0]!r}, which is fixed in the package")
        for fqn in self.manifest.bases:
            padded[fqn] = (
                binding.changed_base.get(fqn, self.stored_tensors[f"base.{fqn}"]).detach().to(self.shapes[fqn][1])
            )
        adapter_storages = {memory_address(t) for t in (*binding.values.values(), *binding.changed_base.values())}
        tensors: dict[str, Tensor] = {}
        for fqn, value in padded.items():
            own_value = value.to(self.device)
            tensors[fqn] = own_value.clone() if memory_address(own_value) in adapter_storages else own_value
        constants, values = self._split_unused(tensors)
        kept_fields: dict[str, Any] = {n: getattr(binding, n) for n in ("name", "source", "origin", "scale_factors")}
        rest = Binding(values, binding.methods, binding.config, **kept_fields)
        return PackagedBinding(**vars(rest), constants=constants, owner_token=owner_token)

    def _split_unused(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return two mappings: the tensors that the code has constants for, and the others."""
        unread = {f: t for f, t in tensors.items() if f in self._unused_slots}
        return {f: t for f, t in tensors.items() if f not in unread}, unread

    def base_binding(self, like: Binding) -> Binding:
        """Return a binding without an adapter at any site, with the config of ``like``."""
        scales = {s.attachment.scale_slot: s.attachment.method.scale(s.op) for s in self.manifest.sites}
        values = {f: torch.tensor(float(v or 0)) for f, v in scales.items() if f is not None}
        return Binding(values, {}, like.config, source="the base")

    def _scale_value(self, a: Attachment, binding: Binding) -> Tensor:
        assert a.scale_slot is not None
        if a.scale_slot not in binding.values:
            raise SwapError(f"{binding.source}: the binding has no value for {a.scale_slot!r}; bind to this program")
        return binding.values[a.scale_slot].detach().to(self.manifest.rooms[a.scale_slot].dtype)

    def _slot_value(self, s: StoredSite, slot: str, adapter_value: Tensor | None, binding: Binding) -> Tensor:
        fqn = s.attachment.slots[slot]
        capacity = self.manifest.rooms[fqn]
        if adapter_value is not None:
            value = self._pad_value(s, slot, adapter_value.detach().to(capacity.dtype), capacity, binding)
            if not value.is_floating_point() or bool(torch.isfinite(value).all()):
                return value
            if s.attachment.method.slots(s.op)[slot].saved:
                raise CheckpointError(
                    f"{binding.source}: {slot!r} at {s.attachment.fqn!r} is not finite in {capacity.dtype}, the dtype "
                    "of the package; package with a wider adapter dtype"
                )
        if capacity.identity is not None:  # expanded, so it takes the memory of one element
            return torch.full((), capacity.identity, dtype=capacity.dtype, device=self.device).expand(capacity.shape)
        if f"identity.{fqn}" not in self.stored_tensors:
            raise SwapError(
                f"{binding.source}: the adapter has nothing at {s.attachment.fqn!r}, and the package does not know "
                f"which {slot!r} leaves that site at the base"
            )
        return self.stored_tensors[f"identity.{fqn}"]

    def _pad_value(self, s: StoredSite, slot: str, value: Tensor, capacity: SlotCapacity, binding: Binding) -> Tensor:
        shape = tuple(value.shape)
        if shape == capacity.shape or capacity.unread:  # binding has checked the shape of an unread slot by its method
            return value
        if capacity.padding is not None and capacity.padding.can_pad(shape, capacity.shape):
            return capacity.padding(value, capacity.shape)
        fqn = s.attachment.fqn
        rank, max_rank = binding.methods[s.attachment.id].sizes.rank(), self.rank_capacity(s)
        has_exact_sizes = s.attachment.method.sizes.exact
        if not has_exact_sizes and rank is not None and max_rank is not None and rank > max_rank:
            raise SwapError(
                f"{binding.source}: site {fqn!r}: the adapter has rank {rank}, and the package has room for "
                f"{max_rank}; package again with max_rank={rank}"
            )
        raise SwapError(
            f"{binding.source}: site {fqn!r}: slot {slot!r} has shape {shape}, and the compiled code takes "
            f"{capacity.shape} alone; package the program with this adapter"
        )


def _constant_shapes(m: Manifest, tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Return FQN -> shape and dtype of each slot, scale and base weight that adapters fill.

    In a bank an axis of adapters comes first. Raises UnsafeFile where a base weight is missing in ``tensors``.
    """
    bank_axis = () if m.bank is None else (m.bank["count"],)
    out: dict[str, Shape] = {fqn: ((*bank_axis, *room.shape), room.dtype) for fqn, room in m.rooms.items()}
    for fqn in m.bases:
        if f"base.{fqn}" not in tensors:
            raise UnsafeFile(f"the tensor 'base.{fqn}' is missing")
        base = tensors[f"base.{fqn}"]
        out[fqn] = tuple(base.shape), base.dtype
    return out


def rank_of_members(
    attachments: Sequence[Attachment], current: Binding | None, members: Mapping[str, Binding]
) -> int | None:
    """Return the largest rank of all adapters, or None where a program with ``current`` has room for ``members``."""
    own: Mapping[str, Method] = {} if current is None else current.methods
    room = {a.id: max(_rank(a.method), _rank(own.get(a.id))) for a in attachments}
    largest = max((_rank(m) for member in members.values() for m in member.methods.values()), default=0)
    has_room = all(_rank(m) <= room[site] for member in members.values() for site, m in member.methods.items())
    return None if has_room else max([largest, *room.values()])


def _rank(method: Method | None) -> int:
    return 0 if method is None else method.sizes.rank() or 0


def check_members(
    manifest: Manifest, tensors: Mapping[str, Tensor], path: Path, members: Mapping[str, Binding]
) -> None:
    """Raise the error of a later swap, with the name, for an adapter that the code will have no room for."""
    if members:
        padder = AdapterPadder(manifest, dict(tensors), torch.device(manifest.device), path)
        for name, member in members.items():
            with errors_name(name):
                padder.check_base(member.config)
                padder.pad(member, None)
