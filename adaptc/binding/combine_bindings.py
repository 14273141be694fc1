"""Combine several adapters, each with a name, into one binding in which they act together.

Each adapter has attachments of its own, and one is composed on the other in the given order. This takes the program's
spec, and a binding of each adapter to its own part of the program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from adaptc.adapter_files.check_state_dict import is_state_dict
from adaptc.adapter_files.origin import PEFT
from adaptc.binding.bind import joined
from adaptc.binding.binding import Binding, BindingSpec
from adaptc.errors import ConfigError
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Method


def part_of(spec: BindingSpec, name: str) -> BindingSpec:
    """Return the spec of one of several adapters that act together."""
    return replace(spec, attachments=[a for a in spec.attachments if a.adapter == name])


def together(
    parts: Mapping[str, Binding], attachments: Sequence[Attachment], others: Mapping[str, Tensor] | None = None
) -> Binding:
    """Return one binding of several adapters that act together.

    ``others`` holds the values of attachments that no longer belong to an adapter. Raises ConfigError where two
    adapters change the same base weight, or train what only one of them can.
    """
    _check_clashes(parts, attachments)
    first = next(iter(parts.values()))
    own: dict[str, Any] = {n: {} for n in ("values", "methods", "base", "carried", "bases", "factors")}
    out = replace(first, **own, parts=dict(parts), origin=PEFT, idle=None)
    changed: dict[str, str] = {}
    for name, part in parts.items():
        for fqn in part.base:
            if changed.setdefault(fqn, name) != name:
                raise ConfigError(
                    f"the adapters {changed[fqn]!r} and {name!r} both change the base weight {fqn!r} (PiSSA and OLoRA "
                    "initialisations do), so they cannot act together; merge one of them first"
                )
        for mine, theirs in ((out.values, part.values), (out.methods, part.methods), (out.base, part.base)):
            mine.update(theirs)  # type: ignore[attr-defined]  # made here
        out.carried.update(part.carried)  # type: ignore[attr-defined]
        out.bases.update(part.bases)  # type: ignore[attr-defined]
        out.factors.update(part.factors)  # type: ignore[attr-defined]
    out.values.update(others or {})  # type: ignore[attr-defined]
    return replace(out, source=" + ".join(p.source for p in parts.values()))


def _check_clashes(parts: Mapping[str, Binding], attachments: Sequence[Attachment]) -> None:
    setting: dict[str, list[tuple[str, Method]]] = {}
    for name, part in parts.items():
        for a in attachments:
            method = part.methods.get(a.id)
            if method is None:
                continue
            for first, other in setting.setdefault(a.fqn, []):
                if what := method.clash(other):
                    raise ConfigError(
                        f"the adapters {first!r} and {name!r} both train {what} in {a.fqn!r} (modules_to_save, biases, "
                        "trainable and virtual tokens take the place of what was there), so they cannot act together: "
                        "only one of the two would count. Train it in one of them"
                    )
            setting[a.fqn].append((name, method))


def named(config: Any) -> dict[str, Any] | None:
    """Return ``config`` as a dict of adapters by name, or None where it is one config or a state dict.

    Raises ConfigError for a name that is no text, is empty or has a dot.
    """
    if not isinstance(config, Mapping) or "peft_type" in config or not config or is_state_dict(config):
        return None
    bad = [n for n in config if not isinstance(n, str) or not n or "." in n]
    if bad:
        raise ConfigError(f"names of adapters must be texts without dots, which are parts of names; found {bad[0]!r}")
    return dict(config)


def joint_spec(spec: BindingSpec) -> BindingSpec:
    """Return a spec whose methods know of each other across all plans, so that shared slots are large enough for every
    site."""
    by_adapter: dict[str, list[Attachment]] = {}
    for a in spec.attachments:
        by_adapter.setdefault(a.adapter, []).append(a)
    methods = {}
    for group in by_adapter.values():
        methods |= joined({a.id: a.method for a in group}, spec.ops)
    return replace(spec, attachments=[replace(a, method=methods[a.id]) for a in spec.attachments])
