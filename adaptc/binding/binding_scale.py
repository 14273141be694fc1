"""Set how strongly the adapters of a binding act: factors on their scales, which are off, and which are removed.

Each function returns another binding with the same adapters. It neither writes to nor copies any adapter tensor, and
leaves the old binding as it was. A factor is always on the adapter's original scale, so the last one counts: setting
0.5 twice gives 0.5. Scales are tensors of a binding like others, so all code that takes a binding takes one with other
scales.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from adaptc.binding.bind import initial_values
from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.check_tensors import finite_scale
from adaptc.binding.combine_bindings import spec_of_adapter, stack_bindings
from adaptc.errors import ConfigError, SwapError, did_you_mean, listing, short_repr
from adaptc.passes.protocol.attachment import Attachment
from adaptc.patterns import compile_pattern, limit_pattern_time
from adaptc.torch_typing import is_mapping
from adaptc.value_types import make_rule, validate_option

#: entries that choose modules: names, their endings or beginnings, or one regular expression
ModuleChoice = str | Iterable[str] | None
#: adapters by name that are to act; with factors on their scales, where None keeps those that an adapter has
ActiveChoice = str | Sequence[str] | Mapping[str, float | None]
TurnOff = Callable[[BindingSpec, Binding], Binding]
_FACTOR = make_rule(float)


def parse_factor(value: Any, option: str = "scale") -> float:
    """Return ``value`` as a factor. Raises ConfigError where it is no finite number."""
    assert _FACTOR is not None
    return float(validate_option(option, _FACTOR, value))


def check_adapter_names(binding: Binding, names: Iterable[Any]) -> None:
    """Raise ConfigError for a name that is none of the binding's adapters."""
    for name in names:
        if not isinstance(name, str) or name not in binding.adapters_by_name:
            raise ConfigError(
                f"there is no adapter called {short_repr(name)} here; there are "
                f"{listing(map(repr, binding.adapters_by_name))}"
            )


def scale_adapter(
    spec: BindingSpec, binding: Binding, scale: Any, adapter: str | None = None, modules: ModuleChoice = None
) -> Binding:
    """Return ``binding`` with a factor on one adapter's scale, at the chosen modules or at all that have a scale.

    ``adapter`` may be left out where there is only one. Raises ConfigError for a name or entry that chooses nothing,
    and for methods or modules without a scale.
    """
    if isinstance(scale, str):
        raise ConfigError(
            f"the factor comes first, and then whose it is: set_scale(0.5, adapter={short_repr(scale)}), not "
            f"{short_repr(scale)}"
        )
    parts, name = dict(binding.adapters_by_name), _resolve_adapter(binding, adapter)
    parts[name] = _scale_sites(_spec_of(spec, binding, name), parts[name], name, scale, modules)
    return _with_adapters(spec, binding, parts)


def with_scales_multiplied(spec: BindingSpec, binding: Binding, multiplier: float) -> Binding:
    """Return ``binding`` with all factors of all its adapters multiplied, wherever they have a scale.

    Raises ConfigError where no adapter has a scale.
    """
    bindings = dict(binding.adapters_by_name)
    found = False
    for name, part in bindings.items():
        own, acting = _spec_of(spec, binding, name), part.active_form or part
        factors = {a.id: multiplier * acting.scale_factors.get(a.id, 1.0) for a in sites_with_scale(own, acting)}
        found = found or bool(factors)
        bindings[name] = with_site_factors(own, part, factors)
    if not found:
        raise ConfigError(f"{_method_names(binding)} has no scale that could be multiplied")
    return _with_adapters(spec, binding, bindings)


def with_active(
    spec: BindingSpec,
    binding: Binding,
    adapters: Any,
    modules: ModuleChoice = None,
    off: TurnOff | None = None,
) -> Binding:
    """Return ``binding`` with these adapters active and all others turned off.

    ``adapters`` is a name, names, or a mapping of names to their new factors. None keeps the factors that an adapter
    has. ``modules`` limits the new factors to some modules. ``off`` turns one adapter off, :func:`turn_off` by default.
    Raises ConfigError like :func:`scale_adapter`.
    """
    off = off or turn_off
    if isinstance(adapters, str):
        adapters = [adapters]
    if not isinstance(adapters, (Mapping, Sequence, set, frozenset)):
        raise ConfigError(
            f"adapters must be a name, a list of names, or a dict of names and factors, got {short_repr(adapters)}"
        )
    names = cast("Collection[Any]", adapters)
    check_adapter_names(binding, names)
    factors: dict[Any, Any] = dict(adapters) if is_mapping(adapters) else dict.fromkeys(names)
    if modules is not None and all(factor is None for factor in factors.values()):
        raise ConfigError("modules says where factors hold: give a dict of names and factors with it")
    bindings = dict(binding.adapters_by_name)
    for name, adapter in bindings.items():
        own = _spec_of(spec, binding, name)
        adapter = (adapter.active_form or adapter) if name in factors else off(own, adapter)
        if factors.get(name) is not None:
            factor = parse_factor(factors[name], f"the factor of {name!r}")
            # A method without a scale acts as it was made. A factor of 1 asks for just that, and must not raise.
            if factor != 1 or modules is not None or sites_with_scale(own, adapter):
                adapter = _scale_sites(own, adapter, name, factor, modules)
        bindings[name] = adapter
    return _with_adapters(spec, binding, bindings)


def with_scale(spec: BindingSpec, binding: Binding, scale: Any, names: Iterable[str] | None = None) -> Binding:
    """Return ``binding`` with the ``scale`` that a caller gave along with its adapter.

    ``scale`` is a factor for the adapters called ``names``, or for all where that is None. It may also map names to
    factors. None changes nothing.
    """
    if scale is None:
        return binding
    given: Mapping[str, Any] = scale if is_mapping(scale) else dict.fromkeys(names or binding.adapters_by_name, scale)
    check_adapter_names(binding, given)
    parts = dict(binding.adapters_by_name)
    for name, factor in given.items():
        parts[name] = _scale_sites(_spec_of(spec, binding, name), parts[name], name, factor)
    return _with_adapters(spec, binding, parts)


def without_adapter(spec: BindingSpec, binding: Binding, name: str) -> Binding:
    """Return ``binding`` without one of several adapters. Its sites then compute as if it were not there.

    Raises ConfigError for an unknown name, and SwapError for the only adapter.
    """
    check_adapter_names(binding, [name])
    left = {n: part for n, part in binding.joint_adapters.items() if n != name}
    if not left:
        raise SwapError(f"{name!r} is the only adapter of the program: adaptc.unload(program) gives it without one")
    return binding_of_parts(spec, left)


def binding_of_parts(spec: BindingSpec, bindings: Mapping[str, Binding]) -> Binding:
    """Return one binding of several adapters. Attachments of any other adapter get identity values."""
    gone = [a for a in spec.attachments if a.adapter not in bindings]
    config = next(iter(bindings.values())).config
    others: Mapping[str, Tensor] = {}
    if gone:
        others = initial_values(replace(spec, attachments=gone), config, methods_by_id={}).values
    return stack_bindings(bindings, spec.attachments, others)


def sites_with_scale(spec: BindingSpec, binding: Binding) -> list[Attachment]:
    """Return the attachments at which the binding has a scale."""
    return [a for a in spec.attachments if (m := binding.methods.get(a.id)) is not None and _has_scale(spec, a, m)]


def turn_off(spec: BindingSpec, adapter: Binding) -> Binding:
    """Return one adapter with identity values, which keeps its active form in ``idle``.

    Raises SwapError where the program does not have the original base weights.
    """
    if adapter.active_form is not None:
        return adapter
    if lost := list(spec.residual):
        raise SwapError(
            f"the file this program came from holds only its own adapter's version of {lost[:3]} (its initialisation "
            "changed the base), so its adapter cannot be turned off. Compile the original model instead."
        )
    nothing = initial_values(spec, adapter.config, methods_by_id={})
    return replace(nothing, name=adapter.name, source=adapter.source, origin=adapter.origin, active_form=adapter)


@limit_pattern_time()
def choose_sites(spec: BindingSpec, adapter: Binding, name: str, modules: ModuleChoice) -> list[str]:
    """Return the ids of one adapter's attachments that ``modules`` chooses and that have a scale.

    Raises ConfigError where there are none, and for an entry that chooses nothing.
    """
    adapter = adapter.active_form or adapter
    present_sites = [a for a in spec.attachments if a.id in adapter.methods]
    ids_with_scale = {a.id for a in sites_with_scale(spec, adapter)}
    if not present_sites:
        raise ConfigError(f"the adapter {name!r} has no sites here whose scale could be set")
    if not ids_with_scale:
        raise ConfigError(
            f"the adapter {name!r} has no scale that a factor could be on: {_method_names(adapter)} is no change that "
            "is added to a weight with a factor. It can be on or off: program.set_active, program.disabled()"
        )
    if modules is None:
        return [a.id for a in present_sites if a.id in ids_with_scale]
    given: Any = modules  # callers may give anything
    if not isinstance(given, Iterable):
        raise ConfigError(f"modules={short_repr(modules)} must be the name of a module, or a list of names")
    chosen: dict[str, None] = {}
    for entry in [modules] if isinstance(modules, str) else list(modules):
        found = [a for a in present_sites if _entry_matches(entry, a, is_pattern=isinstance(modules, str))]
        if not found:
            near = _nearest_hint(entry, [a.module for a in present_sites])
            raise ConfigError(f"modules: {short_repr(entry)} chooses nothing that {name!r} adapts{near}")
        if not (scaling := [a.id for a in found if a.id in ids_with_scale]):
            kinds = ", ".join(dict.fromkeys(adapter.methods[a.id].name for a in found))
            raise ConfigError(f"modules: {short_repr(entry)} chooses {found[0].fqn!r}, and {kinds} has no scale there")
        chosen |= dict.fromkeys(scaling)
    if not chosen:
        raise ConfigError("modules is an empty list: leave it out for all modules")
    return list(chosen)


def _nearest_hint(entry: str, modules: Iterable[str]) -> str:
    """Return a hint with module names close to ``entry``: runs of as many components as it has, and whole names."""
    size = entry.count(".") + 1
    paths = [m.split(".") for m in modules]
    runs = [".".join(p[i : i + size]) for p in paths for i in range(len(p) - size + 1)]
    return did_you_mean(entry, [*dict.fromkeys(runs), *map(".".join, paths)])


def _entry_matches(entry: Any, a: Attachment, is_pattern: bool) -> bool:
    """Return whether an entry chooses an attachment.

    An entry is a run of whole components of its path, or with ``is_pattern`` a regular expression for all of it.
    """
    if not isinstance(entry, str) or not entry:
        raise ConfigError(f"modules: entries must be non-empty strings, found {short_repr(entry)}")
    if f".{entry}." in f".{a.fqn}.":
        return True
    full = compile_pattern("modules", entry).fullmatch if is_pattern else None
    return full is not None and any(full(n) for n in dict.fromkeys((a.module, a.fqn, a.name)))


def _resolve_adapter(binding: Binding, adapter: str | None) -> str:
    if adapter is not None:
        check_adapter_names(binding, [adapter])
        return adapter
    if len(binding.adapters_by_name) > 1:
        raise ConfigError(f"say whose scale it is: adapter= one of {listing(map(repr, binding.adapters_by_name))}")
    return next(iter(binding.adapters_by_name))


def _spec_of(spec: BindingSpec, binding: Binding, name: str) -> BindingSpec:
    return spec_of_adapter(spec, name) if binding.joint_adapters else spec


def _with_adapters(spec: BindingSpec, binding: Binding, bindings: Mapping[str, Binding]) -> Binding:
    if all(part is binding.adapters_by_name[name] for name, part in bindings.items()):
        return binding
    return binding_of_parts(spec, bindings) if binding.joint_adapters else next(iter(bindings.values()))


def _scale_sites(spec: BindingSpec, adapter: Binding, name: str, scale: Any, modules: ModuleChoice = None) -> Binding:
    factor = parse_factor(scale)
    return with_site_factors(spec, adapter, dict.fromkeys(choose_sites(spec, adapter, name, modules), factor))


def with_site_factors(spec: BindingSpec, adapter: Binding, factors: Mapping[str, float]) -> Binding:
    """Return one adapter with these factors, by attachment id. Its other factors stay."""
    if adapter.active_form is not None:
        idle = with_site_factors(spec, adapter.active_form, factors)
        return adapter if idle is adapter.active_form else replace(adapter, active_form=idle)
    scales: dict[str, Tensor] = {}
    changed: dict[str, float] = {}
    for a in spec.attachments:
        if a.id not in factors or factors[a.id] == adapter.scale_factors.get(a.id, 1.0):
            continue
        method, fqn = adapter.methods[a.id], a.scale_slot or a.scale_fqn
        scale = finite_scale(method.scale(spec.ops[a.id]) * factors[a.id], a, adapter.config)  # type: ignore[operator]
        old = adapter.scale_tensor(fqn)
        if old is None:
            continue
        scales[fqn] = torch.tensor(scale, dtype=old.dtype, device=old.device)
        changed[a.id] = factors[a.id]
    if not scales:
        return adapter
    return adapter.with_scale_tensors(scales, {i: f for i, f in {**adapter.scale_factors, **changed}.items() if f != 1})


def _has_scale(spec: BindingSpec, a: Attachment, method: Any) -> bool:
    return method.scale(spec.ops[a.id]) is not None


def _method_names(binding: Binding) -> str:
    return " + ".join(dict.fromkeys(p.config.peft_type for p in binding.adapters_by_name.values()))
