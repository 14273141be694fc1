"""Compile a program ahead of time into one file whose adapters can still be swapped.

:func:`package_program` compiles with AOTInductor and keeps every slot as a named constant of a fixed shape. Slots are
padded to a capacity, so that adapters of any rank up to it fit. With the adapter it was packaged with, the file needs
neither the model nor adaptc to run (``torch._inductor.aoti_load_package``). ``packages.packaged_program`` runs it and
swaps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from adaptc.adapter_files.atomic_write import replacing
from adaptc.binding.binding import Binding
from adaptc.errors import BackendError, CheckpointError, ConfigError, shown
from adaptc.packages import manifest as _package_file
from adaptc.packages.compiling import code_folder, compiled
from adaptc.packages.cpp_slot_table import ENTRY, slot_table
from adaptc.packages.manifest import WHOLE, Contents, Input, Manifest, PackagedSite, PartOf, Room
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.packages.unused_slots import take_out, unread
from adaptc.packages.zero_sizes import nonzero_conditions
from adaptc.passes.adapt.respecialize import Respecialize
from adaptc.passes.analysis.index_bounds import index_bounds
from adaptc.passes.graph.graph_lock import exclusive
from adaptc.passes.graph.lifted import Lifted
from adaptc.passes.graph.subprogram import part_of
from adaptc.passes.lower.choose_products import ChooseProducts, Products
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Slot
from adaptc.passes.protocol.program_method import ProgramMethod
from adaptc.passes.train.set_mode import SetMode
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.progress import stage
from adaptc.runtime.added_lengths import Lengths
from adaptc.runtime.calls.call_inputs import Inputs
from adaptc.runtime.mutated_buffers import written_to
from adaptc.runtime.rank_padding import Padding, paddings
from adaptc.state.core import ProgramCore
from adaptc.tuning.compiled_matmuls import choose_packaged
from adaptc.tuning.matmul_table import wanted

__all__ = ["PackagedProgram", "package_program"]

PRODUCTS = ("measured", "plain")


@exclusive
def package_program(
    program: AdaptedProgram,
    path: Path,
    *,
    max_rank: int | None = None,
    products: str = "measured",
    carried: Mapping[str, bytes] | None = None,
    parts: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Compile ``program``, with its current adapter, into the file ``path`` (``.pt2``) and return ``path``.

    ``max_rank`` is the largest rank that later swaps may have, at every site. By default each site keeps the larger of
    its current rank and the one it was compiled with. Larger slots cost memory and time. ``carried`` maps paths in the
    package to the bytes of files that adaptc does not read. ``parts`` divides the program into parts that share no
    computation: it maps the name of each, in small letters, to its outputs. Each is a model of its own in the file.

    ``program`` is not changed. A merged or unloaded program gives a package without slots. The file is machine code,
    which runs when somebody loads it: it is for those who trust you.

    ``products`` says what computes the base's float32 layers. With "measured", oneDNN computes those that it computes
    faster on this machine; the report of the package says which, and why. That is right on other machines too, if not
    the fastest there. "plain" leaves them all to torch, as ``ADAPTC_PRODUCTS=plain`` does.

    Raises ConfigError for a ``max_rank`` that is too small or cannot be had, and for other values of ``products``. It
    raises ConfigError, too, for a program whose adapter is off or one of several. Raises BackendError where the program
    cannot be compiled, as without a C++ compiler. Raises CheckpointError where the file cannot be written. ``path`` is
    then as it was.
    """
    if not isinstance(program, AdaptedProgram):
        raise ConfigError(f"package takes what adaptc.compile or adaptc.load gives, not a {type(program).__name__}")
    program = program.snapshot()
    check_target(path, max_rank, products)
    if program.current is not None and program.current.parts:
        raise ConfigError(
            f"a package holds one adapter at a time, and here {list(program.current.parts)} act together; merge() the "
            "program to package them for good, or compile it for one of them"
        )
    if program.current is not None and (off := program.current.off):
        raise ConfigError(
            f"a package is made with an adapter that acts, and {off[0]!r} is off: program.set_active({off[0]!r}) first"
        )
    if program.example_inputs is None:
        raise BackendError("the program has no example inputs, which compiling needs; capture it with torch.export")
    with stage("preparing the program for its package"):
        frozen, manifest, tensors = Packer(program, max_rank, products).run()
    models = {WHOLE: frozen}
    if parts:
        models = {name: part_of(frozen, outputs) for name, outputs in parts.items()}
        manifest = replace(manifest, parts={n: _part(model, manifest, parts[n]) for n, model in models.items()})
    return write_package(path, models, manifest, tensors, carried or {})


def check_target(path: Path, max_rank: int | None, products: str) -> None:
    """Raise CheckpointError for a path where no package can be written, ConfigError for options of other values."""
    if path.suffix != ".pt2" or not path.parent.is_dir():
        raise CheckpointError(f"cannot package to {path}: the name must end in .pt2 and its directory must exist")
    if max_rank is not None and (not isinstance(max_rank, int) or isinstance(max_rank, bool) or max_rank < 1):
        raise ConfigError(f"max_rank must be a positive integer, got {max_rank!r}")
    if not isinstance(products, str) or products not in PRODUCTS:
        raise ConfigError(f"products={shown(products)} is not one of {', '.join(PRODUCTS)}")


def write_package(
    path: Path,
    models: Mapping[str, ExportedProgram],
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    carried: Mapping[str, bytes],
) -> Path:
    """Compile programs and write a package of them to ``path``, which is as it was where that fails.

    The manifest, ``tensors`` and the files ``carried`` lie beside the code. Raises CheckpointError where the file
    cannot be written.
    """
    tables: dict[str, dict[str, str]] = {name: {} for name in models}
    if manifest.bank is None:  # the table describes the slots of a single adapter
        tables = {n: {ENTRY: slot_table(_seen_from(m, n, manifest))} for n, m in models.items()}
    try:
        # Both lie beside the target, on a disk that must have room for the package anyway.
        with replacing(path, "new.pt2") as new, code_folder(new) as code:
            compiled(models, code, new, tables)
            with stage(f"writing the package {path.name}"):
                _package_file.write(new, Contents(manifest, tensors, carried))
    except OSError as error:
        raise CheckpointError(f"could not write {path}: {error}. What was there before is unchanged.") from error
    return path


class Packer:
    """The contents of one package in the making: a program with padded slots, its manifest, and its tensors.

    ``rooms`` maps the FQN of a slot to its room in the compiled code, and ``values`` to its padded value. ``tensors``
    are those of the file: the current adapter, base weights that adapters replace, and identity values.
    """

    def __init__(self, program: ProgramCore, max_rank: int | None, products: str) -> None:
        self.program, self.max_rank, self.products = program, max_rank, products
        self.binding: Binding | None = program.current
        self.attachments = program.adaptation.attachments if self.binding is not None else ()
        self.spec = program.spec()
        self.rooms: dict[str, Room] = {}
        self.values: dict[str, Tensor] = {}
        self.tensors: dict[str, Tensor] = {}
        self.unread: frozenset[str] = frozenset()
        self._paddings: dict[Any, dict[str, Padding] | None] = {}

    def run(self) -> tuple[ExportedProgram, Manifest, dict[str, Tensor]]:
        self.unread = unread(self.program, [f for a in self.attachments for f in a.tensor_names])
        for a in self.attachments:
            self.site(a)
        if self.max_rank is not None and not any(r.padding for r in self.rooms.values()):
            raise ConfigError(f"max_rank={self.max_rank} was given, but no site of the program has a rank to pad")
        binding, program, adaptation = self.binding, self.program, self.program.adaptation
        bases = [] if binding is None else list(binding.base)
        self.tensors |= {f"base.{fqn}": self.program.base_tensors[fqn] for fqn in bases}
        # Calls with other adapters write over the code's constants, and the current adapter must come back.
        current = {} if binding is None else {**self.values, **binding.base}
        self.tensors |= {f"current.{fqn}": value for fqn, value in current.items()}
        inputs = adaptation.inputs(program)
        if binding is None:
            header = {"fills": dict(adaptation.fills), "takes": list(inputs.takes)}
        else:
            header = adaptation.header(binding)
        sites = [
            PackagedSite(a, program.ops[a.id], tuple(w.shape), w.dtype)
            for a in self.attachments
            for w in [self.base(a)]
        ]
        flat, guards = self.inputs(program, inputs), list(inputs.guards)
        # Virtual tokens are as many as in the packaged adapter, so they shorten what a caller may give.
        longer = Lengths.of(program.graph, self.attachments).in_binding(self.values)
        ranges = {s: (low, high - longer.get(s, 0)) for s, (low, high) in inputs.ranges.items()}
        frozen, chosen = self._frozen()
        flat = bounded(flat, frozen)
        guards += nonzero_conditions(frozen, inputs)
        manifest = Manifest(self.device(), header, flat, ranges, sites, self.rooms, bases, guards, chosen.data())
        return frozen, manifest, self.tensors

    def base(self, a: Attachment) -> Tensor:
        return self.spec.weights[a.fqn]

    def device(self) -> str:
        tensors = (t for t in self.program.state_dict.values() if isinstance(t, Tensor))
        return next((t.device.type for t in tensors), "cpu")

    def site(self, a: Attachment) -> None:
        assert self.binding is not None
        op = self.program.ops[a.id]
        identity = a.method.identity(op, self.spec.canonical(a), self.spec.dtype(a))
        shapes = self._capacity(a)
        for name, spec in a.method.slots(op).items():
            fqn = a.slots[name]
            if fqn in self.rooms:  # shared with a site that has been
                continue
            value, padding, shape = self.binding.values[fqn].detach(), self.padding(a, name), shapes[name]
            if fqn in self.unread:
                self._beside(fqn)
                continue
            # No uniform value turns a program method off: virtual tokens act whatever their values are.
            constant = None if isinstance(a.method, ProgramMethod) else _uniform(identity[name], spec)
            if a.id not in self.binding.methods and constant is not None and not spec.shared:
                value = value.new_full(shape, constant)  # the adapter lacks the site: no value to pad, so fill it
            self.values[fqn] = padded(a, name, value, padding, shape)
            self.rooms[fqn] = Room(shape, value.dtype, padding, constant)
            if constant is None and _fits(identity[name], padding, shape):
                self.tensors[f"identity.{fqn}"] = padded(a, name, identity[name], padding, shape)
        if a.scale_slot is not None:
            value = self.binding.values[a.scale_slot].detach()
            self.values[a.scale_slot] = value.clone()
            self.rooms[a.scale_slot] = Room(tuple(value.shape), value.dtype, unread=a.scale_slot in self.unread)

    def _beside(self, fqn: str) -> None:
        """Add a slot that no code reads, with its value unpadded."""
        assert self.binding is not None
        value = self.values[fqn] = self.binding.values[fqn].detach().clone(memory_format=torch.contiguous_format)
        self.rooms[fqn] = Room(tuple(value.shape), value.dtype, unread=True)

    def _capacity(self, a: Attachment) -> dict[str, tuple[int, ...]]:
        """Return the shape that each slot of a site gets, by slot name. Raises ConfigError for a wrong ``max_rank``."""
        assert self.binding is not None
        op, own = self.program.ops[a.id], self.binding.methods.get(a.id)
        current = {n: tuple(self.binding.values[f].shape) for n, f in a.slots.items()}
        near = [b for b in self.attachments if b is a or set(b.slots.values()) & set(a.slots.values())]  # share slots
        methods = [m for b in near for m in (self.binding.methods.get(b.id), b.method)]
        ranks = [r for m in methods if m is not None and (r := m.rank()) is not None]
        if not ranks or a.method.exact_sizes or not any(s.free for s in a.method.slots(op).values()):
            return current
        rank = 0 if own is None else own.rank() or 0
        if self.max_rank is not None and rank > self.max_rank:
            raise ConfigError(
                f"site {a.fqn!r} has rank {rank} now, more than max_rank={self.max_rank}; package with "
                f"max_rank={rank} or more, or swap in a smaller adapter first"
            )
        large = a.method.with_rank(op, max(ranks) if self.max_rank is None else self.max_rank)
        assert large is not None
        wanted = {n: _at_least(s, current[n]) for n, s in large.slots(op).items()}
        if wanted == current or all(self.padding(a, n) for n, s in a.method.slots(op).items() if s.free):
            return wanted
        if self.max_rank is None:
            return current
        raise ConfigError(
            f"site {a.fqn!r}: adapters of method {a.method.name!r} cannot be padded to rank {self.max_rank}; package "
            "without max_rank, and swap adapters of this very rank"
        )

    def padding(self, a: Attachment, slot: str) -> Padding | None:
        op = self.program.ops[a.id]
        if a.method.exact_sizes or not a.method.slots(op)[slot].free:
            return None
        key = (a.method, op, a.form)
        if key not in self._paddings:
            self._paddings[key] = paddings(a.method, op, a.form)
        return (self._paddings[key] or {}).get(slot)

    def inputs(self, program: ExportedProgram, inputs: Inputs) -> list[Input]:
        """Return the flat inputs of a program as its manifest has them."""
        args, kwargs = program.example_inputs  # type: ignore[misc]  # checked by the caller
        written = {*written_to(program.graph), *program.graph_signature.user_inputs_to_mutate.values()}
        out = []
        for value, (name, want) in zip(inputs(args, kwargs), inputs.expected, strict=True):
            if isinstance(value, Tensor):
                order = range(value.ndim) if value.is_contiguous() else value.dim_order()
                out.append(Input(name, want, None, tuple(order), name in written))
            else:
                out.append(Input(name, None, want))
        return out

    def _frozen(self) -> tuple[ExportedProgram, Products]:
        """Return the program to compile, and the matmuls chosen for its base.

        It is in inference mode, has padded slots, and shares base tensors with the program that is packaged.
        """
        training = self.program.adaptation.training
        lifted = Lifted(SetMode(training=False)(self.program).program if training else self.program)
        names = {fqn: node.name for fqn, node in lifted.placeholders.items()}
        modules = lifted.program.graph_module
        Respecialize(self.attachments, self.program.ops, names, self.values, modules=modules)(lifted.graph)
        for fqn, value in self.values.items():
            is_param = isinstance(lifted.state_dict[fqn], nn.Parameter)
            lifted.state_dict[fqn] = nn.Parameter(value, requires_grad=False) if is_param else value
        take_out(lifted, self.unread)
        for node in lifted.graph.nodes:
            if "custom" in node.meta:  # the compiler writes into it, and copies of a graph share it
                node.meta["custom"] = dict(node.meta["custom"])
        return self.chosen(lifted)

    def chosen(self, lifted: Lifted) -> tuple[ExportedProgram, Products]:
        """Choose the matmuls of an opened program's base, unless ``products`` is "plain"; return it and the choices."""
        products = Products()
        if self.products != "plain" and wanted():
            base = {node.name for fqn, node in lifted.placeholders.items() if fqn not in self.rooms}
            products = ChooseProducts(base, choose_packaged, compiled=True)(lifted.graph).data
        return lifted.finish(), products


def bounded(inputs: Sequence[Input], compiled: ExportedProgram) -> list[Input]:
    """Return the inputs with the bounds of their indices: those that code made of ``compiled`` takes for granted."""
    found = index_bounds(Lifted(compiled))
    return [replace(i, bounds=found.get(i.name)) for i in inputs]


def _part(model: ExportedProgram, whole: Manifest, outputs: Sequence[str]) -> PartOf:
    """Return the manifest's entry for a part: its inputs, among those of the whole, and the names of its outputs."""
    inputs, known = Inputs.of(model, {}), {i.name: i for i in whole.inputs}
    # The ranges of the whole: they leave out the virtual tokens, which a caller does not give.
    ranges = {size: whole.ranges.get(size, limits) for size, limits in inputs.ranges.items()}
    guards = [*inputs.guards, *nonzero_conditions(model, inputs)]
    return PartOf([known[name] for name in inputs.names], ranges, guards, list(outputs))


def _seen_from(model: ExportedProgram, name: str, manifest: Manifest) -> Manifest:
    """Return the manifest as it is for one part: with the part's inputs, and the sites whose slots it has."""
    if not manifest.parts:
        return manifest
    sites = [s for s in manifest.sites if all(fqn in model.state_dict for fqn in s.attachment.tensor_names)]
    return replace(manifest, inputs=manifest.parts[name].inputs, sites=sites)


def _at_least(slot: Slot, current: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a slot, where axes whose sizes no rank tells are at least as large as ``current``."""
    free = slot.free if slot.apart else ()
    return tuple(max(n, current[i]) if i in free else n for i, n in enumerate(slot.shape))


def padded(a: Attachment, slot: str, value: Tensor, padding: Padding | None, shape: tuple[int, ...]) -> Tensor:
    """Return a padded copy of ``value`` with memory of its own: constants that share memory would become one.

    Raises ConfigError where it cannot be padded to ``shape``.
    """
    if not _fits(value, padding, shape):
        raise ConfigError(f"site {a.fqn!r}: slot {slot!r} of shape {tuple(value.shape)} cannot be padded to {shape}")
    return (value if padding is None else padding(value, shape)).clone(memory_format=torch.contiguous_format)


def _fits(value: Tensor, padding: Padding | None, shape: tuple[int, ...]) -> bool:
    return tuple(value.shape) == shape or (padding is not None and padding.fits(tuple(value.shape), shape))


def _uniform(value: Tensor, spec: Slot) -> float | None:
    return spec.fill if bool((value == spec.fill).all()) else None
