"""Run a packaged program, and swap its adapters.

Before: a file that ``adaptc.package`` wrote. After a swap: every slot of the compiled code holds the new adapter's
values, padded to its shape, or, when the adapter was refused, nothing has changed. The compiled code checks no shapes
itself and would read past the end of a tensor, so all is checked before it sees anything.

Private torch use, with the public route that was tried:
- ``loader`` of the loaded package: calling the package itself parses its tree specs anew each time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.binding.bind import joined
from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.foreign import translated
from adaptc.binding.recipes import Recipes
from adaptc.binding.source import as_binding, as_config, from_dict
from adaptc.errors import AdaptcError, BackendError, CheckpointError, SwapError
from adaptc.methods import AdapterConfig
from adaptc.packages import manifest as _package_file
from adaptc.packages.manifest import Input, Room, Site
from adaptc.passes.ir.exclusive import GRAPHS
from adaptc.passes.ir.trees import pytree
from adaptc.patterns import limited
from adaptc.peft_files.directory import AdapterFile
from adaptc.peft_files.raw import RawFile, read_any
from adaptc.program.adaptation import Adaptation
from adaptc.pt2_files.containers import check_registered, read_tree
from adaptc.pt2_files.refusal import Refused, shown_path
from adaptc.reports.results import SwapReport
from adaptc.runtime.call_inputs import Inputs
from adaptc.runtime.layouts import laid
from adaptc.value_types import checked


class PackagedProgram:
    """A file written by ``adaptc.package``: call it like the program it was made from, and ``swap`` adapters on it.

    Swap while no call is running: the code reads the tensors that a swap writes to.

    A package is machine code, which runs as it is loaded: load only those whose author you trust. What is checked
    first, by the hashes in its manifest, is that the file is as it was written.

    Raises CheckpointError when the file is missing, damaged, changed or of another kind, BackendError when it was
    packaged without adaptc or its code does not run on this machine.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._manifest, tensors = _package_file.read(self.path)
        m = self._manifest
        # Where only an adapter's own version of the base was known, no other adapter may be bound to it.
        residual = [fqn for fqn in m.header.get("residual", ()) if fqn not in m.bases]
        with _package_file.refusing(self.path):  # all that the manifest says, before any code is loaded
            self.device = torch.device(m.device)
            self.adaptation = Adaptation([s.attachment for s in m.sites], fills=m.header["fills"], residual=residual)
            self.ops = {s.attachment.id: s.op for s in m.sites}
            self.recipes = Recipes(self.adaptation.attachments, self.ops)
            self.current = self._first_binding() if m.sites else None
        self._model = self._load()
        missing = sorted({*m.rooms, *m.bases} - set(self._model.get_constant_fqns()))
        if missing:
            raise BackendError(f"{self.path}: the compiled code has no constant {missing[0]!r}; package it again")
        self._stored = {k: t.to(self.device) for k, t in tensors.items()}
        self._buffers: dict[str, Tensor] = {}
        specs = self._model.loader.get_call_spec()
        _check_specs(self.path, specs)
        expected = [(i.name, i.constant if i.tensor is None else i.tensor) for i in m.inputs]
        spec, takes = pytree.treespec_loads(specs[0]), m.header.get("takes", ())
        self._inputs = Inputs(spec, m.header["fills"], expected, m.ranges, m.guards, takes)
        self._out_spec = pytree.treespec_loads(specs[1])

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AdaptcError(
            f"a package that is loaded can be neither copied nor pickled: load {self.path} once more, with "
            "adaptc.load_package"
        )

    def _load(self) -> Any:
        from torch._inductor import aoti_load_package

        try:
            with GRAPHS, tempfile.TemporaryDirectory() as folder:
                # torch takes a name of UTF-8 alone, which a folder above the file may not have.
                link = Path(folder, "package.pt2")
                link.symlink_to(self.path.absolute())
                return aoti_load_package(str(link))
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BackendError(
                f"{self.path} does not load here: {first}. It was compiled by torch {self._manifest.torch} for "
                f"{self._manifest.device}, and this is torch {torch.__version__}; package the program again on a "
                "machine like this one."
            ) from error

    def _first_binding(self) -> Binding:
        header, present = self._manifest.header, set(self._manifest.header["present"])
        config = from_dict(header["config"])
        ops = self.ops
        found = [a for a in self.adaptation.attachments if a.id in present]
        methods = {a.id: a.method.rebind(config, a).at(ops[a.id]) for a in found}
        return Binding({}, joined(methods, ops), config, source=str(self.path))

    @property
    def ranks(self) -> dict[str, int]:
        """The largest rank an adapter may have at each site that has one, by the FQN of the site's parameter."""
        out: dict[str, int] = {}
        for s in self._manifest.sites:
            shapes = {
                n: torch.empty(self._manifest.rooms[f].shape, device="meta") for n, f in s.attachment.slots.items()
            }
            rank = s.attachment.method.with_sizes_of(s.op, shapes).rank()
            if rank is not None:
                out[s.attachment.fqn] = rank
        return out

    @property
    def binding(self) -> Binding:
        """The current adapter's config and methods; its values are in the compiled code."""
        if self.current is None:
            raise AdaptcError(f"{self.path} has no adapter; it was packaged from a merged or unloaded program")
        return self.current

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the current adapter; inputs and output type are those of the program that was packaged."""
        flat = self._inputs(args, kwargs)
        tensors = [
            self._arranged(v, i) for v, i in zip(flat, self._manifest.inputs, strict=True) if i.tensor is not None
        ]
        with torch.no_grad():
            out = self._model.loader.boxed_run(tensors)
        return pytree.tree_unflatten(out, self._out_spec)

    def _arranged(self, value: Tensor, want: Input) -> Tensor:
        """In the memory layout of the example inputs, which the code takes for granted."""
        if value.device.type != self.device.type:
            raise AdaptcError(f"input {want.name!r} is on {value.device}, and the package runs on {self.device}")
        return laid(value, want.order)

    @checked("adapter_name", "key_mapping", "component")
    @limited()
    def swap(
        self,
        adapter: Any,
        *,
        config: Any = None,
        adapter_name: str | None = None,
        key_mapping: Mapping[str, str] | None = None,
        component: str | None = None,
    ) -> SwapReport:
        """Make ``adapter`` the current one; arguments and report are those of ``adaptc.swap``.

        The names of modules that a package knows are those of its sites.

        Sites of which the adapter has no tensors become the base. Raises SwapError for an adapter of too large a rank,
        for one that needs other sites, and for one that changes the base weights (PiSSA, OLoRA), and CheckpointError
        for damaged files, wrong shapes and values that are not finite; the current adapter then stays.
        """
        if self.current is None:
            raise SwapError(
                f"{self.path} has no adapter sites; it was packaged from a merged or unloaded program. Package the "
                "adapted program itself to swap."
            )
        if isinstance(adapter, (str, PathLike)):  # once, so that what is checked is what is bound
            adapter = read_any(adapter, adapter_name=adapter_name, key_mapping=key_mapping)
            key_mapping = adapter_name = None
        if isinstance(adapter, RawFile):
            theirs = None if config is None else as_config(config)
            adapter = translated(adapter, self.spec().weights, component=component, config=theirs)
            component = config = None
        self._check_base(adapter, config)
        binding = as_binding(  # what is installed is copied
            self,
            adapter,
            config=config,
            adapter_name=adapter_name,
            key_mapping=key_mapping,
            component=component,
            own=False,
        )
        self._install(self._fitted(binding))
        self.current = Binding(
            {}, binding.methods, binding.config, name=binding.name, source=binding.source, origin=binding.origin
        )
        return SwapReport.of(self.adaptation.attachments, binding)

    def spec(self, trainable: bool = False) -> BindingSpec:
        """What ``adaptc.binding`` fills. Base weights that are not in the file are NaN, and so is all made of them."""
        weights: dict[str, Tensor] = {}
        for s in self._manifest.sites:
            fqn = s.attachment.fqn
            nothing = torch.tensor(float("nan") if s.dtype.is_floating_point else 0, device=self.device).to(s.dtype)
            weights[fqn] = self._stored.get(f"base.{fqn}", nothing.expand(s.shape))
        a = self.adaptation
        autocast = self._manifest.header["autocast"]
        return BindingSpec(a.attachments, self.ops, weights, autocast, trainable, residual=a.residual)

    def _check_base(self, adapter: Any, config: Any) -> None:
        """Refuse adapters whose slots go with a changed base, unless the base is in the file."""
        own: AdapterConfig
        if isinstance(adapter, Binding):
            return
        if config is not None:
            own = as_config(config)
        elif isinstance(adapter, Mapping):
            own = self.binding.config
        elif isinstance(adapter, AdapterFile):
            own = from_dict(adapter.config)
        else:
            return  # it is no adapter, which binding it says
        for a in self.adaptation.attachments:
            if a.method.rebind(own, a).moves_base() and a.fqn not in self._manifest.bases:
                raise SwapError(
                    f"an adapter of this {type(own).__name__} changes the base weight {a.fqn!r} by its first values, "
                    "and the package does not hold the base. Package the program with such an adapter as its current "
                    "one, or convert the adapter to plain LoRA with PEFT's "
                    "save_pretrained(path_initial_model_for_weight_conversion=...)."
                )

    def _fitted(self, binding: Binding) -> dict[str, Tensor]:
        """A value of exactly the right shape and dtype for every constant that a swap sets."""
        out: dict[str, Tensor] = {}
        # Sites that the adapter has come first: a slot they share with one it has not is theirs.
        for s in sorted(self._manifest.sites, key=lambda s: s.attachment.id not in binding.methods):
            a = s.attachment
            own = binding.methods.get(a.id)
            specs = {} if own is None else own.slots(s.op)
            for name, fqn in a.slots.items():
                if fqn not in out:
                    given = binding.values.get(fqn)
                    out[fqn] = self._value(s, name, given if name in specs else None, binding)
            if a.scale_slot is not None:
                if a.scale_slot not in binding.values:
                    raise SwapError(
                        f"{binding.source}: the binding has no value for {a.scale_slot!r}; bind to this program"
                    )
                out[a.scale_slot] = binding.values[a.scale_slot].to(self._manifest.rooms[a.scale_slot].dtype)
        strange = sorted(set(binding.base) - set(self._manifest.bases))
        if strange:
            raise SwapError(f"{binding.source}: the adapter changes {strange[0]!r}, which is fixed in the package")
        for fqn in self._manifest.bases:
            out[fqn] = binding.base.get(fqn, self._stored[f"base.{fqn}"]).detach()
        return {k: v.to(self.device).contiguous() for k, v in out.items()}

    def _value(self, s: Site, slot: str, given: Tensor | None, binding: Binding) -> Tensor:
        fqn = s.attachment.slots[slot]
        room = self._manifest.rooms[fqn]
        if given is not None:
            value = self._padded(s, slot, given.detach().to(room.dtype), room, binding)
            if not value.is_floating_point() or bool(torch.isfinite(value).all()):
                return value
            if s.attachment.method.slots(s.op)[slot].saved:
                raise CheckpointError(
                    f"{binding.source}: {slot!r} at {s.attachment.fqn!r} is not finite in {room.dtype}, the dtype of "
                    "the package; package with a wider adapter dtype"
                )
        if room.identity is not None:
            return torch.full(room.shape, room.identity, dtype=room.dtype, device=self.device)
        if f"identity.{fqn}" not in self._stored:
            raise SwapError(
                f"{binding.source}: the adapter has nothing at {s.attachment.fqn!r}, and the package does not know "
                f"which {slot!r} leaves that site at the base"
            )
        return self._stored[f"identity.{fqn}"]

    def _padded(self, s: Site, slot: str, value: Tensor, room: Room, binding: Binding) -> Tensor:
        shape = tuple(value.shape)
        if shape == room.shape:
            return value
        if room.padding is not None and room.padding.fits(shape, room.shape):
            return room.padding(value, room.shape)
        fqn = s.attachment.fqn
        rank, room_rank = binding.methods[s.attachment.id].rank(), self.ranks.get(fqn)
        if rank is not None and room_rank is not None and rank > room_rank:
            raise SwapError(
                f"{binding.source}: site {fqn!r}: the adapter has rank {rank}, and the package has room for "
                f"{room_rank}; package again with max_rank={rank}"
            )
        raise SwapError(
            f"{binding.source}: site {fqn!r}: slot {slot!r} has shape {shape}, and the compiled code takes "
            f"{room.shape} alone; package the program with this adapter"
        )

    def _install(self, values: Mapping[str, Tensor]) -> None:
        """The code gets tensors of ours to read once, and later swaps write to them: torch keeps what
        ``load_constants(user_managed=True)`` replaces alive for ever, so a fresh set per swap would leak."""
        if self._buffers:
            for fqn, value in values.items():
                self._buffers[fqn].copy_(value)
            return
        buffers = {fqn: value.clone(memory_format=torch.contiguous_format) for fqn, value in values.items()}
        self._model.load_constants(buffers, check_full_update=False, user_managed=True)
        self._buffers = buffers

    def __repr__(self) -> str:
        adapter = "no adapter sites" if self.current is None else f"adapter {self.current.source!r}"
        return f"PackagedProgram({str(self.path)!r}, {len(self._manifest.sites)} sites, {adapter})"


def _check_specs(path: Path, specs: list[str]) -> None:
    """Check the trees of inputs and outputs, and import the types of transformers in them, which registers them."""
    try:
        check_registered({name for spec in specs for name in read_tree(spec).types})
    except Refused as error:
        raise BackendError(f"{shown_path(path)}: {error}") from error
