"""What does not fit: the checks of an adapter's tensors against the slots of a program, and what their errors say.

Before: tensors found for a site, or keys that nothing has taken. After: nothing, or the error that names the key, what
was expected there, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from adaptc.binding.binding import BindingSpec
from adaptc.errors import CheckpointError, SwapError, nearest
from adaptc.methods import AdapterConfig
from adaptc.passes.ir.attachment import Attachment
from adaptc.passes.ir.method import Method
from adaptc.passes.ir.ops import Op


def check_shapes(a: Attachment, op: Op, method: Method, found: Mapping[str, Tensor], source: str) -> None:
    """Raises SwapError for slots the program lacks at a site, CheckpointError for missing and misshapen tensors."""
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
        if slot not in found:
            raise CheckpointError(f"{source}: key {key!r} is missing, while other tensors of its site are there")
        shape = tuple(found[slot].shape)
        if len(shape) == len(spec.shape):
            pairs = enumerate(zip(shape, spec.shape, strict=True))
            shape = tuple(min(h, w) if i in spec.shared_axes_cut else h for i, (h, w) in pairs)
        if shape != spec.shape:
            raise CheckpointError(
                f"{source}: {key!r} has shape {tuple(found[slot].shape)}, expected {spec.shape} at site "
                f"{a.fqn!r}. The adapter was made for another model, or its config does not belong to its weights."
            )


def unbound(spec: BindingSpec, config: AdapterConfig, keys: list[str], source: str) -> SwapError:
    """The error for keys that no slot has taken."""
    known = [a.file_key(n, s) for a in spec.attachments for n, s in a.method.slots(spec.ops[a.id]).items()]
    shown = "; ".join(f"{k!r} (nearest: {', '.join(nearest(k, known, 2)) or 'none'})" for k in keys[:3])
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    why = _other_code(spec, config, keys)
    why = why or _other_method(spec, config, keys)
    why = why or f"The program was compiled without the sites {sorted({_site_of(k) for k in keys})[:3]}"
    return SwapError(
        f"{source}: {len(keys)} of its tensors have no slot in the program: {shown}{more}. {why}; to have them, "
        "compile for this adapter, or for several at once: compile(model, [adapter, another])."
    )


def _other_code(spec: BindingSpec, config: AdapterConfig, keys: list[str]) -> str:
    """In which options the adapter differs from the code of a site that these keys are of, if that is why."""
    for a in spec.attachments:
        here, own = a.method.structure(), a.method.rebind(config, a).at(spec.ops[a.id]).structure()
        if here != own and any(k.startswith(f"{a.key}.") for k in keys):
            names = [n for n in own if own[n] != here.get(n)]
            at, has = (", ".join(f"{n}={d.get(n)!r}" for n in names) for d in (here, own))
            return f"The code at {a.key!r} was compiled for {at}, and the adapter has {has}"
    return ""


def _other_method(spec: BindingSpec, config: AdapterConfig, keys: list[str]) -> str:
    """Where the program has an adapter of another method, if that is why."""
    sites = {_site_of(k) for k in keys}
    for a in spec.attachments:
        if a.key in sites:
            return f"At {a.key!r} the program has the method {a.method.name!r}, and the adapter is {config.peft_type}"
    return ""


def _site_of(key: str) -> str:
    """The module path in a key, as far as the parts look like one: PEFT's names of tensors have an underscore."""
    parts = key.split(".")
    cut = next((i for i in range(len(parts) - 1, 0, -1) if "_" in parts[i] and i >= len(parts) - 3), len(parts))
    return ".".join(parts[:cut])
