"""Combine several adapters, each with a name, into one binding in which they act together.

Each adapter has attachments of its own, and one is composed on the other in the given order. This takes the program's
spec, and a binding of each adapter to its own part of the program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from adaptc.adapter_files.adapter_data import PEFT_ORIGIN
from adaptc.adapter_files.check_state_dict import is_state_dict
from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.common_to_sites import settle_shared_slots
from adaptc.errors import ConfigError
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Method
from adaptc.torch_typing import is_mapping


def spec_of_adapter(spec: BindingSpec, name: str) -> BindingSpec:
    """Return the spec of one of several adapters that act together."""
    return replace(spec, attachments=[a for a in spec.attachments if a.adapter == name])


def stack_bindings(
    bindings: Mapping[str, Binding], attachments: Sequence[Attachment], other_values: Mapping[str, Tensor] | None = None
) -> Binding:
    """Return one binding of several adapters that act together.

    ``other_values`` holds the values of attachments that no longer belong to an adapter. Raises ConfigError where two
    adapters change the same base weight, or train what only one of them can.
    """
    _check_clashes(bindings, attachments)
    first = next(iter(bindings.values()))
    own: dict[str, Any] = {
        n: {} for n in ("values", "methods", "changed_base", "extra_tensors", "base_fingerprints", "scale_factors")
    }
    own["idle_tensors"] = {k: t for b in bindings.values() for k, t in b.idle_tensors.items()}
    out = replace(first, **own, joint_adapters=dict(bindings), origin=PEFT_ORIGIN, active_form=None)
    changed: dict[str, str] = {}
    for name, part in bindings.items():
        for fqn in part.changed_base:
            if changed.setdefault(fqn, name) != name:
                raise ConfigError(
                    f"the adapters {changed[fqn]!r} and {name!r} both change the base weight {fqn!r} (PiSSA and OLoRA "
                    "initialisations do), so they cannot act together; merge one of them first"
                )
        for mine, theirs in (
            (out.values, part.values),
            (out.methods, part.methods),
            (out.changed_base, part.changed_base),
        ):
            mine.update(theirs)  # type: ignore[attr-defined]  # made here
        out.extra_tensors.update(part.extra_tensors)  # type: ignore[attr-defined]
        out.base_fingerprints.update(part.base_fingerprints)  # type: ignore[attr-defined]
        out.scale_factors.update(part.scale_factors)  # type: ignore[attr-defined]
    out.values.update(other_values or {})  # type: ignore[attr-defined]
    return replace(out, source=" + ".join(p.source for p in bindings.values()))


def _check_clashes(bindings: Mapping[str, Binding], attachments: Sequence[Attachment]) -> None:
    methods_by_weight: dict[str, list[tuple[str, Method]]] = {}
    for name, part in bindings.items():
        for a in attachments:
            method = part.methods.get(a.id)
            if method is None:
                continue
            for first, other in methods_by_weight.setdefault(a.fqn, []):
                if what := method.conflict_with(other):
                    raise ConfigError(
                        f"the adapters {first!r} and {name!r} both train {what} in {a.fqn!r} (modules_to_save, biases, "
                        "trainable and virtual tokens take the place of what was there), so they cannot act together: "
                        "only one of the two would count. Train it in one of them"
                    )
            methods_by_weight[a.fqn].append((name, method))


def adapters_by_name(config: Any) -> dict[str, Any] | None:
    """Return ``config`` as a dict of adapters by name, or None where it is one config or a state dict.

    Raises ConfigError for a name that is no text, is empty or has a dot.
    """
    if not is_mapping(config) or "peft_type" in config or not config or is_state_dict(config):
        return None
    bad = [n for n in config if not isinstance(n, str) or not n or "." in n]
    if bad:
        raise ConfigError(f"names of adapters must be texts without dots, which are parts of names; found {bad[0]!r}")
    return dict(config)


def with_settled_sizes(spec: BindingSpec) -> BindingSpec:
    """Return a spec whose methods know of each other across all plans, so that shared slots are large enough for every
    site."""
    by_adapter: dict[str, list[Attachment]] = {}
    for a in spec.attachments:
        by_adapter.setdefault(a.adapter, []).append(a)
    methods: dict[str, Method] = {}
    for group in by_adapter.values():
        methods |= settle_shared_slots({a.id: a.method for a in group}, spec.ops, spec.weights)
    return replace(spec, attachments=[replace(a, method=methods[a.id]) for a in spec.attachments])
