"""Swap the adapter of a program for another one, while any threads call and swap it.

The new binding becomes the current one, or an error leaves the old one in place. Where adapters act together and
threads swap different ones of them, all of these changes are kept.
"""

from __future__ import annotations

from typing import Any

from adaptc.binding.bind_adapter import bind_adapter
from adaptc.binding.binding import Binding
from adaptc.state.core import ProgramCore


def swap_adapter(program: ProgramCore, adapter: Any, **options: Any) -> Binding:
    """Bind ``adapter`` to ``program``, make that the current binding and return it; ``adaptc.swap`` tells more.
    ``options``: those of :func:`bind_adapter`."""
    trainable = program.adaptation.training
    while True:
        old = program.current
        new = bind_adapter(program, adapter, trainable=trainable, **options)
        if old is None or not old.joint_adapters:
            program.install(new)
            return new
        if program.compare_and_swap(old, new):
            return new
