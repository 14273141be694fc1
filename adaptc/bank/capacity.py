"""Keep a bank within its limits: how many adapters, how many bytes, which ranks, and which adapters go for another one.

For an adapter that fits the program, it gives the names to let go. It raises where there is no room, or where no row of
a batch can take the adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adaptc.adapter_files.directory import all_finite
from adaptc.bank.bank_report import bytes_of
from adaptc.binding.binding import Binding
from adaptc.errors import CheckpointError, ConfigError, listing, short_repr
from adaptc.tables import format_bytes


@dataclass(frozen=True)
class Limits:
    """The limits of a bank, None for no limit. Raises ConfigError for a value that is no limit."""

    capacity: int | None = None
    max_rank: int | None = None
    max_bytes: int | None = None
    evict: bool = False

    def __post_init__(self) -> None:
        for name in ("capacity", "max_rank", "max_bytes"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name}={short_repr(value)} must be a positive integer, or None for no limit")
        evict: Any = self.evict  # callers may give anything
        if not isinstance(evict, bool):
            raise ConfigError(f"evict={short_repr(self.evict)} must be True or False")

    def check_call(self, names: Collection[str]) -> None:
        """Raise ConfigError where one call needs more adapters than there may be."""
        if self.capacity is not None and len(names) > self.capacity:
            raise ConfigError(
                f"the call names {len(names)} adapters ({listing(map(repr, names))}), and the bank holds "
                f"{self.capacity} at once: make it larger, or run the rows in several calls"
            )

    def check_adapter(self, name: str, binding: Binding, *, was_read: bool = False) -> None:
        """Raise ConfigError or CheckpointError for an adapter that rows of one batch cannot have.

        ``was_read``: the adapter was made from a file or a state dict, where its tensors were checked for NaN. Only its
        scales, which come from a config, are checked here then.
        """
        if binding.changed_base:
            raise CheckpointError(
                f"adapter {name!r} brings a base of its own ({listing(map(repr, binding.changed_base), 2)}), which "
                "rows of one batch cannot have: convert it to plain LoRA first, with adaptc.convert_to_lora"
            )
        if len(binding.joint_adapters) > 1:
            raise ConfigError(
                f"adapter {name!r} is {len(binding.joint_adapters)} adapters that act together: add each of them, and "
                "give rows a mix"
            )
        values = {n: t for n, t in binding.values.items() if not (was_read and t.ndim)}
        if not all_finite(t.detach() for t in values.values()):  # False also where the sums cannot tell: look at each
            floats = ((n, t) for n, t in values.items() if t.is_floating_point() or t.is_complex())
            if bad := next((n for n, t in floats if not bool(torch.isfinite(t).all())), None):
                raise CheckpointError(f"adapter {name!r} is not finite: {bad!r} has NaN or infinity")
        ranks = [r for m in binding.methods.values() if (r := m.sizes.rank()) is not None]
        if self.max_rank is not None and max(ranks, default=0) > self.max_rank:
            raise ConfigError(f"adapter {name!r} has rank {max(ranks)}, and the bank takes ranks up to {self.max_rank}")

    def choose_evicted(
        self,
        adapters: Mapping[str, Binding],
        use_order: Collection[str],
        name: str,
        binding: Binding,
        needed_names: Collection[str],
    ) -> list[str]:
        """Return the names to remove from ``adapters`` for another adapter: the first in ``use_order``, but none that
        is ``needed_names``.

        Raises ConfigError where there is no room.
        """
        kept = [n for n in use_order if n != name]
        evicted: list[str] = []
        while full := self._exceeded_limit([*(adapters[n] for n in kept), binding]):
            free = [n for n in kept if n not in needed_names]
            if not self.evict or not free:
                raise ConfigError(
                    f"the bank has no room for {name!r}: {full}. Remove one, make the bank larger, or let it give up "
                    "those that were used least recently, with evict=True"
                )
            kept.remove(free[0])
            evicted.append(free[0])
        return evicted

    def _exceeded_limit(self, bindings: list[Binding]) -> str:
        """Return which limit these bindings exceed, as text; '' for none."""
        if self.capacity is not None and len(bindings) > self.capacity:
            return f"it holds no more than {self.capacity}"
        if self.max_bytes is not None and (nbytes := bytes_of(bindings)) > self.max_bytes:
            return f"it holds {format_bytes(self.max_bytes)}, and would need {format_bytes(nbytes)}"
        return ""
