"""Check that a finished binding fits a program for which it may not have been made.

The binding has the names of the program's slots. Shapes, dtypes and the code of each site are compared. Where the
adapter has its own version of base weights (PiSSA), the base must be the one it was made for, told by
:func:`fingerprint`.
"""

from __future__ import annotations

import hashlib
from typing import NoReturn

import torch
from torch import Tensor

from adaptc.binding.binding import Binding, BindingSpec
from adaptc.errors import SwapError
from adaptc.passes.protocol.attachment import Attachment

_BIND_HINT = "Bind the adapter to this program: prog.bind(...) or adaptc.swap(prog, ...) with its files or tensors"


def fingerprint(weight: Tensor) -> str:
    """Return a hash of a weight, which is equal for weights of equal shape, dtype and bits."""
    plain = weight.detach().cpu().contiguous()
    data = plain.view(torch.uint8) if plain.ndim else plain.reshape(1).view(torch.uint8)
    return hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)} ".encode() + data.numpy().tobytes()).hexdigest()


def check_binding_fits(spec: BindingSpec, binding: Binding) -> None:
    """Raise SwapError, with the slot and the difference, where ``binding`` does not fit the program of ``spec``."""
    for a in spec.attachments:
        _check_site(spec, a, binding)
    for fqn in spec.residual:
        if fqn not in binding.base_fingerprints:
            _refuse(
                f"the program's file holds only its own adapter's version of {fqn!r}, and the binding is of the base",
                "Compile the original model instead",
            )
    for fqn, print_ in binding.base_fingerprints.items():
        if fqn not in spec.weights or fingerprint(spec.weights[fqn]) != print_:
            _refuse(f"its adapter changed the base weight {fqn!r}, and here that weight is another one", _BIND_HINT)


def _check_site(spec: BindingSpec, a: Attachment, binding: Binding) -> None:
    op, own = spec.ops[a.id], binding.methods.get(a.id)
    if own is not None and own.structure() != a.method.structure():
        _refuse(
            f"at {a.fqn!r} the adapter is {own.structure()}, and the program has {a.method.structure()}", _BIND_HINT
        )
    mine = {} if own is None else own.slots(op)
    for name, slot in a.method.slots(op).items():
        fqn = a.slots.get(name) or a.slot_fqn(name, slot)
        value, dtype = binding.values[fqn], slot.dtype or spec.adapter_dtype(a)
        sizes = mine[name].shape if name in mine and not slot.shared_axes_cut else slot.shape
        fixed = range(len(sizes)) if sizes is not slot.shape else [i for i in range(len(sizes)) if i not in slot.free]
        if value.ndim != len(sizes) or any(value.shape[i] != sizes[i] for i in fixed):
            _refuse(f"{fqn!r} has shape {tuple(value.shape)}, expected {tuple(sizes)} at {a.fqn!r}", _BIND_HINT)
        if value.dtype != dtype:
            _refuse(f"{fqn!r} is {value.dtype}, expected {dtype} at {a.fqn!r}", _BIND_HINT)


def _refuse(problem: str, remedy: str) -> NoReturn:
    raise SwapError(f"the binding belongs to another program: {problem}. {remedy}")
