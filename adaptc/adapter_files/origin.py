"""Record the file format that an adapter came from, and which part of its file it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class FileOrigin:
    """The format and component of the file that an adapter was made from.

    ``format`` says how the file names tensors. ``component`` is the one that was taken, '' where the file names none.
    ``other_components`` maps each component that was not taken to its number of tensors.
    """

    format: str = "PEFT"
    component: str = ""
    other_components: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        of = f" ({self.component})" if self.component else ""
        return f"{self.format}{of}"

    @property
    def describe_others(self) -> str:
        """Return in words the components that were not taken, or '' where there are none."""
        return ", ".join(f"{name or 'the rest'} ({n} tensors)" for name, n in self.other_components.items())


PEFT_ORIGIN = FileOrigin()
