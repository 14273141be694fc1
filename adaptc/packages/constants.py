"""The constants of compiled code that adapters fill: the values of one adapter at a time, in memory of ours.

The code is compiled with one set of constants and reads them in every call. Loading it once per adapter would hold the
base once per adapter, too. So each adapter keeps values of its own, and a call that finds another's in the code copies
its own in first: one pass over the bytes of an adapter.

Before a call: a set of values for every constant, of exactly its shape and dtype. After: the result is of these values
alone, whatever other threads call. Calls take turns, as torch's loader with its one set of constants lets them anyway.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptc.binding.binding import Binding
from adaptc.errors import BackendError
from adaptc.locks import free_in_children
from adaptc.torch_modes import outside_transforms, plainly


@dataclass(frozen=True, eq=False)
class Fitted(Binding):
    """A binding as a package holds it. ``constants`` has its values as the code takes them, by name, and nobody writes
    to these; in ``values`` are those alone that no code reads. ``owner``: the package they fit."""

    constants: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    owner: object = None

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in (*self.constants.values(), *self.values.values()))


class Constants:
    """Runs the code of one package. ``shapes``: constant -> its shape and dtype; ``first``: what the code was compiled
    with."""

    def __init__(
        self,
        loader: Any,
        shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        device: torch.device,
        first: Fitted | None,
    ) -> None:
        self._loader, self._shapes, self._device = loader, shapes, device
        self._lock = free_in_children(threading.Lock())
        self._held: Fitted | None = first
        self._buffers: dict[str, Tensor] = {}
        self._given: dict[str, Tensor] = {}
        self._done: Any = None

    def run(self, fitted: Fitted | None, inputs: list[Tensor]) -> list[Tensor]:
        """The outputs of the code with these values; ``inputs`` is emptied. None: it has none to fill."""
        with self._lock, outside_transforms(), torch.no_grad():
            self._wait()
            if fitted is not self._held and fitted is not None:
                self._held = None  # until all is copied: what is interrupted is copied anew
                with plainly():
                    self._fill(fitted.constants)
                self._held = fitted
            out = self._loader.boxed_run(inputs)
            self._note()
            return out

    def write(self, place: int, values: Mapping[str, Tensor]) -> None:
        """Put the values of one adapter at its place in those of all, of a bank. No call sees a part of it."""
        with self._lock, plainly(), torch.no_grad():
            self._wait()
            if not self._buffers and self._held is not None:
                self._fill(self._held.constants)
                self._held = None  # its values are in the code now, and nobody else has them
            for fqn, buffer in self._buffers.items():
                buffer[place].copy_(values[fqn])

    def _fill(self, values: Mapping[str, Tensor]) -> None:
        """The code gets tensors of ours to read once, and later fills write to them: torch keeps what
        ``load_constants(user_managed=True)`` replaces alive for ever, so a fresh set each time would leak."""
        if self._buffers:
            for fqn, buffer in self._buffers.items():
                buffer.copy_(values[fqn])
            return
        buffers = {
            fqn: torch.empty(shape, dtype=dtype, device=self._device).copy_(values[fqn])
            for fqn, (shape, dtype) in self._shapes.items()
        }
        # The code reads them from here on, were what follows interrupted: whoever frees them would crash it.
        self._given = buffers
        try:
            self._loader.load_constants(buffers, use_inactive=False, check_full_update=False, user_managed=True)
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BackendError(f"the compiled code does not take an adapter's values: {first}") from error
        self._buffers = buffers

    def _wait(self) -> None:
        """A thread may have a stream of its own, and the call before may be running on another still."""
        if self._done is not None:
            torch.accelerator.current_stream(self._device).wait_event(self._done)

    def _note(self) -> None:
        if self._device.type != "cpu":
            self._done = torch.accelerator.current_stream(self._device).record_event()
