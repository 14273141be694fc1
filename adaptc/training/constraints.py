"""Hold parameters to their constraints in training: they are moved back before each call that gradients are taken of.

An optimizer may have moved an adapter's parameters anywhere. They become what their methods' :meth:`constrained` makes
of them. That is what they already are where nobody has moved them since the last call.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import Method
from adaptc.state.core import ProgramCore


class Constraints:
    """The constraints on the adapter that ``program`` is bound to; most adapters have none."""

    def __init__(self, program: ProgramCore) -> None:
        self._sites: list[tuple[Method, Op, Mapping[str, str]]] = []
        binding = program.current
        for a in program.adaptation.attachments if binding is not None else ():
            method, op = binding.methods.get(a.id), program.ops[a.id]  # type: ignore[union-attr]
            if method is not None and method.constrained(op, {n: binding.values[f] for n, f in a.slots.items()}):  # type: ignore[union-attr]
                self._sites.append((method, op, a.slots))

    def enforce(self, module: nn.Module) -> None:
        """Move the parameters of ``module`` back, in place; only those that train, and only where gradients are on."""
        if not self._sites or not torch.is_grad_enabled():
            return
        compiling = torch.compiler.is_compiling()
        with torch.no_grad():
            for method, op, fqns in self._sites:
                slots = {n: _tensor_of(module, f) for n, f in fqns.items()}
                for name, value in method.constrained(op, slots).items():
                    if slots[name].requires_grad:
                        # A write that autograd counts would fail the backward of an earlier call that read this
                        # parameter. Without an optimizer's step in between, the same value is written, so it need not
                        # be counted; a step is counted by the optimizer itself, unless it is fused.
                        (slots[name] if compiling else slots[name].data).copy_(value)


def _tensor_of(module: nn.Module, fqn: str) -> Tensor:
    path, _, name = fqn.rpartition(".")
    return getattr(module.get_submodule(path), name)
