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

from adaptc.archives.added_files import AddedFiles
from adaptc.binding.binding import Binding
from adaptc.errors import BackendError, ConfigError
from adaptc.matmul_tuning import choose_packaged, chooses_matmuls
from adaptc.packages.compiling import check_package_options, write_package
from adaptc.packages.manifest import SINGLE_MODEL, Input, Manifest, PackagedPart, SlotCapacity
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.packages.pad_adapter import check_members, rank_of_members
from adaptc.packages.zero_sizes import nonzero_conditions
from adaptc.passes.adapt.respecialize import Respecialize
from adaptc.passes.analysis.index_bounds import find_index_bounds
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.subprogram import extract_subprogram
from adaptc.passes.lower.choose_products import ChooseMatmuls, MatmulChoices
from adaptc.passes.lower.complex_numbers import SplitComplex
from adaptc.passes.lower.unused_slots import find_unused_slots, remove_slots
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Slot
from adaptc.passes.protocol.program_method import ProgramMethod
from adaptc.passes.quantized.expand_quantized import ExpandQuantized
from adaptc.passes.train.set_mode import SetMode
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.files.stored_sites import StoredSite
from adaptc.progress import stage
from adaptc.runtime.added_lengths import VirtualTokenLengths
from adaptc.runtime.calls.call_inputs import Inputs
from adaptc.runtime.mutated_buffers import written_placeholders
from adaptc.runtime.rank_padding import Padding, find_paddings
from adaptc.state.core import ProgramCore

__all__ = ["PackagedProgram", "package_program"]


@with_graph_lock
def package_program(
    program: AdaptedProgram,
    path: Path,
    *,
    max_rank: int | None = None,
    products: str = "measured",
    package_files: Mapping[str, bytes] | None = None,
    parts: Mapping[str, Sequence[str]] | None = None,
    added: AddedFiles | None = None,
    members: Mapping[str, Binding] | None = None,
) -> Path:
    """Compile ``program``, with its current adapter, into the file ``path`` (``.pt2``) and return ``path``.

    ``max_rank`` is the largest rank that later swaps may have, at every site. By default each site keeps the larger of
    its current rank and the one it was compiled with. Larger slots cost memory and time. ``package_files`` maps paths
    in the package to the bytes of files that adaptc does not read. ``parts`` divides the program into parts that share
    no computation: it maps the name of each, in small letters, to its outputs. Each is a model of its own in the file.
    ``added`` are further files, and ``members`` the adapters in them by name. Without
    ``max_rank`` there is room for the ranks of these adapters, too.

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
    given: Any = program  # callers may give anything
    if not isinstance(given, AdaptedProgram):
        raise ConfigError(f"package takes what adaptc.compile or adaptc.load gives, not a {type(program).__name__}")
    program = program.snapshot()
    check_package_options(path, max_rank, products)
    if program.current is not None and program.current.joint_adapters:
        raise ConfigError(
            f"a package holds one adapter at a time, and here {list(program.current.joint_adapters)} act together; "
            "merge() the program to package them for good, or compile it for one of them"
        )
    if program.current is not None and (off := program.current.inactive_names):
        raise ConfigError(
            f"a package is made with an adapter that acts, and {off[0]!r} is off: program.set_active({off[0]!r}) first"
        )
    if program.example_inputs is None:
        raise BackendError("the program has no example inputs, which compiling needs; capture it with torch.export")
    with stage("preparing the program for its package"):
        room = (
            max_rank
            if max_rank is not None
            else rank_of_members(program.adaptation.attachments, program.current, members or {})
        )
        exported, manifest, tensors = PackageBuilder(program, room, products).build()
        check_members(manifest, tensors, path, members or {})
    models = {SINGLE_MODEL: exported}
    if parts:
        models = {name: extract_subprogram(exported, outputs) for name, outputs in parts.items()}
        manifest = replace(
            manifest, parts={n: _describe_part(model, manifest, parts[n]) for n, model in models.items()}
        )
    return write_package(path, models, manifest, tensors, package_files or {}, added or AddedFiles())


class PackageBuilder:
    """The contents of one package in the making: a program with padded slots, its manifest, and its tensors.

    ``capacities`` maps the FQN of a slot to its capacity in the compiled code, and ``values`` to its padded value.
    ``tensors`` are those of the file: the current adapter, base weights that adapters replace, and identity values.
    """

    def __init__(self, program: ProgramCore, max_rank: int | None, products: str) -> None:
        self.program, self.max_rank, self.products = program, max_rank, products
        self.binding: Binding | None = program.current
        self.attachments = program.adaptation.attachments if self.binding is not None else ()
        self.spec = program.spec()
        self.capacities: dict[str, SlotCapacity] = {}
        self.values: dict[str, Tensor] = {}
        self.tensors: dict[str, Tensor] = {}
        self.unused_slots: frozenset[str] = frozenset()

    def build(self) -> tuple[ExportedProgram, Manifest, dict[str, Tensor]]:
        self.unused_slots = find_unused_slots(self.program, [f for a in self.attachments for f in a.tensor_names])
        for a in self.attachments:
            self.add_site(a)
        if self.max_rank is not None and not any(r.padding for r in self.capacities.values()):
            raise ConfigError(f"max_rank={self.max_rank} was given, but no site of the program has a rank to pad")
        binding, program, adaptation = self.binding, self.program, self.program.adaptation
        bases = [] if binding is None else list(binding.changed_base)
        self.tensors |= {f"base.{fqn}": self.program.base_tensors[fqn] for fqn in bases}
        # Calls with other adapters write over the code's constants, and the current adapter must come back.
        current = {} if binding is None else {**self.values, **binding.changed_base}
        self.tensors |= {f"current.{fqn}": value for fqn, value in current.items()}
        inputs = adaptation.inputs(program)
        if binding is None:
            header = {"fills": dict(adaptation.fills), "takes": list(inputs.forward_arg_names)}
        else:
            header = adaptation.header(binding)
        sites = [
            StoredSite(a, program.ops[a.id], tuple(w.shape), w.dtype)
            for a in self.attachments
            for w in [self.base_weight(a)]
        ]
        flat, guards = self.describe_inputs(program, inputs), list(inputs.guards)
        # Virtual tokens are as many as in the packaged adapter, so they shorten what a caller may give.
        added_lengths = VirtualTokenLengths.from_graph(program.graph, self.attachments).token_counts(self.values)
        ranges = {s: (low, high - added_lengths.get(s, 0)) for s, (low, high) in inputs.ranges.items()}
        exported, matmuls = self._inference_program()
        flat = with_index_bounds(flat, exported)
        guards += nonzero_conditions(exported, inputs)
        manifest = Manifest(
            self.device(), header, flat, ranges, sites, self.capacities, bases, guards, matmuls.table_rows()
        )
        return exported, manifest, self.tensors

    def base_weight(self, a: Attachment) -> Tensor:
        return self.spec.weights[a.fqn]

    def device(self) -> str:
        tensors = (t for t in self.program.state_dict.values() if isinstance(t, Tensor))
        return next((t.device.type for t in tensors), "cpu")

    def add_site(self, a: Attachment) -> None:
        assert self.binding is not None
        op = self.program.ops[a.id]
        identity = a.method.identity(op, self.spec.canonical_weight(a), self.spec.adapter_dtype(a))
        shapes = self._slot_shapes(a)
        for name, slot in a.method.slots(op).items():
            fqn = a.slots[name]
            if fqn in self.capacities:  # shared with a site that has been
                continue
            value, padding, shape = self.binding.values[fqn].detach(), self.slot_padding(a, name), shapes[name]
            if fqn in self.unused_slots:
                self._add_unused_slot(fqn)
                continue
            # No uniform value turns a program method off: virtual tokens act whatever their values are.
            identity_value = None if isinstance(a.method, ProgramMethod) else _uniform_value(identity[name], slot)
            if a.id not in self.binding.methods and identity_value is not None and not slot.shared:
                value = value.new_full(shape, identity_value)  # the adapter lacks the site: no value to pad, so fill it
            self.values[fqn] = pad_slot(a, name, value, padding, shape)
            self.capacities[fqn] = SlotCapacity(shape, value.dtype, padding, identity_value)
            if identity_value is None and _can_pad(identity[name], padding, shape):
                self.tensors[f"identity.{fqn}"] = pad_slot(a, name, identity[name], padding, shape)
        if a.scale_slot is not None:
            value = self.binding.values[a.scale_slot].detach()
            self.values[a.scale_slot] = value.clone()
            self.capacities[a.scale_slot] = SlotCapacity(
                tuple(value.shape), value.dtype, unread=a.scale_slot in self.unused_slots
            )

    def _add_unused_slot(self, fqn: str) -> None:
        """Add a slot that no code reads, with its value unpadded."""
        assert self.binding is not None
        value = self.values[fqn] = self.binding.values[fqn].detach().clone(memory_format=torch.contiguous_format)
        self.capacities[fqn] = SlotCapacity(tuple(value.shape), value.dtype, unread=True)

    def _slot_shapes(self, a: Attachment) -> dict[str, tuple[int, ...]]:
        """Return the shape that each slot of a site gets, by slot name. Raises ConfigError for a wrong ``max_rank``."""
        assert self.binding is not None
        op, current_method = self.program.ops[a.id], self.binding.methods.get(a.id)
        current = {n: tuple(self.binding.values[f].shape) for n, f in a.slots.items()}
        sharing = [
            b for b in self.attachments if b is a or set(b.slots.values()) & set(a.slots.values())
        ]  # share slots
        methods = [m for b in sharing for m in (self.binding.methods.get(b.id), b.method)]
        ranks = [r for m in methods if m is not None and (r := m.sizes.rank()) is not None]
        if not ranks or a.method.sizes.exact or not any(s.free for s in a.method.slots(op).values()):
            return current
        rank = 0 if current_method is None else current_method.sizes.rank() or 0
        if self.max_rank is not None and rank > self.max_rank:
            raise ConfigError(
                f"site {a.fqn!r} has rank {rank} now, more than max_rank={self.max_rank}; package with "
                f"max_rank={rank} or more, or swap in a smaller adapter first"
            )
        largest_method = a.method.sizes.with_rank(op, max(ranks) if self.max_rank is None else self.max_rank)
        assert largest_method is not None
        padded_shapes = {n: _grown_shape(s, current[n]) for n, s in largest_method.slots(op).items()}
        if padded_shapes == current or all(self.slot_padding(a, n) for n, s in a.method.slots(op).items() if s.free):
            return padded_shapes
        if self.max_rank is None:
            return current
        raise ConfigError(
            f"site {a.fqn!r}: adapters of method {a.method.name!r} cannot be padded to rank {self.max_rank}; package "
            "without max_rank, and swap adapters of this very rank"
        )

    def slot_padding(self, a: Attachment, slot: str) -> Padding | None:
        op = self.program.ops[a.id]
        if a.method.sizes.exact or not a.method.slots(op)[slot].free:
            return None
        return (find_paddings(a.method, op, a.form) or {}).get(slot)

    def describe_inputs(self, program: ExportedProgram, checker: Inputs) -> list[Input]:
        """Return the flat inputs of a program as its manifest has them."""
        examples: Any = program.example_inputs  # never None: checked by the caller
        args, kwargs = examples
        written_names = {*written_placeholders(program.graph), *program.graph_signature.user_inputs_to_mutate.values()}
        specs: list[Input] = []
        for value, (name, expected) in zip(checker(args, kwargs), checker.expected, strict=True):
            if isinstance(value, Tensor):
                untyped: Any = value  # torch gives dim_order no types
                order = tuple(range(value.ndim)) if value.is_contiguous() else tuple(untyped.dim_order())
                specs.append(Input(name, expected, None, order, name in written_names))
            else:
                specs.append(Input(name, None, expected))
        return specs

    def _inference_program(self) -> tuple[ExportedProgram, MatmulChoices]:
        """Return the program to compile, and the matmuls chosen for its base.

        It is in inference mode, has padded slots, and shares base tensors with the program that is packaged.
        """
        training = self.program.adaptation.training
        program = SetMode(training=False)(self.program).program if training else self.program
        lifted = LiftedProgram(program)
        names = {fqn: node.name for fqn, node in lifted.placeholders.items()}
        modules = lifted.program.graph_module
        Respecialize(self.attachments, self.program.ops, names, self.values, modules=modules)(lifted.graph)
        for fqn, value in self.values.items():
            is_param = isinstance(lifted.state_dict[fqn], nn.Parameter)
            lifted.state_dict[fqn] = nn.Parameter(value, requires_grad=False) if is_param else value
        remove_slots(lifted, self.unused_slots)
        for node in lifted.graph.nodes:
            if "custom" in node.meta:  # the compiler writes into it, and copies of a graph share it
                node.meta["custom"] = dict(node.meta["custom"])
        return self.choose_matmuls(lifted)

    def choose_matmuls(self, lifted: LiftedProgram) -> tuple[ExportedProgram, MatmulChoices]:
        """Choose the matmuls of an opened program's base, unless ``products`` is "plain"; return it and the choices.

        Quantised weights become plain tensors, and complex values pairs of real ones. Layers read quantised weights as
        they are stored, where there is a way.
        """
        products = MatmulChoices()
        # After all that looks for the layers of sites: a layer may become a few other nodes here.
        lifted = LiftedProgram(ExpandQuantized(compiled=self.products != "plain")(lifted.finish()).output)
        SplitComplex(lifted.program.graph_module)(lifted.graph)
        if self.products != "plain" and chooses_matmuls():
            base = {node.name for fqn, node in lifted.placeholders.items() if fqn not in self.capacities}
            products = ChooseMatmuls(base, choose_packaged, compiled=True)(lifted.graph).data
        return lifted.finish(), products


def with_index_bounds(inputs: Sequence[Input], exported: ExportedProgram) -> list[Input]:
    """Return the inputs with the bounds of their indices: those that code made of ``exported`` takes for granted."""
    bounds = find_index_bounds(LiftedProgram(exported))
    return [replace(i, bounds=bounds.get(i.name)) for i in inputs]


def _describe_part(model: ExportedProgram, manifest: Manifest, outputs: Sequence[str]) -> PackagedPart:
    """Return the manifest's entry for a part: its inputs, among those of the whole, and the names of its outputs."""
    inputs, specs_by_name = Inputs.from_program(model, {}), {i.name: i for i in manifest.inputs}
    # The ranges of the whole: they leave out the virtual tokens, which a caller does not give.
    ranges = {size: manifest.ranges.get(size, limits) for size, limits in inputs.ranges.items()}
    guards = [*inputs.guards, *nonzero_conditions(model, inputs)]
    return PackagedPart([specs_by_name[name] for name in inputs.names], ranges, guards, list(outputs))


def _grown_shape(slot: Slot, current: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a slot, where axes whose sizes no rank tells are at least as large as ``current``."""
    free_axes = slot.free if slot.apart else ()
    return tuple(max(n, current[i]) if i in free_axes else n for i, n in enumerate(slot.shape))


def pad_slot(a: Attachment, slot: str, value: Tensor, padding: Padding | None, shape: tuple[int, ...]) -> Tensor:
    """Return a padded copy of ``value`` with memory of its own: constants that share memory would become one.

    Raises ConfigError where it cannot be padded to ``shape``.
    """
    if not _can_pad(value, padding, shape):
        raise ConfigError(f"site {a.fqn!r}: slot {slot!r} of shape {tuple(value.shape)} cannot be padded to {shape}")
    return (value if padding is None else padding(value, shape)).clone(memory_format=torch.contiguous_format)


def _can_pad(value: Tensor, padding: Padding | None, shape: tuple[int, ...]) -> bool:
    return tuple(value.shape) == shape or (padding is not None and padding.can_pad(tuple(value.shape), shape))


def _uniform_value(value: Tensor, slot: Slot) -> float | None:
    return slot.fill if bool((value == slot.fill).all()) else None
