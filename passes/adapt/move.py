"""Move a program to another device: its tensors, and the devices written into its graph.

The result is what ``torch.export.passes.move_to_device_pass`` makes of a copy. The program given stays where it was.
Tied weights stay tied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from adaptc.errors import BackendError
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.pass_infra import Pass, PassResult
from adaptc.passes.graph.storage import storage_key


@dataclass(frozen=True)
class MoveToDevice(Pass):
    """A pass that moves a program to ``device``; its count is that of the tensors moved.

    With ``keeps_meta``, tensors on the meta device stay there, since they have no values that could be moved. The
    graph is for ``device`` all the same.
    """

    name: ClassVar[str] = "move_to_device"

    device: torch.device
    keeps_meta: bool = False

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        lifted = LiftedProgram(subject)
        moved: dict[Any, Tensor] = {}
        for tensors in (lifted.state_dict, lifted.constants):
            for name, t in tensors.items():
                if isinstance(t, Tensor):
                    key = storage_key(t)
                    moved[key] = tensors[name] = moved[key] if key in moved else self._move_tensor(t)
        if self.keeps_meta:
            lifted.example_inputs = None  # they have no values either
        # The pass changes what it is given: the example inputs too, which the program given shares until here.
        done = move_to_device_pass(lifted.finish(), self.device)
        if self.keeps_meta:
            lifted, old = LiftedProgram(done), LiftedProgram(subject, edit=False)
            for tensors, before in ((lifted.state_dict, old.state_dict), (lifted.constants, old.constants)):
                tensors |= {n: t for n, t in before.items() if isinstance(t, Tensor) and t.is_meta}
            done = lifted.finish()
        return PassResult(done, len(moved))

    def _move_tensor(self, t: Tensor) -> Tensor:
        if self.keeps_meta and t.is_meta:
            new = torch.empty(0, dtype=t.dtype, device=self.device)  # until the graph is moved
        else:
            new = t.detach().to(self.device)
        return nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new


def usable_device(device: torch.device | str) -> torch.device:
    """Return ``device`` with its index, where it has one. Raises BackendError where it cannot be used."""
    try:
        return torch.empty(0, device=device).device
    except Exception as error:  # torch has several
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BackendError(f"device {str(device)!r} cannot be used here: {first}") from error
