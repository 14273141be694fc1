"""Report what was swapped, in a dataclass with the numbers, which prints as a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isnan, nan
from typing import Any

from adaptc.adapter_files.adapter_data import PEFT_ORIGIN, FileOrigin
from adaptc.binding.binding import Binding
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Method
from adaptc.tables import Report, Table, shorten_paths


@dataclass(frozen=True, repr=False)
class SwapReport(Report):
    """A report of a swap.

    ``sites``: the number of sites that the adapter has. ``identity``: the weights that it leaves at the base.
    ``seconds``: the time that the swap took. ``origin``: the format of the adapter's file, the component that was
    taken, and the components that were not. The report of adapters that act together is of all of them: a weight is
    left at the base where none has a site.

    Counts are made when they are first asked for, since most reports are not read.
    """

    ROWS = ("weights",)

    source: str
    attachments: Sequence[Attachment] = field(repr=False)
    methods: Mapping[str, Method] = field(repr=False)
    seconds: float = nan
    origin: FileOrigin = PEFT_ORIGIN

    @classmethod
    def from_binding(cls, attachments: Sequence[Attachment], binding: Binding, seconds: float = nan) -> SwapReport:
        """Return the report of a swap to ``binding`` in a program with these attachments."""
        return cls(binding.source, attachments, binding.methods, seconds, binding.origin)

    @cached_property
    def identity(self) -> tuple[str, ...]:
        changed = {a.fqn for a in self.attachments if a.id in self.methods}
        return tuple(dict.fromkeys(a.fqn for a in self.attachments if a.fqn not in changed))

    @property
    def sites(self) -> int:
        return sum(a.id in self.methods for a in self.attachments)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({r for m in self.methods.values() if (r := m.sizes.rank()) is not None}))

    def sections(self) -> list[str | Table]:
        total = len(self.attachments)
        rank = f", rank {', '.join(map(str, self.ranks))}" if self.ranks else ""
        duration = "" if isnan(self.seconds) else f", {1000 * self.seconds:.1f} ms"
        remarks = f"\nleft at the base: {shorten_paths(self.identity)}" if self.identity else ""
        remarks += f"\nnot of this program: {self.origin.describe_others}" if self.origin.other_components else ""
        form = "" if self.origin == PEFT_ORIGIN else f" [{self.origin}]"
        return [f"{self.source}{form}: {self.sites} of {total} sites{rank}{duration}{remarks}"]

    def values(self) -> dict[str, Any]:
        """Return ``source``, ``format``, ``sites`` (their number), ``left_at_the_base`` (FQNs), ``ranks``, ``seconds``
        and ``weights`` (one dict for each site of the program)."""
        return {
            "source": self.source,
            "format": str(self.origin),
            "sites": self.sites,
            "left_at_the_base": list(self.identity),
            "ranks": list(self.ranks),
            "seconds": self.seconds,
            "weights": [
                {
                    "weight": a.fqn,
                    "adapter": a.adapter,
                    "method": a.method.name,
                    "adapted": a.id in self.methods,
                    "rank": self.methods[a.id].sizes.rank() if a.id in self.methods else None,
                }
                for a in self.attachments
            ],
        }
