"""Bind any adapter that a user gives to a program or package: load it, resolve it for the model, and bind its tensors.

A binding owns its values: a directory is read into memory of its own, and a caller's tensors are copied once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, cast

import torch

from adaptc.adapter_files.load import load
from adaptc.binding.bind import bind, initial_values
from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.binding_plan_cache import BindingPlanCache
from adaptc.binding.binding_scale import binding_of_parts, with_scale
from adaptc.binding.check_binding import check_binding_fits
from adaptc.binding.combine_bindings import spec_of_adapter
from adaptc.binding.sources.configs import as_config
from adaptc.binding.sources.other_formats import for_component
from adaptc.binding.sources.resolve import resolve
from adaptc.binding.stored_adapters import StoredAdapters
from adaptc.errors import ConfigError, SwapError
from adaptc.methods import AdapterConfig
from adaptc.passes.graph.ops import Op
from adaptc.patterns import limit_pattern_time
from adaptc.torch_modes import outside_modes
from adaptc.torch_typing import is_mapping


class Bindable(Protocol):
    """A thing that an adapter can be bound to: a program, or a package of one."""

    @property
    def current(self) -> Binding | None:
        """Return the binding in use, or None where there are no sites."""
        ...

    @property
    def device(self) -> torch.device:
        """Return the device of the first site."""
        ...

    @property
    def binding_plans(self) -> BindingPlanCache: ...

    @property
    def adapters(self) -> StoredAdapters:
        """Return the adapters of the target's own file, by name."""
        ...

    def spec(self, trainable: bool = False) -> BindingSpec: ...


@limit_pattern_time()
@outside_modes()
def bind_adapter(
    target: Bindable,
    adapter: Any,
    *,
    config: Any = None,
    adapter_name: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    component: str | None = None,
    trainable: bool = False,
    copy_tensors: bool = True,
    scale: Any = None,
    check_config: Callable[[AdapterConfig], None] | None = None,
) -> Binding:
    """Return ``adapter`` bound to the slots of ``target``, which is left unchanged.

    ``key_mapping`` maps a regular expression to its replacement, for keys that were written for other module names.
    ``component`` chooses from a file with several, where module names do not tell. ``adapter_name`` chooses from a
    directory of adapters. An adapter that is bound already is refused with any of these, and with ``config``. A
    program, or what is bound to one, stands for its adapter. The name of an adapter in the target's own file stands for
    that adapter, and takes none of these options.

    A state dict has PEFT's keys, with or without ``base_model.model.``. Its scale comes from ``config``. Without that
    it comes from the current adapter's config, with the rank of the tensors. A state dict with the keys of another
    format is read like a file of that format. Without ``copy_tensors``, values may share the memory of the caller's
    tensors. That is for callers who copy them before other code can write there.

    ``scale`` is a factor on the original scale, or factors by adapter name; None leaves the scale as it is.
    ``check_config`` is called with the adapter's config before it is bound, and may raise. Raises SwapError,
    CheckpointError or ConfigError.
    """
    current = target.current
    if current is None:
        raise SwapError("the program has no adapter sites; it was merged or unloaded")
    if adapter is None:
        raise SwapError(
            "None is no adapter. prog.bind(None) gives a callable of the base, and adaptc.unload the base itself"
        )
    # A program, and what is bound to one, has its adapter in `binding`.
    binding = adapter if isinstance(adapter, Binding) else getattr(adapter, "binding", None)
    if isinstance(binding, Binding):
        asked = {"key_mapping": key_mapping or None, "config": config, "adapter_name": adapter_name}
        if said := [n for n, given in (asked | {"component": component}).items() if given is not None]:
            raise ConfigError(f"{said[0]} is for files and state dicts, and this is bound already: leave it out")
        made = with_scale(target.spec(), _check_binding(target, binding), scale)
        return target.binding_plans.remember_fitting(made)
    known = None if config is None else as_config(config)
    sources, bindings = _sources_by_name(current, adapter), dict(current.adapters_by_name)
    if known is not None and len(sources) > 1:
        raise ConfigError(f"config= is of one adapter, and {len(sources)} are given: swap to one after the other")
    spec, is_joint = target.spec(trainable), bool(current.joint_adapters)
    if spec.residual and not is_joint:
        raise SwapError(
            f"the file this program came from holds only its own adapter's version of {list(spec.residual)[:3]} (its "
            "initialisation changed the base), so no other adapter can be bound to it. Compile the original model "
            "instead."
        )
    given = {n: source for n, source in sources.items() if source is not None}
    asked = {"config": config, "adapter_name": adapter_name, "key_mapping": key_mapping, "component": component}
    stored = [target.adapters.find(source, asked) for source in given.values()]
    loaded = [
        load(source, adapter_name=adapter_name, key_mapping=key_mapping) if found is None else found
        for source, found in zip(given.values(), stored, strict=True)
    ]
    for data in loaded:
        target.adapters.check_base(data)
    for name, data in zip(given, for_component(loaded, component), strict=True):
        resolved = resolve(
            data, spec.weights, config=known, default=bindings[name].config, find_ops=partial(_ops_by_module, spec)
        )
        if check_config is not None:
            check_config(resolved.config)
        # Plans are for the spec of the whole program, and each of several adapters has its own.
        own, plans = (spec_of_adapter(spec, name), None) if is_joint else (spec, target.binding_plans)
        # Without a config, the tensors are of the current adapter, as where a module loads its state dict again.
        base = bindings[name].changed_base if data.config is None and known is None else None
        bindings[name] = bind(own, resolved, plans=plans, copy_tensors=copy_tensors, known_base=base)
    for name in sources.keys() - given.keys():
        bindings[name] = initial_values(spec_of_adapter(spec, name), bindings[name].config, methods_by_id={})
    made = binding_of_parts(spec, bindings) if is_joint else bindings[current.name]
    return target.binding_plans.remember_fitting(with_scale(spec, made, scale, sources))


def _ops_by_module(spec: BindingSpec) -> dict[str, Op]:
    return {a.module: spec.ops[a.id] for a in spec.attachments if a.param == "weight"}


def _sources_by_name(current: Binding, adapter: Any) -> Mapping[str, Any]:
    """Return what is to be bound, by adapter name: ``adapter``, or its entries where several adapters act together.

    None stands for an adapter to turn off, and adapters without an entry stay. Raises SwapError for a name of no
    adapter.
    """
    bindings = current.joint_adapters
    if not bindings:
        return {current.name: adapter}
    if not is_mapping(adapter) or not adapter or not bindings.keys() >= adapter.keys():
        raise SwapError(
            f"the program has several adapters that act together; name the one to change, for example "
            f"swap(prog, {{{next(iter(bindings))!r}: adapter}}), of {list(bindings)}"
        )
    return cast("Mapping[str, Any]", adapter)


def _check_binding(target: Bindable, binding: Binding) -> Binding:
    if not binding.values:
        raise SwapError(
            "this is the base, which is no adapter: call prog.base or what prog.bind(None) returned, or take the "
            "adapter out with adaptc.unload. What bank.select gives has several; bank[name] is one"
        )
    if frozenset(binding.values) != target.binding_plans.tensor_names:
        raise SwapError(
            "the binding belongs to a program with other sites; bind the adapter to this one: prog.bind(...)"
        )
    name, value = next(iter(binding.values.items()))
    if value.device != target.device:
        raise SwapError(
            f"the binding has {name!r} on {value.device}, and the program is on {target.device}; bind the adapter to "
            f"this program, or move the binding there: binding.to({str(target.device)!r})"
        )
    if not target.binding_plans.is_known_to_fit(binding):
        check_binding_fits(target.spec(), binding)
    return target.binding_plans.remember_fitting(binding)
