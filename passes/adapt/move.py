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
    """A pass that moves a program to ``device``; its count is that of the tensors moved."""

    name: ClassVar[str] = "move_to_device"

    device: torch.device

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        lifted = LiftedProgram(subject)
        moved: dict[Any, Tensor] = {}
        for tensors in (lifted.state_dict, lifted.constants):
            for name, t in tensors.items():
                if isinstance(t, Tensor):
                    key = storage_key(t)
                    moved[key] = tensors[name] = moved[key] if key in moved else self._move_tensor(t)
        # The pass changes what it is given: the example inputs too, which the program given shares until here.
        return PassResult(move_to_device_pass(lifted.finish(), self.device), len(moved))

    def _move_tensor(self, t: Tensor) -> Tensor:
        new = t.detach().to(self.device)
        return nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new


def usable_device(device: torch.device | str) -> torch.device:
    """Return ``device`` with its index, where it has one. Raises BackendError where it cannot be used."""
    try:
        return torch.empty(0, device=device).device
    except Exception as error:  # torch has several
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BackendError(f"device {str(device)!r} cannot be used here: {first}") from error
