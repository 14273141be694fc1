"""How strongly the adapters of a binding act: factors on their scales, which of them are off, which are gone.

Before: a binding of a program, whose methods know the scales they were made with. After: another one with the same
adapters, of which none of the tensors was written to or copied; the old one is as it was. A factor is always on the
scale that an adapter was made with, so that the last one counts: setting 0.5 twice is 0.5.

Scales are tensors of a binding as all others are, so whatever takes a binding takes one with other scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adaptc.binding.bind import first_values
from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.combine import part_of, together
from adaptc.binding.misfits import finite_scale
from adaptc.errors import ConfigError, SwapError, did_you_mean, listing, shown
from adaptc.passes.ir.attachment import Attachment
from adaptc.patterns import compiled, limited
from adaptc.value_types import fitting, rule_of

#: entries that choose modules: names, their endings or beginnings, or one regular expression
Modules = str | Iterable[str] | None
_FACTOR = rule_of(float)


def factor_of(value: Any, option: str = "scale") -> float:
    """A factor. Raises ConfigError for what is no finite number."""
    assert _FACTOR is not None
    return float(fitting(option, _FACTOR, value))


def check_names(binding: Binding, names: Iterable[Any]) -> None:
    """Raises ConfigError for a name that is none of the binding's adapters."""
    for name in names:
        if not isinstance(name, str) or name not in binding.named:
            raise ConfigError(
                f"there is no adapter called {shown(name)} here; there are {listing(map(repr, binding.named))}"
            )


def scaled(
    spec: BindingSpec, binding: Binding, scale: Any, adapter: str | None = None, modules: Modules = None
) -> Binding:
    """``binding`` with a factor on the scale of one adapter, at the modules that are chosen, or at all that have one.

    ``adapter`` may be left out where there is one. Raises ConfigError for a name or entry that chooses nothing, and for
    methods, or modules, that have no scale."""
    if isinstance(scale, str):
        raise ConfigError(
            f"the factor comes first, and then whose it is: set_scale(0.5, adapter={shown(scale)}), not {shown(scale)}"
        )
    parts, name = dict(binding.named), _the_one(binding, adapter)
    parts[name] = _scaled(_own(spec, binding, name), parts[name], name, scale, modules)
    return _of_parts(spec, binding, parts)


def multiplied(spec: BindingSpec, binding: Binding, multiplier: float) -> Binding:
    """``binding`` with the factors of all its adapters multiplied, wherever they have a scale. Raises ConfigError where
    none has."""
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


def activated(spec: BindingSpec, binding: Binding, adapters: Any) -> Binding:
    """``binding`` in which these adapters act, and the others do not. ``adapters``: a name, names, or a mapping of
    names to factors, which are then theirs. Raises ConfigError as :func:`scaled` does."""
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
            # What has no scale acts as it was made, which is what a factor of one says.
            if factor != 1 or scaled_sites(own, part):
                part = _scaled(own, part, name, factor)
        parts[name] = part
    return _of_parts(spec, binding, parts)


def with_strength_of(spec: BindingSpec, binding: Binding, scale: Any, names: Iterable[str] | None = None) -> Binding:
    """``binding`` with what a caller says of its scale beside it: a factor for the adapters of these ``names`` (None:
    for all), or factors by name; None says nothing."""
    if scale is None:
        return binding
    given = scale if isinstance(scale, Mapping) else dict.fromkeys(names or binding.named, scale)
    check_names(binding, given)
    parts = dict(binding.named)
    for name, factor in given.items():
        parts[name] = _scaled(_own(spec, binding, name), parts[name], name, factor)
    return _of_parts(spec, binding, parts)


def without(spec: BindingSpec, binding: Binding, name: str) -> Binding:
    """``binding`` without one of several adapters, whose sites compute what they would without it."""
    check_names(binding, [name])
    left = {n: part for n, part in binding.parts.items() if n != name}
    if not left:
        raise SwapError(f"{name!r} is the only adapter of the program: adaptc.unload(program) gives it without one")
    return joint(spec, left)


def joint(spec: BindingSpec, parts: Mapping[str, Binding]) -> Binding:
    """One binding of several adapters; attachments of names that are not among them have identity values."""
    gone = [a for a in spec.attachments if a.adapter not in parts]
    config = next(iter(parts.values())).config
    others = first_values(replace(spec, attachments=gone), config, only={}).values if gone else {}
    return together(parts, spec.attachments, others)


def scaled_sites(spec: BindingSpec, binding: Binding) -> list[Attachment]:
    """The attachments at which the binding has a scale."""
    return [a for a in spec.attachments if (m := binding.methods.get(a.id)) is not None and _has_scale(spec, a, m)]


def turned_off(spec: BindingSpec, part: Binding) -> Binding:
    """One adapter, which knows what it is when it acts, with identity values. Raises SwapError where there is no base
    that these would leave alone."""
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
    """The ids of attachments of one adapter that ``modules`` chooses and that have a scale."""
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
    """The runs of components that an entry may stand for: as many as it has, and whole names."""
    size = entry.count(".") + 1
    paths = [m.split(".") for m in modules]
    runs = [".".join(p[i : i + size]) for p in paths for i in range(len(p) - size + 1)]
    return did_you_mean(entry, [*dict.fromkeys(runs), *map(".".join, paths)])


def _chooses(entry: Any, a: Attachment, whole: bool) -> bool:
    """Whether an entry is a run of whole components of where an attachment is, or an expression for all of it."""
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
    return joint(spec, parts) if old.parts else next(iter(parts.values()))


def _scaled(spec: BindingSpec, part: Binding, name: str, scale: Any, modules: Modules = None) -> Binding:
    factor = factor_of(scale)
    return _with_factors(spec, part, dict.fromkeys(chosen_sites(spec, part, name, modules), factor))


def _with_factors(spec: BindingSpec, part: Binding, factors: Mapping[str, float]) -> Binding:
    """One adapter with these factors, by attachment; the others stay."""
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
