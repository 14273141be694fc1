"""What an adapter was before it was PEFT's keys and a config: its format, and which part of its file it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Origin:
    """What an adapter was made of. ``format``: how its file names tensors. ``component``: which of the components in it
    was taken, '' where it names none; ``others``: those that were not, with how many tensors each has."""

    format: str = "PEFT"
    component: str = ""
    others: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        of = f" ({self.component})" if self.component else ""
        return f"{self.format}{of}"

    @property
    def left(self) -> str:
        """What was not taken, in words; '' where that is nothing."""
        return ", ".join(f"{name or 'the rest'} ({n} tensors)" for name, n in self.others.items())


PEFT = Origin()
