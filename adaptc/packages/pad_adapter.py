"""Fit adapters to a package: pad their values to the shapes of its constants, in their dtypes, on its device.

:meth:`Fit.fitted` gives a value for every constant that adapters fill, or raises and changes nothing. The compiled code
checks no shapes itself and would read past the end of a tensor, so shapes are checked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.binding.bind import joined
from adaptc.binding.binding import Binding
from adaptc.binding.sources.source import from_dict
from adaptc.errors import CheckpointError, SwapError
from adaptc.methods import AdapterConfig
from adaptc.packages.constants import Fitted
from adaptc.packages.manifest import Manifest, PackagedSite, Room
from adaptc.passes.graph.storage import memory_of
from adaptc.passes.protocol.attachment import Attachment
from adaptc.safe_pt2.refusal import UnsafeFile

Shape = tuple[tuple[int, ...], torch.dtype]


def member_key(place: int, fqn: str) -> str:
    """Return the name in the file of a slot that no code reads, of the adapter at a place of a bank."""
    return f"member.{place}.{fqn}"


class Fit:
    """The fit of adapters to one package, from its manifest and the ``tensors`` of its file.

    ``path`` is the file, for messages. Raises UnsafeFile where a tensor is missing, or of another shape or dtype.
    """

    def __init__(self, manifest: Manifest, tensors: Mapping[str, Tensor], device: torch.device, path: Path) -> None:
        self.manifest, self.device, self.path = manifest, device, path
        shapes = _shapes(manifest, tensors)
        self._unread = frozenset(f for f, room in manifest.rooms.items() if room.unread)
        #: FQN -> shape and dtype of each constant of the compiled code that adapters fill
        self.shapes = {f: shape for f, shape in shapes.items() if f not in self._unread}
        kept = shapes if manifest.bank is None else self.shapes
        current = {f: tensors.get(f"current.{f}") for f in kept}
        for fqn, value in current.items():
            if value is None or (tuple(value.shape), value.dtype) != shapes[fqn]:
                raise UnsafeFile(f"the tensor 'current.{fqn}' is missing, or of another shape or dtype")
        #: the values the code was compiled with
        self._first = {f: t.to(device) for f, t in current.items() if t is not None}
        self.stored = {k: t.to(device) for k, t in tensors.items() if not k.startswith("current.")}
        for place in range(0 if manifest.bank is None else len(manifest.bank["names"])):
            for fqn, value in self.member(place).items():
                room = manifest.rooms[fqn]
                if (value.ndim, value.dtype) != (len(room.shape), room.dtype):
                    raise UnsafeFile(f"the tensor {member_key(place, fqn)!r} is of another shape or dtype")

    def first(self, owner: object) -> Fitted:
        """Return the adapter that the package was made with. It may be called once: the values are not kept here."""
        m = self.manifest
        present, config = set(m.header["present"]), from_dict(m.header["config"])
        ops = {s.attachment.id: s.op for s in m.sites}
        found = [s.attachment for s in m.sites if s.attachment.id in present]
        methods = joined({a.id: a.method.rebind(config, a).at(ops[a.id]) for a in found}, ops)
        (constants, values), self._first = self._apart(self._first), {}
        factors = {site: f for site, f in m.header.get("factors", {}).items() if site in present}
        name = m.sites[0].attachment.adapter
        own = Binding(values, methods, config, name=name, source=str(self.path), factors=factors)
        return Fitted(**vars(own), constants=constants, owner=owner)

    def member(self, place: int) -> dict[str, Tensor]:
        """Return the slots that no code reads, by FQN, of the adapter that a bank was packaged with at ``place``."""
        found = {fqn: self.stored.get(member_key(place, fqn)) for fqn in self._unread}
        return {fqn: value for fqn, value in found.items() if value is not None}

    def ranks(self) -> dict[str, int]:
        """Return the largest rank that there is room for at each site with a rank, by the FQN of its parameter."""
        found = {s.attachment.fqn: self.room_for_rank(s) for s in self.manifest.sites}
        return {fqn: rank for fqn, rank in found.items() if rank is not None}

    def room_for_rank(self, s: PackagedSite) -> int | None:
        rooms = self.manifest.rooms
        shapes = {n: torch.empty(rooms[f].shape, device="meta") for n, f in s.attachment.slots.items()}
        return s.attachment.method.with_sizes_of(s.op, shapes).rank()

    def check_base(self, own: AdapterConfig) -> None:
        """Raise SwapError for an adapter of config ``own`` that changes base weights which the file does not hold."""
        for s in self.manifest.sites:
            a = s.attachment
            if a.method.rebind(own, a).moves_base() and a.fqn not in self.manifest.bases:
                raise SwapError(
                    f"an adapter of this {type(own).__name__} changes the base weight {a.fqn!r} by its first values, "
                    "and the package does not hold the base. Package the program with such an adapter as its current "
                    "one, or convert the adapter to plain LoRA with PEFT's "
                    "save_pretrained(path_initial_model_for_weight_conversion=...)."
                )

    def fitted(self, binding: Binding, owner: object) -> Fitted:
        """Return ``binding`` as the compiled code takes it, in memory of its own.

        Raises SwapError for a rank above the room there is, and for changed base weights that are fixed in the package.
        Raises CheckpointError for values that are not finite in the package's dtype.
        """
        out: dict[str, Tensor] = {}
        # Sites that the adapter has come first: a slot that they share with a site it lacks gets their value.
        for s in sorted(self.manifest.sites, key=lambda s: s.attachment.id not in binding.methods):
            a = s.attachment
            own = binding.methods.get(a.id)
            specs = {} if own is None else own.slots(s.op)
            for name, fqn in a.slots.items():
                if fqn in out or (fqn in self._unread and name not in specs):
                    continue  # left out: whoever reads an unread slot must see that the adapter lacks it
                given = binding.values.get(fqn)
                out[fqn] = self._value(s, name, given if name in specs else None, binding)
            if a.scale_slot is not None:
                out[a.scale_slot] = self._scale(a, binding)
        strange = sorted(set(binding.base) - set(self.manifest.bases))
        if strange:
            raise SwapError(f"{binding.source}: the adapter changes {strange[0]!r}, which is fixed in the package")
        for fqn in self.manifest.bases:
            out[fqn] = binding.base.get(fqn, self.stored[f"base.{fqn}"]).detach().to(self.shapes[fqn][1])
        theirs = {memory_of(t) for t in (*binding.values.values(), *binding.base.values())}
        made = {}
        for fqn, value in out.items():
            own_value = value.to(self.device)
            made[fqn] = own_value.clone() if memory_of(own_value) in theirs else own_value
        constants, values = self._apart(made)
        same: dict[str, Any] = {n: getattr(binding, n) for n in ("name", "source", "origin", "factors")}
        bare = Binding(values, binding.methods, binding.config, **same)
        return Fitted(**vars(bare), constants=constants, owner=owner)

    def _apart(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return two mappings: the tensors that the code has constants for, and the others."""
        unread = {f: t for f, t in tensors.items() if f in self._unread}
        return {f: t for f, t in tensors.items() if f not in unread}, unread

    def nothing(self, like: Binding) -> Binding:
        """Return a binding without an adapter at any site, with the config of ``like``."""
        scales = {s.attachment.scale_slot: s.attachment.method.scale(s.op) for s in self.manifest.sites}
        values = {f: torch.tensor(float(v or 0)) for f, v in scales.items() if f is not None}
        return Binding(values, {}, like.config, source="the base")

    def _scale(self, a: Attachment, binding: Binding) -> Tensor:
        assert a.scale_slot is not None
        if a.scale_slot not in binding.values:
            raise SwapError(f"{binding.source}: the binding has no value for {a.scale_slot!r}; bind to this program")
        return binding.values[a.scale_slot].detach().to(self.manifest.rooms[a.scale_slot].dtype)

    def _value(self, s: PackagedSite, slot: str, given: Tensor | None, binding: Binding) -> Tensor:
        fqn = s.attachment.slots[slot]
        room = self.manifest.rooms[fqn]
        if given is not None:
            value = self._padded(s, slot, given.detach().to(room.dtype), room, binding)
            if not value.is_floating_point() or bool(torch.isfinite(value).all()):
                return value
            if s.attachment.method.slots(s.op)[slot].saved:
                raise CheckpointError(
                    f"{binding.source}: {slot!r} at {s.attachment.fqn!r} is not finite in {room.dtype}, the dtype of "
                    "the package; package with a wider adapter dtype"
                )
        if room.identity is not None:  # expanded, so it takes the memory of one element
            return torch.full((), room.identity, dtype=room.dtype, device=self.device).expand(room.shape)
        if f"identity.{fqn}" not in self.stored:
            raise SwapError(
                f"{binding.source}: the adapter has nothing at {s.attachment.fqn!r}, and the package does not know "
                f"which {slot!r} leaves that site at the base"
            )
        return self.stored[f"identity.{fqn}"]

    def _padded(self, s: PackagedSite, slot: str, value: Tensor, room: Room, binding: Binding) -> Tensor:
        shape = tuple(value.shape)
        if shape == room.shape or room.unread:  # binding has checked the shape of an unread slot by its method
            return value
        if room.padding is not None and room.padding.fits(shape, room.shape):
            return room.padding(value, room.shape)
        fqn = s.attachment.fqn
        rank, room_rank = binding.methods[s.attachment.id].rank(), self.room_for_rank(s)
        fixed = s.attachment.method.exact_sizes
        if not fixed and rank is not None and room_rank is not None and rank > room_rank:
            raise SwapError(
                f"{binding.source}: site {fqn!r}: the adapter has rank {rank}, and the package has room for "
                f"{room_rank}; package again with max_rank={rank}"
            )
        raise SwapError(
            f"{binding.source}: site {fqn!r}: slot {slot!r} has shape {shape}, and the compiled code takes "
            f"{room.shape} alone; package the program with this adapter"
        )


def _shapes(m: Manifest, tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Return FQN -> shape and dtype of each slot, scale and base weight that adapters fill.

    In a bank an axis of adapters comes first. Raises UnsafeFile where a base weight is missing in ``tensors``.
    """
    front = () if m.bank is None else (m.bank["count"],)
    out: dict[str, Shape] = {fqn: ((*front, *room.shape), room.dtype) for fqn, room in m.rooms.items()}
    for fqn in m.bases:
        if f"base.{fqn}" not in tensors:
            raise UnsafeFile(f"the tensor 'base.{fqn}' is missing")
        base = tensors[f"base.{fqn}"]
        out[fqn] = tuple(base.shape), base.dtype
    return out
