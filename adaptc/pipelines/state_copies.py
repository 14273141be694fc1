"""Keep copies of programs on a device whose memory they take only while they run there.

accelerate's hooks move a module to its device before a call, and back to the CPU before the next module runs. A program
is captured for one device. So it is copied once, and its copy is given weights when it is moved there, and gives them
up when it is moved back. Nothing is compiled again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from adaptc.binding.binding import Binding
from adaptc.passes.graph.storage import storage_key


class StateCopies:
    """The copies of programs and adapters whose own tensors stay on the device ``home``."""

    def __init__(self, home: torch.device) -> None:
        self.home = home
        self._copies: WeakKeyDictionary[Any, dict[torch.device, Any]] = WeakKeyDictionary()
        #: a copy of an adapter -> the adapter, and a copy of a program -> the program
        self._adapters: WeakKeyDictionary[Binding, Binding] = WeakKeyDictionary()
        self._programs: WeakKeyDictionary[Any, ref[Any]] = WeakKeyDictionary()
        #: programs whose copies run now, and which nothing else may hold
        self._kept: Sequence[Any] = ()

    def has(self, program: Any) -> bool:
        """Return whether ``program`` is a copy."""
        return program in self._programs

    def on(self, it: Any, device: torch.device) -> Any:
        """Return a program or an adapter as it is on ``device``; what was made elsewhere than ``home`` moves for good.

        Raises BackendError where the device does not exist.
        """
        return self._adapter_on(it, device) if isinstance(it, Binding) else self._program_on(it, device)

    def _adapter_on(self, adapter: Binding, device: torch.device) -> Binding:
        original = self._adapters.get(adapter, adapter)
        if device == self.home:
            return adapter.to(device) if original is adapter else original
        copy = adapter.to(device)
        self._adapters[copy] = original
        return copy

    def _program_on(self, program: Any, device: torch.device) -> Any:
        found = self._programs.get(program)
        original = program if found is None else found()
        assert original is not None  # it is kept while its copy runs
        if original.device == device:
            return original
        if original.device != self.home:
            return original.to(device)
        copies = self._copies.setdefault(original, {})
        if (copy := copies.get(device)) is None:
            copy = copies[device] = original.to(device)
            self._programs[copy] = ref(original)
        else:
            _give_weights(copy, original, device)
        return copy

    def leave(self, programs: Sequence[Any]) -> None:
        """Free the memory of the copies among these programs, which do not run for now, and keep the others."""
        self._kept = [p for p in programs if not self.has(p)]
        for program in programs:
            if self.has(program):
                for tensor in _tensors(program).values():
                    tensor.data = tensor.data.new_empty(0)


def _give_weights(copy: Any, original: Any, device: torch.device) -> None:
    own, moved = _tensors(original), dict[Any, Tensor]()
    for fqn, tensor in _tensors(copy).items():
        key = storage_key(own[fqn])  # tied weights stay tied
        if key not in moved:
            moved[key] = own[fqn].detach().to(device)
        tensor.data = moved[key]


def _tensors(program: Any) -> dict[str, Tensor]:
    return {n: t for n, t in program.base_tensors_or_empty().items() if isinstance(t, Tensor)}
