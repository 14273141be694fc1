"""Unmerge: the program a merge came from, bit for bit.

A merge keeps a reference to what it replaced instead of computing it back: nothing is subtracted, so nothing can drift,
however often and in whatever dtype a program is merged. The reference costs the merged weights' memory, no more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch.export import ExportedProgram

from adaptc.errors import MergeError
from adaptc.passes._pass import Pass, PassResult


@dataclass(frozen=True)
class Unmerge(Pass):
    """``origin`` is the program that was merged; None when it was given up (``keep_base=False``) or never known."""

    name: ClassVar[str] = "unmerge"

    origin: ExportedProgram | None = field(default=None, repr=False)

    def apply(self, program: ExportedProgram) -> PassResult:
        if self.origin is None:
            raise MergeError(
                "this program cannot be unmerged: it was merged with keep_base=False, loaded from a file, or never "
                "merged. Compile the base again, or keep the adapted program: save() it before merging."
            )
        return PassResult(self.origin, 1)
