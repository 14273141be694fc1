"""Check an adapter's tensors against the slots of a program, and explain what does not fit.

Each error names the key, what was expected there, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter_files.directory import all_finite
from adaptc.binding.binding import BindingSpec
from adaptc.binding.suggest_mapping import suggest_mappings
from adaptc.errors import CheckpointError, ConfigError, SwapError, nearest, short_repr
from adaptc.methods import AdapterConfig
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Method

#: the largest magnitude that a scale may have
MAX_SCALE = torch.finfo(torch.float32).max


def check_rank(a: Attachment, method: Method, slot_tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError where the rank read off an adapter's tensors is 0, which configs refuse."""
    if method.sizes.rank() != 0:
        return
    told = ", ".join(f"{n!r} of shape {tuple(t.shape)}" for n, t in slot_tensors.items() if not t.numel())
    raise CheckpointError(
        f"{source}: {told} at site {a.fqn!r} would do nothing, since it has no values. Leave the tensors of the site "
        "out, and bind None for the base."
    )


def check_method(a: Attachment, config: AdapterConfig, site_tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError for tensors of the method at a site whose ``config`` is that of another method."""
    if site_tensors and not a.method.is_made_by(config, a):
        name = next(iter(site_tensors))
        raise CheckpointError(
            f"{source}: its config says {config.peft_type}, and {a.key!r} has the tensor {name!r} of the method "
            f"{a.method.name!r}, which the program has there. The config does not belong to the weights: give the one "
            "that they were saved with."
        )


def check_shapes(a: Attachment, op: Op, method: Method, slot_tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise SwapError for slots that the program lacks at a site, and CheckpointError for missing and misshapen
    tensors."""
    compiled = a.method.slots(op)
    for slot, spec in method.slots(op).items():
        if not spec.saved:
            continue
        key = a.file_key(slot, spec)
        if slot not in compiled:
            raise SwapError(
                f"{source}: the adapter has {slot!r} at {a.key!r}, and the program was compiled without it. Compile "
                "with the options of this adapter, or with a list that contains it: compile(model, [..., adapter])."
            )
        if slot not in slot_tensors:
            raise CheckpointError(f"{source}: key {key!r} is missing, while other tensors of its site are there")
        shape = tuple(slot_tensors[slot].shape)
        if len(shape) == len(spec.shape):
            pairs = enumerate(zip(shape, spec.shape, strict=True))
            shape = tuple(min(h, w) if i in spec.shared_axes_cut else h for i, (h, w) in pairs)
        if shape != spec.shape:
            raise CheckpointError(
                f"{source}: {key!r} has shape {tuple(slot_tensors[slot].shape)}, expected {spec.shape} at site "
                f"{a.fqn!r}. The adapter was made for another model, or its config does not belong to its weights."
            )


def check_number_kinds(
    a: Attachment,
    op: Op,
    method: Method,
    slot_tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    source: str,
    *,
    is_read: bool,
) -> None:
    """Raise CheckpointError for tensors with a kind of numbers (boolean, integer, real, complex) that their slots
    cannot hold.

    ``dtype`` is that of slots that name none. Unless the method has ``is_read`` them, only boolean and complex tensors
    are checked, since the method may convert others.
    """
    slots = method.slots(op)
    for name, t in slot_tensors.items():
        wanted = (slots[name].dtype if name in slots else None) or dtype
        if is_read or t.dtype is torch.bool or (t.is_complex() and not dtype.is_complex):
            check_number_kind(a.file_key(name, slots[name]) if name in slots else name, t, wanted, source)


def check_number_kind(key: str, t: Tensor, slot_dtype: torch.dtype, source: str) -> None:
    """Raise CheckpointError where a cast of ``t`` to ``wanted`` would lose a part of its numbers, such as the imaginary
    one."""
    have = _number_kind(t.dtype)
    if have != _number_kind(slot_dtype) and (have, _number_kind(slot_dtype)) != ("real", "complex"):
        raise CheckpointError(
            f"{source}: {key!r} holds {have} numbers ({t.dtype}), and its slot {_number_kind(slot_dtype)} ones "
            f"({slot_dtype}). The adapter was made for another model, or its tensors are not the adapter's values; "
            "convert them if they are."
        )


def _number_kind(dtype: torch.dtype) -> str:
    if dtype is torch.bool:
        return "boolean"
    return "complex" if dtype.is_complex else "real" if dtype.is_floating_point else "integer"


@dataclass(frozen=True, eq=False)
class Cast:
    """A tensor of an adapter, and the tensor that was made of it for the slot or base weight called ``fqn``."""

    key: str
    fqn: str
    original: Tensor
    converted: Tensor


@torch.no_grad()
def check_casts(casts: Sequence[Cast], source: str) -> None:
    """Raise CheckpointError where values do not fit into the dtype of their slot."""
    changed = [c for c in casts if c.original.dtype != c.converted.dtype]
    real = [c for c in changed if c.converted.is_floating_point() or c.converted.is_complex()]
    lost: list[Cast] = []
    if not all_finite(c.converted for c in real):
        lost = [
            c for c in real if bool((~_is_finite(c.converted).to(c.original.device) & _is_finite(c.original)).any())
        ]
    whole = [c for c in changed if _number_kind(c.converted.dtype) == _number_kind(c.original.dtype) == "integer"]
    lost += [c for c in whole if not torch.equal(c.converted.to(c.original), c.original)]
    for c in lost:
        raise CheckpointError(
            f"{source}: {c.key!r} holds values too large for {c.converted.dtype}, the dtype of its slot at {c.fqn!r} "
            f"(the largest is {c.original.abs().max().item():.6g}). Compile with slots of a wider dtype "
            "(autocast_adapter_dtype=True gives float32 above half-precision weights), or check the file."
        )


def _is_finite(t: Tensor) -> Tensor:
    return torch.isfinite(t.float() if t.is_floating_point() and t.itemsize == 1 else t)


def finite_scale(scale: Any, a: Attachment, config: AdapterConfig) -> float:
    """Return a method's scale as a float. Raises ConfigError where it is no number that is finite in float32."""
    try:
        number = float(scale)
    except (TypeError, ValueError, OverflowError):
        number = nan
    if not abs(number) <= MAX_SCALE:
        raise ConfigError(
            f"the scale of {a.method.name!r} at {a.key or a.fqn!r} must be a number that is finite in float32, got "
            f"{short_repr(scale)}; it follows from the alpha, the rank and their like of {type(config).__name__}"
        )
    return number


def unbound_keys_error(
    spec: BindingSpec, config: AdapterConfig, keys: list[str], source: str, tensors: Mapping[str, Tensor]
) -> SwapError:
    """Return the error for ``keys``, which no slot has taken, of all of an adapter's ``tensors``."""
    named = [(a, a.file_key(n, s)) for a in spec.attachments for n, s in a.method.slots(spec.ops[a.id]).items()]
    known = [key for _, key in named]
    few = "; ".join(repr(k) if k in known else _key_with_nearest(k, known) for k in keys[:3])
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    summary = f"{source}: {len(keys)} of its tensors have no slot in the program: {few}{more}."
    slot_names = {key.removeprefix(f"{a.key}.") for a, key in named}
    given = list(tensors)
    if mappings := suggest_mappings(given, [a.key for a in spec.attachments], slot_names):
        return SwapError(f"{summary} They fit under other names: pass {_format_mappings(mappings)}.")
    explanation = _explain_options(spec, config, keys)
    explanation = explanation or _explain_method(spec, config, keys)
    explanation = (
        explanation or f"The program was compiled without the sites {sorted({_module_path(k) for k in keys})[:3]}"
    )
    modules = {fqn.rpartition(".")[0] for fqn in spec.weights}
    if mappings := suggest_mappings(given, modules, slot_names):
        return SwapError(
            f"{summary} The model has all of its modules under other names, and the program was compiled without some "
            f"of them; to have them, compile for this adapter: compile(model, adapter, {_format_mappings(mappings)})."
        )
    return SwapError(
        f"{summary} {explanation}; to have them, compile for this adapter, or for several at once: "
        "compile(model, [adapter, another])."
    )


def _key_with_nearest(key: str, known: Sequence[str]) -> str:
    return f"{key!r} (nearest: {', '.join(nearest(key, known, 2)) or 'none'})"


def _format_mappings(mappings: Sequence[Mapping[str, str]]) -> str:
    """Return mappings as the argument ``key_mapping=``, to be shown in an error."""
    return " or ".join(f"key_mapping={{{_format_pairs(m)}}}" for m in mappings[:3])


def _format_pairs(mapping: Mapping[str, str]) -> str:
    return ", ".join(f"{_regex_literal(old)}: {_regex_literal(new)}" for old, new in mapping.items())


def _regex_literal(text: str) -> str:
    """Return the literal of a regular expression, as a raw string where it has backslashes."""
    return f'r"{text}"' if "\\" in text and '"' not in text and text.isprintable() else repr(text)


def _explain_options(spec: BindingSpec, config: AdapterConfig, keys: list[str]) -> str:
    """Return a sentence on the options in which the adapter differs from the code of a site of these keys, '' where
    none."""
    for a in spec.attachments:
        here, own = a.method.structure(), a.method.rebind(config, a).sizes.specialized_for(spec.ops[a.id]).structure()
        # A slot that stands for the whole program has no module path in its key.
        mine = {a.file_key(n, s) for n, s in a.method.slots(spec.ops[a.id]).items()}
        if here != own and any(k in mine or k.startswith(f"{a.key}.") for k in keys):
            names = [n for n in own if own[n] != here.get(n)]
            at, has = (", ".join(f"{n}={d.get(n)!r}" for n in names) for d in (here, own))
            return f"The code at {a.key or a.fqn!r} was compiled for {at}, and the adapter has {has}"
    return ""


def _explain_method(spec: BindingSpec, config: AdapterConfig, keys: list[str]) -> str:
    """Return a sentence on the other method that the program has at a site of these keys, or '' where there is none."""
    sites = {_module_path(k) for k in keys}
    for a in spec.attachments:
        if a.key in sites:
            return f"At {a.key!r} the program has the method {a.method.name!r}, and the adapter is {config.peft_type}"
    return ""


def _module_path(key: str) -> str:
    """Return the module path in a key.

    It ends before one of the last three parts that has an underscore, as PEFT's tensor names have.
    """
    parts = key.split(".")
    cut = next((i for i in range(len(parts) - 1, 0, -1) if "_" in parts[i] and i >= len(parts) - 3), len(parts))
    return ".".join(parts[:cut])
