"""Values that training keeps to: parameters are moved back before each call that gradients are taken of.

Before: an optimizer may have moved an adapter's parameters anywhere. After: they are what their methods'
:meth:`constrained` makes of them, which is what they are already where nobody has moved them since the last call.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adaptc.passes.ir.method import Method
from adaptc.passes.ir.ops import Op
from adaptc.program.core import ProgramCore


class Constraints:
    """Those of the adapter that ``program`` is bound to; most have none."""

    def __init__(self, program: ProgramCore) -> None:
        self._sites: list[tuple[Method, Op, Mapping[str, str]]] = []
        binding = program.current
        for a in program.adaptation.attachments if binding is not None else ():
            method, op = binding.methods.get(a.id), program.ops[a.id]  # type: ignore[union-attr]
            if method is not None and method.constrained(op, {n: binding.values[f] for n, f in a.slots.items()}):  # type: ignore[union-attr]
                self._sites.append((method, op, a.slots))

    def hold(self, module: nn.Module) -> None:
        """Move the parameters of ``module`` back, in place. Only those that are trained, where gradients are on."""
        if not self._sites or not torch.is_grad_enabled():
            return
        compiling = torch.compiler.is_compiling()
        with torch.no_grad():
            for method, op, fqns in self._sites:
                slots = {n: _tensor(module, f) for n, f in fqns.items()}
                for name, value in method.constrained(op, slots).items():
                    if slots[name].requires_grad:
                        # A graph that still waits for its backward may have read it: what has not moved since is
                        # written as it was, and autograd need not count it. Optimizers count, or fuse and do not.
                        (slots[name] if compiling else slots[name].data).copy_(value)


def _tensor(module: nn.Module, fqn: str) -> Tensor:
    path, _, name = fqn.rpartition(".")
    return getattr(module.get_submodule(path), name)
