"""Settle what the sites of one adapter have in common: sizes of shared slots, and values made of several weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

from adaptc.binding.binding import BindingSpec
from adaptc.errors import SwapError, short_repr
from adaptc.methods import AdapterConfig
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import Method
from adaptc.targets.name_rules import ALL_LINEAR, TargetCandidate, select_targets


def settle_shared_slots(
    methods: Mapping[str, Method], ops: Mapping[str, Op], parameter_order: Iterable[str]
) -> dict[str, Method]:
    """Return the methods of one adapter, by attachment id, with the sizes that ``settle_shared_sizes`` settles among
    them.

    ``parameter_order`` has the FQNs of the model's parameters, in the order of its modules.
    """
    out: dict[str, Method] = dict(methods)
    place = {fqn: n for n, fqn in enumerate(parameter_order)}
    in_order = sorted(methods, key=lambda i: place.get(i.partition("|")[0], len(place)))
    parts = {i: methods[i].unwrap(ops[i]) for i in in_order}
    for kind in dict.fromkeys(cast(type[Method], type(m)) for m, _ in parts.values()):
        ids = [i for i, (m, _) in parts.items() if type(m) is kind]
        new = kind.sharing.settle_shared_sizes([parts[i] for i in ids])
        out |= {i: methods[i].rewrap(m) for i, m in zip(ids, new, strict=True)}
    return out


def with_weights(methods: Mapping[str, Method], spec: BindingSpec) -> dict[str, Method]:
    """Return the methods of one adapter, by attachment id, as ``with_weights`` makes them know the base weights."""
    out: dict[str, Method] = dict(methods)
    place = {fqn: n for n, fqn in enumerate(spec.weights)}
    present = sorted((a for a in spec.attachments if a.id in methods), key=lambda a: place.get(a.fqn, len(place)))
    parts = {a.id: (*methods[a.id].unwrap(spec.ops[a.id]), partial(spec.canonical_weight, a)) for a in present}
    for kind in dict.fromkeys(cast(type[Method], type(m)) for m, _, _ in parts.values()):
        if kind.sharing.defines("with_weights"):
            ids = [i for i, (m, _, _) in parts.items() if type(m) is kind]
            new = kind.sharing.with_weights([parts[i] for i in ids])
            out |= {i: methods[i].rewrap(m) for i, m in zip(ids, new, strict=True)}
    return out


def sites_of_config(spec: BindingSpec, config: AdapterConfig, source: str) -> Collection[str]:
    """Return the ids of the attachments at modules and parameters that ``config`` names; of all if it names none.

    Raises SwapError where it names a module at which the program has no site, since such a file has no keys that could
    show it.
    """
    modules: Any = getattr(config, "target_modules", None)
    parameters: Sequence[str] = getattr(config, "target_parameters", None) or ()
    if modules is None and not parameters:
        return [a.id for a in spec.attachments]
    names = {a.id: a.name or a.module for a in spec.attachments}
    adapted = {a.module for a in spec.attachments} | set(names.values())
    others = [n.removesuffix(".weight") for n, t in spec.weights.items() if n.endswith(".weight") and t.ndim > 1]
    others = [n for n in others if n not in adapted and modules != ALL_LINEAR]
    kinds = {names[a.id]: a.kind for a in spec.attachments} | dict.fromkeys(others, "")
    found = select_targets(
        [TargetCandidate(name, "", kind, has_linear_base=True) for name, kind in kinds.items()],
        target_modules=modules or [],
        exclude_modules=getattr(config, "exclude_modules", None),
        layers_to_transform=getattr(config, "layers_to_transform", None),
        layers_pattern=getattr(config, "layers_pattern", None),
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        tell=lambda _: None,
    ).names
    lost = [n for n in others if n in found]
    if lost:
        raise SwapError(
            f"{source}: its config names {short_repr(lost)}, where the program has no site, and the values of this "
            f"{config.peft_type} adapter depend on all of its sites. Compile for this adapter, or for several at once: "
            "compile(model, [adapter, another]). If the model never calls the layer, let the adapter be saved with "
            "what its sites have, such as save_indices=True"
        )
    named = {a.id for a in spec.attachments if any(f".{a.fqn}".endswith(f".{p}") for p in parameters)}
    return {i for i, name in names.items() if name in found} | named
