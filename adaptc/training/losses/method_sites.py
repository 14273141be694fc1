"""Find the tensors of one method in a program that trains, for the term that the method adds to a loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import Method
from adaptc.state.core import ProgramCore
from adaptc.training.program_module import ProgramModule


def adapters_with(
    program: ProgramCore | ProgramModule, kind: type[Method]
) -> Iterator[tuple[Any, list[tuple[Op, dict[str, Tensor]]]]]:
    """Yield the config and the sites of each adapter that has sites of the method ``kind``.

    A site is its op, and slot -> the slot's tensor. The adapters are those that act now, several of them where they act
    together.
    """
    core = program.program if isinstance(program, ProgramModule) else program
    binding = program.binding() if isinstance(program, ProgramModule) else program.binding
    for part in binding.adapters_by_name.values():
        sites = [a for a in core.adaptation.attachments if isinstance(part.methods.get(a.id), kind)]
        if sites:
            yield part.config, [(core.ops[a.id], {n: binding.values[f] for n, f in a.slots.items()}) for a in sites]
