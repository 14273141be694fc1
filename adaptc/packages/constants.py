"""Run compiled code with the values of any adapter in its constants.

The code is compiled with one set of constants and reads them in every call. Loading it once per adapter would hold the
base once per adapter, too. So each adapter keeps values of its own. A call that finds another adapter's values in the
code copies its own in first: one pass over the bytes of an adapter.

An adapter has a value for every constant, of exactly its shape and dtype. A call's result is of these values alone,
whatever other threads call. Calls take turns; torch's loader with its one set of constants allows no more anyway.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from adaptc.binding.binding import Binding
from adaptc.errors import BackendError
from adaptc.locks import reset_after_fork
from adaptc.torch_modes import outside_modes, outside_transforms


@dataclass(frozen=True, eq=False)
class PackagedBinding(Binding):
    """A binding as a package holds it.

    ``constants`` has its values as the code takes them, by FQN; nobody writes to these. ``values`` has only the slots
    that no code reads. ``owner_token`` is a token of the package that the values fit.
    """

    constants: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)
    owner_token: object = None

    def scale_tensor(self, fqn: str) -> Tensor | None:
        return self.constants.get(fqn, self.values.get(fqn))

    def with_scale_tensors(self, scales: Mapping[str, Tensor], factors: Mapping[str, float]) -> Self:
        constants = {**self.constants, **{f: t for f, t in scales.items() if f in self.constants}}
        values = {**self.values, **{f: t for f, t in scales.items() if f not in self.constants}}
        return replace(self, values=values, constants=constants, scale_factors=factors)

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in (*self.constants.values(), *self.values.values()))


class Constants:
    """The constants of compiled code that adapters fill, and the loader that runs the code.

    ``shapes`` maps each constant to its shape and dtype. ``first`` is the adapter that the code was compiled with, None
    where the program has no sites.
    """

    def __init__(
        self,
        loader: Any,
        shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        device: torch.device,
        packaged: PackagedBinding | None,
    ) -> None:
        self._loader, self._shapes, self._device = loader, shapes, device
        self._lock = reset_after_fork(threading.Lock())
        self._loaded: PackagedBinding | None = packaged
        self._buffers: dict[str, Tensor] = {}
        self._passed_buffers: dict[str, Tensor] = {}
        self._last_call: Any = None

    def run(self, binding: PackagedBinding | None, inputs: list[Tensor]) -> list[Tensor]:
        """Return the outputs of the code with the values of ``binding``; ``inputs`` is emptied.

        None leaves the constants as they are: for code without slots, and for a bank.
        """
        with self._lock, outside_transforms(), torch.no_grad():
            self._wait_for_last_call()
            if binding is not self._loaded and binding is not None:
                self._loaded = None  # set again when all is copied: after an interrupt the next call copies anew
                with outside_modes():
                    self._load_values(binding.constants)
                self._loaded = binding
            out = self._loader.boxed_run(inputs)
            self._record_call()
            return out

    def write_member(self, index: int, values: Mapping[str, Tensor]) -> None:
        """Write the values of one adapter of a bank to its index in the constants of all; no call sees a part of it."""
        with self._lock, outside_modes(), torch.no_grad():
            self._wait_for_last_call()
            if not self._buffers and self._loaded is not None:
                self._load_values(self._loaded.constants)
                self._loaded = None  # the buffers have its values now, so the adapter's own copy can be freed
            for fqn, buffer in self._buffers.items():
                buffer[index].copy_(values[fqn])

    def _load_values(self, values: Mapping[str, Tensor]) -> None:
        """Copy ``values`` into the constants of the code. Raises BackendError where the code does not take them.

        The first fill makes the loader read buffers of this object, and later ones write to these buffers. torch keeps
        what ``load_constants(user_managed=True)`` replaces alive for ever, so a new set each time would leak.
        """
        if self._buffers:
            for fqn, buffer in self._buffers.items():
                buffer.copy_(values[fqn])
            return
        buffers = {
            fqn: torch.empty(shape, dtype=dtype, device=self._device).copy_(values[fqn])
            for fqn, (shape, dtype) in self._shapes.items()
        }
        # Kept before the load: if that is interrupted, the code may read the buffers, and freeing them would crash it.
        self._passed_buffers = buffers
        try:
            self._loader.load_constants(buffers, use_inactive=False, check_full_update=False, user_managed=True)
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BackendError(f"the compiled code does not take an adapter's values: {first}") from error
        self._buffers = buffers

    def _wait_for_last_call(self) -> None:
        """Make the current stream wait for the last call, which may still run on another thread's stream."""
        if self._last_call is not None:
            torch.accelerator.current_stream(self._device).wait_event(self._last_call)

    def _record_call(self) -> None:
        if self._device.type != "cpu":
            self._last_call = torch.accelerator.current_stream(self._device).record_event()
