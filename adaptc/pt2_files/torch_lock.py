"""The one lock around torch's code that reads and writes programs.

torch keeps the deserializer at work, and how fake tensors are pickled, in global variables, and fails when two threads
save or load at once. Reading bytes needs no lock.
"""

from __future__ import annotations

from threading import RLock

TORCH = RLock()
