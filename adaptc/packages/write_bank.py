"""Package a bank: its code for per-row adapters, room for a number of adapters, and the adapters that are in it.

The constants of the package have an axis of adapters in front of the axes that a package of one adapter has. It takes
the coefficients of a call as one more input. ``packages.bank`` runs it, and adds other adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from adaptc.archives.added_files import AddedFiles
from adaptc.bank.bank import Bank
from adaptc.bank.compile_bank import RowProgram
from adaptc.bank.stack_placement import StackPlacement
from adaptc.binding.binding import Binding
from adaptc.errors import BackendError, ConfigError, short_repr
from adaptc.methods import AdapterConfig
from adaptc.packages.compiling import check_package_options, write_package
from adaptc.packages.manifest import SINGLE_MODEL, Manifest, PackagedPart
from adaptc.packages.package_program import PackageBuilder, pad_slot, with_index_bounds
from adaptc.packages.pad_adapter import unused_slot_key
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.lower.unused_slots import find_unused_slots, remove_slots
from adaptc.program.files.stored_sites import StoredSite
from adaptc.progress import stage
from adaptc.runtime.calls.call_inputs import Inputs


@with_graph_lock
def package_bank(
    bank: Bank,
    path: Path,
    *,
    capacity: int | None = None,
    max_rank: int | None = None,
    products: str = "measured",
    package_files: Mapping[str, bytes] | None = None,
    added: AddedFiles | None = None,
) -> Path:
    """Compile ``bank`` into the file ``path`` (``.pt2``) and return ``path``.

    ``capacity`` is the number of adapters that there is room for, at least two. By default it is as many as the bank
    may hold, or one more than it has where that is unlimited. Each place costs memory, and time in every call.
    ``max_rank`` is the largest rank that an adapter may have. By default it is the bank's own limit, or the largest
    rank in it. ``products``, ``package_files``, ``added`` and further errors are as for ``package_program``.

    Raises ConfigError for a bank that is empty, for one with more adapters than ``capacity``, and for a packaged one.
    """
    placement = bank.placement
    if not isinstance(placement, StackPlacement):
        raise ConfigError(f"this bank is of a package already, {bank.path}: package the bank that it was made of")
    check_package_options(path, max_rank, products)
    members = dict(bank.adapters)
    if not members:
        raise ConfigError("the bank is empty: a package of it is made for adapters like those that are in it")
    count = capacity if capacity is not None else bank.capacity or len(members) + 1
    given: Any = count  # callers may give anything
    if not isinstance(given, int) or isinstance(given, bool) or count < len(members):
        raise ConfigError(
            f"capacity={short_repr(capacity)} is no number of adapters from {len(members)}, which are in it"
        )
    ranks = {n: _max_rank(b) for n, b in members.items()}
    largest_adapter = max(members, key=ranks.__getitem__)
    rank_capacity = max_rank or bank.max_rank or max(ranks.values()) or None
    builder = _BankPackageBuilder(placement, members, members[largest_adapter], rank_capacity, products, max(count, 2))
    with stage(f"preparing a bank of {len(members)} adapters for its package"):
        models, manifest, tensors = builder.build_models()
    return write_package(path, models, manifest, tensors, package_files or {}, added or AddedFiles())


def _max_rank(b: Binding) -> int:
    return max((r for m in b.methods.values() if (r := m.sizes.rank()) is not None), default=0)


def _bank_sources(placement: StackPlacement) -> dict[str, tuple[RowProgram, Sequence[str]]]:
    """Return name -> (what is compiled by itself, the names of its outputs), one entry for each part of the bank.

    A bank that is called as a whole is one part, and lists no outputs.
    """
    outputs, parts = placement.part_outputs, placement.row_programs
    return {SINGLE_MODEL if outputs is None else n: (source, (outputs or {}).get(n, ())) for n, source in parts.items()}


class _BankPackageBuilder(PackageBuilder):
    def __init__(
        self,
        placement: StackPlacement,
        members: Mapping[str, Binding],
        binding: Binding,
        max_rank: int | None,
        products: str,
        capacity: int,
    ) -> None:
        super().__init__(placement.program.with_binding(binding), max_rank, products)
        if self.program.example_inputs is None:
            raise BackendError("the program has no example inputs, which compiling needs; capture it with torch.export")
        self.placement, self.members, self.capacity = placement, members, capacity

    def build_models(self) -> tuple[dict[str, ExportedProgram], Manifest, dict[str, Tensor]]:
        """Return the models by name, the manifest and the tensors of the package.

        A bank that is called part by part has a model for each part.
        """
        self.unused_slots = find_unused_slots(self.program, [f for a in self.attachments for f in a.tensor_names])
        for a in self.attachments:
            self.add_site(a)
        stacks = {fqn: self._stack_slot(fqn) for fqn in self.capacities.keys() - self.unused_slots}
        self.tensors |= {f"current.{fqn}": value for fqn, value in stacks.items()}
        for k, member in enumerate(self.members.values()):
            unused = {f: member.values[f].detach() for f in self.unused_slots}
            self.tensors |= {unused_slot_key(k, f): t.clone() for f, t in unused.items() if t.numel()}
        empty_stacks = {
            f: torch.zeros(self.capacity, *self.capacities[f].shape, dtype=self.capacities[f].dtype)
            for f in self.unused_slots
        }
        stack = Binding({**stacks, **empty_stacks}, {a.id: a.method for a in self.attachments}, AdapterConfig())
        assert self.binding is not None
        header = self.program.adaptation.header(self.binding)
        sites = [
            StoredSite(a, self.program.ops[a.id], tuple(w.shape), w.dtype)
            for a in self.attachments
            for w in [self.base_weight(a)]
        ]
        is_single_model = self.placement.part_outputs is None
        models, parts, products = dict[str, ExportedProgram](), dict[str, PackagedPart](), list[Any]()
        for name, (source, outputs) in _bank_sources(self.placement).items():
            lifted = LiftedProgram(source.export_program(stack, self.capacity))
            remove_slots(lifted, self.unused_slots & lifted.placeholders.keys())
            exported = lifted.finish()
            inputs = Inputs.from_program(exported, source.fills, source.forward_arg_names)
            flat = with_index_bounds(self.describe_inputs(exported, inputs), exported)
            parts[name] = PackagedPart(flat, dict(inputs.ranges), list(inputs.guards), list(outputs))
            models[name], matmuls = self.choose_matmuls(LiftedProgram(exported))
            products += matmuls.table_rows()
        inputs_by_name = {i.name: i for one in parts.values() for i in one.inputs}
        ranges = {size: limits for one in parts.values() for size, limits in one.ranges.items()}
        guards: Sequence[str] = parts[SINGLE_MODEL].guards if is_single_model else []
        bank_data = {"count": self.capacity, "names": list(self.members)}
        manifest = Manifest(
            self.device(),
            header,
            list(inputs_by_name.values()),
            ranges,
            sites,
            self.capacities,
            [],
            guards,
            products,
            bank=bank_data,
            parts={} if is_single_model else parts,
        )
        return models, manifest, self.tensors

    def _stack_slot(self, fqn: str) -> Tensor:
        capacity = self.capacities[fqn]
        out = torch.zeros(self.capacity, *capacity.shape, dtype=capacity.dtype, device=self.program.device)
        a = next(a for a in self.attachments if fqn in a.tensor_names)
        name = next((n for n, f in a.slots.items() if f == fqn), "")
        for k, member in enumerate(self.members.values()):
            value = member.values[fqn].detach()
            out[k].copy_(value if not name else pad_slot(a, name, value, capacity.padding, capacity.shape))
        return out
