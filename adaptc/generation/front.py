"""What a fresh cache begins with: the keys and values of an adapter that puts some in front of a text.

Before: what runs a step program, and its adapter. After: a tensor for each input of the cache, (1, heads, count,
width), computed once for each binding, or None where the adapter has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from adaptc.passes.ir.attachment import Attachment
from adaptc.passes.ir.program_method import ProgramMethod
from adaptc.program.bound import Keeping

_KNOWN: WeakKeyDictionary[Any, list[Tensor] | None] = WeakKeyDictionary()


def begins(runs: Any) -> list[Attachment]:
    """The attachments of a program, or of what is bound to one, that say what a cache begins with."""
    adaptation = getattr(getattr(runs, "program", runs), "adaptation", None)
    attachments: Sequence[Attachment] = () if adaptation is None else adaptation.attachments
    return [a for a in attachments if isinstance(a.method, ProgramMethod) and a.method.changes("cached")]


def binding_of(runs: Any) -> Any:
    """The adapter that calls which begin now have."""
    return runs.binding if isinstance(runs, Keeping) else runs.current


def front_of(runs: Any, binding: Any) -> list[Tensor] | None:
    """What a cache for ``binding`` begins with."""
    found = begins(runs) if binding is not None and binding.values else []
    if not found:
        return None
    if binding not in _KNOWN:
        _KNOWN[binding] = _computed(found, binding)
    return _KNOWN[binding]


@torch.no_grad()
def _computed(found: Sequence[Attachment], binding: Any) -> list[Tensor] | None:
    rows: list[Tensor] = []
    for a in found:
        method = a.method.evaluated()
        assert isinstance(method, ProgramMethod)
        slots = {n: binding.values[f].detach() for n, f in a.slots.items()}
        if method.lengthens(slots):
            rows.append(method.cached(slots, {}))
    return [t.unsqueeze(0) for t in torch.cat(rows, 2)] if rows else None
