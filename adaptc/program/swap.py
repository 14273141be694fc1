"""Another adapter for a program, put in place.

Before: a program that any threads call and swap. After: the new binding is the current one; or an error, and the old
one is. Where adapters act together and threads change different ones of them, all of these changes are there.
"""

from __future__ import annotations

from typing import Any

from adaptc.binding.binding import Binding
from adaptc.binding.source import as_binding
from adaptc.program.core import ProgramCore


def swapped(program: ProgramCore, adapter: Any, **options: Any) -> Binding:
    """See ``adaptc.swap``; ``options`` as for :func:`as_binding`. Gives what is current now."""
    trainable = program.adaptation.training
    while True:
        old = program.current
        new = as_binding(program, adapter, trainable=trainable, **options)
        if old is None or not old.parts:
            program.install(new)
            return new
        if program.exchange(old, new):
            return new
