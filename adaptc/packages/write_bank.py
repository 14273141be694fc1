"""Package a bank: its code for per-row adapters, room for a number of adapters, and the adapters that are in it.

The constants of the package have an axis of adapters in front of the axes that a package of one adapter has. It takes
the coefficients of a call as one more input. ``packages.bank`` runs it, and adds other adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from adaptc.bank.bank import Bank
from adaptc.bank.compile_bank import RowsSource
from adaptc.bank.divided_bank import DividedBank
from adaptc.binding.binding import Binding
from adaptc.errors import BackendError, ConfigError, shown
from adaptc.methods import AdapterConfig
from adaptc.packages.manifest import WHOLE, Manifest, PackagedSite, PartOf
from adaptc.packages.package_program import Packer, bounded, check_target, padded, write_package
from adaptc.packages.pad_adapter import member_key
from adaptc.packages.unused_slots import take_out, unread
from adaptc.passes.graph.graph_lock import exclusive
from adaptc.passes.graph.lifted import Lifted
from adaptc.progress import stage
from adaptc.runtime.calls.call_inputs import Inputs


@exclusive
def package_bank(
    bank: Bank,
    path: Path,
    *,
    capacity: int | None = None,
    max_rank: int | None = None,
    products: str = "measured",
    carried: Mapping[str, bytes] | None = None,
) -> Path:
    """Compile ``bank`` into the file ``path`` (``.pt2``) and return ``path``.

    ``capacity`` is the number of adapters that there is room for, at least two. By default it is as many as the bank
    may hold, or one more than it has where that is unlimited. Each place costs memory, and time in every call.
    ``max_rank`` is the largest rank that an adapter may have. By default it is the bank's own limit, or the largest
    rank in it. ``products``, ``carried`` and further errors are as for ``package_program``.

    Raises ConfigError for a bank that is empty, for one with more adapters than ``capacity``, and for a packaged one.
    """
    if not isinstance(bank, Bank):
        raise ConfigError(f"a {type(bank).__name__} is a package already: package the bank that it was made of")
    check_target(path, max_rank, products)
    members = dict(bank.adapters)
    if not members:
        raise ConfigError("the bank is empty: a package of it is made for adapters like those that are in it")
    count = capacity if capacity is not None else bank.capacity or len(members) + 1
    if not isinstance(count, int) or isinstance(count, bool) or count < len(members):
        raise ConfigError(f"capacity={shown(capacity)} is no number of adapters from {len(members)}, which are in it")
    ranks = {n: _rank(b) for n, b in members.items()}
    largest = max(members, key=ranks.__getitem__)
    wanted = max_rank or bank.max_rank or max(ranks.values()) or None
    packer = _BankPacker(bank, members, members[largest], wanted, products, max(count, 2))
    with stage(f"preparing a bank of {len(members)} adapters for its package"):
        models, manifest, tensors = packer.packed()
    return write_package(path, models, manifest, tensors, carried or {})


def _rank(b: Binding) -> int:
    return max((r for m in b.methods.values() if (r := m.rank()) is not None), default=0)


def _parts(bank: Bank) -> dict[str, tuple[RowsSource, Sequence[str]]]:
    """Return name -> (what is compiled by itself, the names of its outputs), one entry for each part of the bank.

    A bank that is called as a whole is one part, and lists no outputs.
    """
    if isinstance(bank, DividedBank):
        return {name: (source, bank.divided[name]) for name, source in bank.sources.items()}
    return {WHOLE: (bank.source, ())}


class _BankPacker(Packer):
    def __init__(
        self, bank: Bank, members: Mapping[str, Binding], like: Binding, max_rank: int | None, products: str, count: int
    ) -> None:
        super().__init__(bank.program.with_binding(like), max_rank, products)
        if self.program.example_inputs is None:
            raise BackendError("the program has no example inputs, which compiling needs; capture it with torch.export")
        self.bank, self.members, self.count = bank, members, count

    def packed(self) -> tuple[dict[str, ExportedProgram], Manifest, dict[str, Tensor]]:
        """Return the models by name, the manifest and the tensors of the package.

        A bank that is called part by part has a model for each part.
        """
        self.unread = unread(self.program, [f for a in self.attachments for f in a.tensor_names])
        for a in self.attachments:
            self.site(a)
        stacks = {fqn: self._stack(fqn) for fqn in self.rooms.keys() - self.unread}
        self.tensors |= {f"current.{fqn}": value for fqn, value in stacks.items()}
        for k, member in enumerate(self.members.values()):
            own = {f: member.values[f].detach() for f in self.unread}
            self.tensors |= {member_key(k, f): t.clone() for f, t in own.items() if t.numel()}
        nothing = {f: torch.zeros(self.count, *self.rooms[f].shape, dtype=self.rooms[f].dtype) for f in self.unread}
        stack = Binding({**stacks, **nothing}, {a.id: a.method for a in self.attachments}, AdapterConfig())
        assert self.binding is not None
        header = self.program.adaptation.header(self.binding)
        sites = [
            PackagedSite(a, self.program.ops[a.id], tuple(w.shape), w.dtype)
            for a in self.attachments
            for w in [self.base(a)]
        ]
        whole = not isinstance(self.bank, DividedBank)
        models, called, products = dict[str, ExportedProgram](), dict[str, PartOf](), []
        for name, (source, outputs) in _parts(self.bank).items():
            lifted = Lifted(source.exported(stack, self.count))
            take_out(lifted, self.unread & lifted.placeholders.keys())
            exported = lifted.finish()
            inputs = Inputs.of(exported, source.fills, source.takes)
            flat = bounded(self.inputs(exported, inputs), exported)
            called[name] = PartOf(flat, dict(inputs.ranges), list(inputs.guards), list(outputs))
            models[name], chosen = self.chosen(Lifted(exported))
            products += chosen.data()
        every = {i.name: i for one in called.values() for i in one.inputs}
        ranges = {size: limits for one in called.values() for size, limits in one.ranges.items()}
        guards = called[WHOLE].guards if whole else []
        names = {"count": self.count, "names": list(self.members)}
        manifest = Manifest(
            self.device(),
            header,
            list(every.values()),
            ranges,
            sites,
            self.rooms,
            [],
            guards,
            products,
            bank=names,
            parts={} if whole else called,
        )
        return models, manifest, self.tensors

    def _stack(self, fqn: str) -> Tensor:
        room = self.rooms[fqn]
        out = torch.zeros(self.count, *room.shape, dtype=room.dtype, device=self.program.device)
        a = next(a for a in self.attachments if fqn in a.tensor_names)
        name = next((n for n, f in a.slots.items() if f == fqn), "")
        for k, member in enumerate(self.members.values()):
            value = member.values[fqn].detach()
            out[k].copy_(value if not name else padded(a, name, value, room.padding, room.shape))
        return out
