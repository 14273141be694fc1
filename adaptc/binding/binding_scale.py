"""Set how strongly the adapters of a binding act: factors on their scales, which are off, and which are removed.

Each function returns another binding with the same adapters. It neither writes to nor copies any adapter tensor, and
leaves the old binding as it was. A factor is always on the adapter's original scale, so the last one counts: setting
0.5 twice gives 0.5. Scales are tensors of a binding like others, so all code that takes a binding takes one with other
scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adaptc.binding.bind import first_values
from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.check_tensors import finite_scale
from adaptc.binding.combine_bindings import part_of, together
from adaptc.errors import ConfigError, SwapError, did_you_mean, listing, shown
from adaptc.passes.protocol.attachment import Attachment
from adaptc.patterns import compiled, limited
from adaptc.value_types import fitting, rule_of

#: entries that choose modules: names, their endings or beginnings, or one regular expression
Modules = str | Iterable[str] | None
_FACTOR = rule_of(float)


def factor_of(value: Any, option: str = "scale") -> float:
    """Return ``value`` as a factor. Raises ConfigError where it is no finite number."""
    assert _FACTOR is not None
    return float(fitting(option, _FACTOR, value))


def check_names(binding: Binding, names: Iterable[Any]) -> None:
    """Raise ConfigError for a name that is none of the binding's adapters."""
    for name in names:
        if not isinstance(name, str) or name not in binding.named:
            raise ConfigError(
                f"there is no adapter called {shown(name)} here; there are {listing(map(repr, binding.named))}"
            )


def scaled(
    spec: BindingSpec, binding: Binding, scale: Any, adapter: str | None = None, modules: Modules = None
) -> Binding:
    """Return ``binding`` with a factor on one adapter's scale, at the chosen modules or at all that have a scale.

    ``adapter`` may be left out where there is only one. Raises ConfigError for a name or entry that chooses nothing,
    and for methods or modules without a scale.
    """
    if isinstance(scale, str):
        raise ConfigError(
            f"the factor comes first, and then whose it is: set_scale(0.5, adapter={shown(scale)}), not {shown(scale)}"
        )
    parts, name = dict(binding.named), _the_one(binding, adapter)
    parts[name] = _scaled(_own(spec, binding, name), parts[name], name, scale, modules)
    return _of_parts(spec, binding, parts)


def with_scales_multiplied(spec: BindingSpec, binding: Binding, multiplier: float) -> Binding:
    """Return ``binding`` with all factors of all its adapters multiplied, wherever they have a scale.

    Raises ConfigError where no adapter has a scale.
    """
    parts = dict(binding.named)
    found = False
    for name, part in parts.items():
        own, acting = _own(spec, binding, name), part.idle or part
        factors = {a.id: multiplier * acting.factors.get(a.id, 1.0) for a in scaled_sites(own, acting)}
        found = found or bool(factors)
        parts[name] = _with_factors(own, part, factors)
    if not found:
        raise ConfigError(f"{_kinds(binding)} has no scale that could be multiplied")
    return _of_parts(spec, binding, parts)


def with_active(spec: BindingSpec, binding: Binding, adapters: Any) -> Binding:
    """Return ``binding`` with these adapters active and all others turned off.

    ``adapters`` is a name, names, or a mapping of names to their new factors. Raises ConfigError like :func:`scaled`.
    """
    if isinstance(adapters, str):
        adapters = [adapters]
    if not isinstance(adapters, (Mapping, Sequence, set, frozenset)):
        raise ConfigError(
            f"adapters must be a name, a list of names, or a dict of names and factors, got {shown(adapters)}"
        )
    check_names(binding, adapters)
    parts = dict(binding.named)
    for name, part in parts.items():
        own = _own(spec, binding, name)
        part = (part.idle or part) if name in adapters else turned_off(own, part)
        if isinstance(adapters, Mapping) and name in adapters:
            factor = factor_of(adapters[name], f"the factor of {name!r}")
            # A method without a scale acts as it was made. A factor of 1 asks for just that, and must not raise.
            if factor != 1 or scaled_sites(own, part):
                part = _scaled(own, part, name, factor)
        parts[name] = part
    return _of_parts(spec, binding, parts)


def with_scale(spec: BindingSpec, binding: Binding, scale: Any, names: Iterable[str] | None = None) -> Binding:
    """Return ``binding`` with the ``scale`` that a caller gave along with its adapter.

    ``scale`` is a factor for the adapters called ``names``, or for all where that is None. It may also map names to
    factors. None changes nothing.
    """
    if scale is None:
        return binding
    given = scale if isinstance(scale, Mapping) else dict.fromkeys(names or binding.named, scale)
    check_names(binding, given)
    parts = dict(binding.named)
    for name, factor in given.items():
        parts[name] = _scaled(_own(spec, binding, name), parts[name], name, factor)
    return _of_parts(spec, binding, parts)


def without(spec: BindingSpec, binding: Binding, name: str) -> Binding:
    """Return ``binding`` without one of several adapters. Its sites then compute as if it were not there.

    Raises ConfigError for an unknown name, and SwapError for the only adapter.
    """
    check_names(binding, [name])
    left = {n: part for n, part in binding.parts.items() if n != name}
    if not left:
        raise SwapError(f"{name!r} is the only adapter of the program: adaptc.unload(program) gives it without one")
    return binding_of_parts(spec, left)


def binding_of_parts(spec: BindingSpec, parts: Mapping[str, Binding]) -> Binding:
    """Return one binding of several adapters. Attachments of any other adapter get identity values."""
    gone = [a for a in spec.attachments if a.adapter not in parts]
    config = next(iter(parts.values())).config
    others = first_values(replace(spec, attachments=gone), config, only={}).values if gone else {}
    return together(parts, spec.attachments, others)


def scaled_sites(spec: BindingSpec, binding: Binding) -> list[Attachment]:
    """Return the attachments at which the binding has a scale."""
    return [a for a in spec.attachments if (m := binding.methods.get(a.id)) is not None and _has_scale(spec, a, m)]


def turned_off(spec: BindingSpec, part: Binding) -> Binding:
    """Return one adapter with identity values, which keeps its active form in ``idle``.

    Raises SwapError where the program does not have the original base weights.
    """
    if part.idle is not None:
        return part
    if lost := list(spec.residual):
        raise SwapError(
            f"the file this program came from holds only its own adapter's version of {lost[:3]} (its initialisation "
            "changed the base), so its adapter cannot be turned off. Compile the original model instead."
        )
    nothing = first_values(spec, part.config, only={})
    return replace(nothing, name=part.name, source=part.source, origin=part.origin, idle=part)


@limited()
def chosen_sites(spec: BindingSpec, part: Binding, name: str, modules: Modules) -> list[str]:
    """Return the ids of one adapter's attachments that ``modules`` chooses and that have a scale.

    Raises ConfigError where there are none, and for an entry that chooses nothing.
    """
    part = part.idle or part
    present = [a for a in spec.attachments if a.id in part.methods]
    able = {a.id for a in scaled_sites(spec, part)}
    if not present:
        raise ConfigError(f"the adapter {name!r} has no sites here whose scale could be set")
    if not able:
        raise ConfigError(
            f"the adapter {name!r} has no scale that a factor could be on: {_kinds(part)} is no change that is added "
            "to a weight with a factor. It can be on or off: program.set_active, program.disabled()"
        )
    if modules is None:
        return [a.id for a in present if a.id in able]
    if not isinstance(modules, Iterable):
        raise ConfigError(f"modules={shown(modules)} must be the name of a module, or a list of names")
    out: dict[str, None] = {}
    for entry in [modules] if isinstance(modules, str) else list(modules):
        found = [a for a in present if _chooses(entry, a, whole=isinstance(modules, str))]
        if not found:
            near = _near(entry, [a.module for a in present])
            raise ConfigError(f"modules: {shown(entry)} chooses nothing that {name!r} adapts{near}")
        if not (scaling := [a.id for a in found if a.id in able]):
            kinds = ", ".join(dict.fromkeys(part.methods[a.id].name for a in found))
            raise ConfigError(f"modules: {shown(entry)} chooses {found[0].fqn!r}, and {kinds} has no scale there")
        out |= dict.fromkeys(scaling)
    if not out:
        raise ConfigError("modules is an empty list: leave it out for all modules")
    return list(out)


def _near(entry: str, modules: Iterable[str]) -> str:
    """Return a hint with module names close to ``entry``: runs of as many components as it has, and whole names."""
    size = entry.count(".") + 1
    paths = [m.split(".") for m in modules]
    runs = [".".join(p[i : i + size]) for p in paths for i in range(len(p) - size + 1)]
    return did_you_mean(entry, [*dict.fromkeys(runs), *map(".".join, paths)])


def _chooses(entry: Any, a: Attachment, whole: bool) -> bool:
    """Return whether an entry chooses an attachment.

    An entry is a run of whole components of its path, or with ``whole`` a regular expression for all of it.
    """
    if not isinstance(entry, str) or not entry:
        raise ConfigError(f"modules: entries must be non-empty strings, found {shown(entry)}")
    if f".{entry}." in f".{a.fqn}.":
        return True
    full = compiled("modules", entry).fullmatch if whole else None
    return full is not None and any(full(n) for n in dict.fromkeys((a.module, a.fqn, a.name)))


def _the_one(binding: Binding, adapter: str | None) -> str:
    if adapter is not None:
        check_names(binding, [adapter])
        return adapter
    if len(binding.named) > 1:
        raise ConfigError(f"say whose scale it is: adapter= one of {listing(map(repr, binding.named))}")
    return next(iter(binding.named))


def _own(spec: BindingSpec, binding: Binding, name: str) -> BindingSpec:
    return part_of(spec, name) if binding.parts else spec


def _of_parts(spec: BindingSpec, old: Binding, parts: Mapping[str, Binding]) -> Binding:
    if all(part is old.named[name] for name, part in parts.items()):
        return old
    return binding_of_parts(spec, parts) if old.parts else next(iter(parts.values()))


def _scaled(spec: BindingSpec, part: Binding, name: str, scale: Any, modules: Modules = None) -> Binding:
    factor = factor_of(scale)
    return _with_factors(spec, part, dict.fromkeys(chosen_sites(spec, part, name, modules), factor))


def _with_factors(spec: BindingSpec, part: Binding, factors: Mapping[str, float]) -> Binding:
    """Return one adapter with these factors, by attachment id. Its other factors stay."""
    if part.idle is not None:
        idle = _with_factors(spec, part.idle, factors)
        return part if idle is part.idle else replace(part, idle=idle)
    values: dict[str, Tensor] = {}
    for a in spec.attachments:
        if a.id not in factors or factors[a.id] == part.factors.get(a.id, 1.0):
            continue
        method, fqn = part.methods[a.id], a.scale_slot or a.scale_fqn
        scale = finite_scale(method.scale(spec.ops[a.id]) * factors[a.id], a, part.config)  # type: ignore[operator]
        old = part.values[fqn]
        values[fqn] = torch.tensor(scale, dtype=old.dtype, device=old.device)
    if not values:
        return part
    new = {i: f for i, f in {**part.factors, **factors}.items() if f != 1}
    return replace(part, values={**part.values, **values}, factors=new)


def _has_scale(spec: BindingSpec, a: Attachment, method: Any) -> bool:
    return method.scale(spec.ops[a.id]) is not None


def _kinds(binding: Binding) -> str:
    return " + ".join(dict.fromkeys(p.config.peft_type for p in binding.named.values()))
