"""Fingerprint the base of a program: each of its weights and persistent buffers, and all of them together.

The weights that an adapter changed (PiSSA, OLoRA) are left out, since a file has only the adapter's version of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

from torch.export import ExportedProgram

from adaptc.binding.check_binding import fingerprint
from adaptc.passes.graph.storage import storage_key
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.state.core import ProgramCore


def adapter_tensor_names(program: ExportedProgram) -> Collection[str]:
    """Return the names in the state dict of ``program`` that are the adapter's, not the base's."""
    if not isinstance(program, ProgramCore):
        return ()
    return {*program.binding_plans.tensor_names, *program.adaptation.unread.values()}


def changed_weights(program: ExportedProgram) -> list[str]:
    """Return the names of the base weights that the current adapter of ``program`` has its own version of."""
    if not isinstance(program, ProgramCore):
        return []
    current = () if program.current is None else program.current.changed_base
    return sorted({*program.adaptation.residual, *current})


def base_fingerprints(program: ExportedProgram) -> dict[str, str]:
    """Return the fingerprint of each weight and persistent buffer of the base of ``program``, by name."""
    left_out = {*adapter_tensor_names(program), *changed_weights(program)}
    return fingerprints_of({n: t for n, t in program.state_dict.items() if n not in left_out})


def fingerprints_of(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Return the fingerprint of each tensor by name. A tensor of several names is read once."""
    known: dict[Any, str] = {}
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        key = storage_key(tensor)
        if key not in known:
            known[key] = _fingerprint(tensor)
        found[name] = known[key]
    return found


def joint_fingerprint(fingerprints: Mapping[str, str]) -> str:
    """Return one fingerprint for what has these fingerprints by name, such as the weights of a base."""
    lines = (f"{name}\n{value}\n" for name, value in sorted(fingerprints.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _fingerprint(tensor: Any) -> str:
    if isinstance(tensor, QuantizedTensor):
        return joint_fingerprint({tensor.scheme_text: "", **fingerprints_of(tensor.stored)})
    return fingerprint(tensor)
