"""Turn what a user gives as an adapter into a config or a binding.

The user may give a config object of adaptc or peft, or a PEFT adapter directory. Other forms are a file of another
format, a state dict, and a finished Binding. A binding owns its values: a directory is read into memory of its own, and
a caller's tensors are copied once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from adaptc.adapter_files.check_state_dict import check_state_dict, is_state_dict
from adaptc.adapter_files.directory import AdapterFile, all_finite, read_config
from adaptc.adapter_files.foreign_file import RawFile, rename_tensors
from adaptc.adapter_files.safe_load import read_json_object
from adaptc.adapter_files.stable_read import FileChangedError, OpenedFile
from adaptc.binding.bind import bind_tensors, initial_values
from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.binding_plan_cache import BindingPlanCache, structure_key
from adaptc.binding.binding_scale import binding_of_parts, with_scale
from adaptc.binding.check_binding import check_binding_fits
from adaptc.binding.combine_bindings import spec_of_adapter
from adaptc.binding.sources.composite_adapters import may_have_experts, read_experts
from adaptc.binding.sources.old_experts import stack_old_experts
from adaptc.binding.sources.other_formats import (
    check_no_component,
    component_names,
    file_from_state_dict,
    may_be_foreign_key,
    translate_to_peft,
    with_targets,
)
from adaptc.binding.sources.read_directory import config_from_dict, config_of_file, read_with_experts
from adaptc.errors import AdaptcError, CheckpointError, ConfigError, SwapError, short_repr
from adaptc.methods import AdapterConfig, TargetedConfig, config_class
from adaptc.patterns import limit_pattern_time
from adaptc.torch_modes import outside_modes
from adaptc.value_types import validates_options


def read_adapter_source(
    adapter: Any, key_mapping: Mapping[str, str] | None = None
) -> tuple[AdapterConfig | None, AdapterFile | RawFile | None]:
    """Return the config of an adapter, and its file where it has one, or is an object with ``as_file``.

    The config is None for a file of another format and for a state dict, since it takes the model to know it. Raises
    ConfigError or CheckpointError.
    """
    if is_state_dict(adapter):
        tensors = rename_tensors(check_state_dict(adapter, "state dict"), key_mapping, "state dict")
        return None, file_from_state_dict(_copy_tensors(tensors))
    if hasattr(adapter, "as_file"):
        file = adapter.as_file()
        return config_of_file(file), replace(
            file, tensors=_copy_tensors(rename_tensors(file.tensors, key_mapping, file.path))
        )
    if isinstance(adapter, (str, os.PathLike)):
        file = read_with_experts(adapter, key_mapping=key_mapping)
        return (config_of_file(file) if isinstance(file, AdapterFile) else None), file
    return as_config(adapter), None


def _copy_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: t.detach().clone() for k, t in tensors.items()}


def as_config(config: Any) -> AdapterConfig:
    """Return a config from any object or path that gives one, an adapter directory included.

    Raises ConfigError or CheckpointError.
    """
    if isinstance(config, AdapterConfig):
        config.check_types()  # fields may have been set since it was made
        return config
    if isinstance(config, (str, os.PathLike)):
        return config_from_dict(read_config(config))
    if isinstance(config, Mapping):
        return config_from_dict(config)
    if hasattr(config, "to_dict") and hasattr(config, "peft_type"):
        return config_from_peft(config)
    raise ConfigError(
        f"expected a config such as LoraConfig, a peft config, or an adapter directory; got {type(config).__name__}"
    )


def read_config_file(path: Path) -> AdapterConfig:
    """Return the config in a JSON file with the content of an ``adapter_config.json``. Raises CheckpointError for other
    files."""
    try:
        with OpenedFile(path) as file:
            data = read_json_object(file)
    except FileChangedError:
        raise CheckpointError(
            f"there is no file {path}; expected an adapter directory, or the JSON of a config"
        ) from None
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} is no config of an adapter, a JSON object with a 'peft_type': {error}"
        ) from error.__cause__
    if "peft_type" not in data:
        raise CheckpointError(f"{path} is no config of an adapter: expected a JSON object with a 'peft_type'")
    return config_from_dict(data)


def resolve_for_model(
    config: AdapterConfig | None,
    file: AdapterFile | RawFile | None,
    weights: Mapping[str, Tensor],
    component: str | None = None,
    is_explicit: bool = False,
) -> tuple[AdapterConfig, AdapterFile | None]:
    """Return ``config`` and ``file`` for a model with these weights.

    A file of another format, or for an older layout of the model, is converted. ``config`` is that of a PEFT directory.
    If ``stated``, it is the caller's, and the keys give the targets that it leaves open.
    """
    if is_explicit and isinstance(file, AdapterFile):
        if isinstance(config, TargetedConfig):
            config = with_targets(config, file.tensors, weights)
        assert config is not None
        file = replace(file, config=config.to_dict())
    if isinstance(file, RawFile):
        file, config = translate_to_peft(file, weights, component=component, config=config), None
    if file is None:
        assert config is not None
        return read_experts(config, None, weights, config_of_file)
    new = stack_old_experts(file, weights)
    config, file = (config, file) if new is file and config is not None else (config_of_file(new), new)
    return read_experts(config, file, weights, config_of_file)


def config_from_peft(config: Any) -> AdapterConfig:
    """Return a config from a config object of the peft library, which need not be importable here.

    Raises ConfigError where its ``to_dict()`` fails.
    """
    try:
        data = dict(config.to_dict())
    except Exception as error:  # an object that is no peft config may fail in any way
        raise ConfigError(f"{type(config).__name__}.to_dict() gives no config: {short_repr(error)}") from error
    data["peft_type"] = getattr(data.get("peft_type"), "value", data.get("peft_type"))
    data["task_type"] = getattr(data.get("task_type"), "value", data.get("task_type"))
    if getattr(config, "runtime_config", None) is not None:
        offload = getattr(config.runtime_config, "ephemeral_gpu_offload", False)
        data["runtime_config"] = {"ephemeral_gpu_offload": True} if offload else None
    new = config_from_dict(data)
    for name in new.unsaved_attributes:
        setattr(new, name, getattr(config, name, None))
    return new


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

    def spec(self, trainable: bool = False) -> BindingSpec: ...


@dataclass(frozen=True)
class ReadOptions:
    """The options for reading a file: the adapter of a directory, the renaming of keys, and the component.

    ``is_one_of_several`` says that the file is one of several, some of which may have no components.
    """

    adapter_name: str | None = None
    key_mapping: Mapping[str, str] | None = None
    component: str | None = None
    is_one_of_several: bool = False

    def check_no_component(self, source: str) -> None:
        """Raise ConfigError where a component is asked for of the file at ``source``, whose keys name none."""
        if not self.is_one_of_several:
            check_no_component(self.component, source)

    def component_for(self, raw: RawFile) -> str | None:
        """Return the component to take from a file of another format, or None where the keys are to tell."""
        return (
            None
            if self.is_one_of_several and self.component is not None and not component_names(raw)
            else self.component
        )


@validates_options("adapter_name", "key_mapping", "component")
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
) -> Binding:
    """Return ``adapter`` bound to the slots of ``target``, which is left unchanged.

    ``key_mapping`` maps a regular expression to its replacement, for keys that were written for other module names.
    ``component`` chooses from a file with several, where module names do not tell. ``adapter_name`` chooses from a
    directory of adapters. An adapter that is bound already is refused with any of these, and with ``config``. A
    program, or what is bound to one, stands for its adapter.

    A state dict has PEFT's keys, with or without ``base_model.model.``. Its scale comes from ``config``. Without that
    it comes from the current adapter's config, with the rank of the tensors. A state dict with the keys of another
    format is read like a file of that format. Without ``own``, values may share the memory of the caller's tensors.
    That is for callers who copy them before other code can write there.

    ``scale`` is a factor on the original scale, or factors by adapter name; None leaves the scale as it is. Raises
    SwapError, CheckpointError or ConfigError.
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
        return _apply_scale(target, _check_binding(target, binding), scale)
    read_options = ReadOptions(adapter_name, key_mapping, component)
    if current.joint_adapters:
        made = target.binding_plans.remember_fitting(
            _exchange_adapters(target, current, adapter, config, trainable, read_options)
        )
        return _apply_scale(target, made, scale, list(adapter) if isinstance(adapter, Mapping) else None)
    spec = target.spec(trainable)
    if lost := list(spec.residual):
        raise SwapError(
            f"the file this program came from holds only its own adapter's version of {lost[:3]} (its initialisation "
            "changed the base), so no other adapter can be bound to it. Compile the original model instead."
        )
    recipes = target.binding_plans
    return _apply_scale(
        target,
        recipes.remember_fitting(
            _bind_source(spec, adapter, config, read_options, current.config, recipes, copy_tensors)
        ),
        scale,
    )


def _apply_scale(target: Bindable, binding: Binding, scale: Any, names: Iterable[str] | None = None) -> Binding:
    """Return ``binding``, which fits ``target``, with the factors of ``scale``; note that the new binding fits, too."""
    return (
        binding
        if scale is None
        else target.binding_plans.remember_fitting(with_scale(target.spec(), binding, scale, names))
    )


def _check_binding(target: Bindable, binding: Binding) -> Binding:
    if not binding.values:
        raise SwapError(
            "this is the base, which is no adapter: call prog.base or what prog.bind(None) returned, or take the "
            "adapter out with adaptc.unload"
        )
    if binding.values.keys() != target.binding_plans.tensor_names:
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


def _exchange_adapters(
    target: Bindable, current: Binding, adapter: Any, config: Any, trainable: bool, read_options: ReadOptions
) -> Binding:
    """Return a binding in which the named adapters of several that act together are exchanged.

    Adapters that are not named stay, and None turns one off.
    """
    bindings = dict(current.joint_adapters)
    if not isinstance(adapter, Mapping) or not adapter or not bindings.keys() >= adapter.keys():
        raise SwapError(
            f"the program has several adapters that act together; name the one to change, for example "
            f"swap(prog, {{{next(iter(bindings))!r}: adapter}}), of {list(bindings)}"
        )
    if config is not None and len(adapter) > 1:
        raise ConfigError(f"config= is of one adapter, and {len(adapter)} are given: swap to one after the other")
    spec, read_options = target.spec(trainable), replace(read_options, is_one_of_several=len(adapter) > 1)
    for name, new in adapter.items():
        own = spec_of_adapter(spec, name)
        if new is None:
            bindings[name] = initial_values(own, bindings[name].config, methods_by_id={})
        else:
            # Plans are for the spec of the whole program, and an adapter of several has its own.
            bindings[name] = _bind_source(own, new, config, read_options, bindings[name].config, None, True)
    if read_options.is_one_of_several and read_options.component not in (
        None,
        *(bindings[n].origin.component for n in adapter),
    ):
        raise ConfigError(
            f"component={read_options.component!r} chooses from a file whose keys name components, and none of "
            f"{', '.join(map(repr, adapter))} is one; leave it out"
        )
    return binding_of_parts(spec, bindings)


def _bind_source(
    spec: BindingSpec,
    adapter: Any,
    config: Any,
    read_options: ReadOptions,
    current: AdapterConfig,
    plans: BindingPlanCache | None,
    copy_tensors: bool,
) -> Binding:
    if hasattr(adapter, "as_file"):
        adapter = adapter.as_file()
    source, copy = str(adapter) if isinstance(adapter, (str, os.PathLike)) else "state dict", copy_tensors
    if isinstance(adapter, (str, os.PathLike)):
        adapter = read_with_experts(
            adapter, adapter_name=read_options.adapter_name, key_mapping=read_options.key_mapping
        )
        copy = False
    elif read_options.adapter_name is not None:
        raise ConfigError(
            f"adapter_name={read_options.adapter_name!r} chooses from a directory of adapters, and the adapter is a "
            f"{type(adapter).__name__}: leave it out"
        )
    elif isinstance(adapter, Mapping):
        if not (adapter and isinstance(first := next(iter(adapter)), str) and may_be_foreign_key(first, spec.weights)):
            read_options.check_no_component(source)
            return _bind_state_dict(plans, spec, adapter, current, config, read_options.key_mapping, copy=copy_tensors)
        adapter = file_from_state_dict(
            rename_tensors(check_state_dict(adapter, source), read_options.key_mapping, source)
        )
    elif isinstance(adapter, AdapterFile):
        source = str(adapter.path)
        check_state_dict(adapter.tensors, source)
        adapter = replace(adapter, tensors=rename_tensors(adapter.tensors, read_options.key_mapping, source))
    if isinstance(adapter, AdapterFile) and may_have_experts(config_class(str(adapter.config.get("peft_type")))):
        stated = config_of_file(adapter) if config is None else as_config(config)
        stated, adapter = read_experts(stated, adapter, spec.weights, config_of_file)
        config = None if config is None else stated
    if isinstance(adapter, RawFile):
        theirs = None if config is None else as_config(config)
        adapter = translate_to_peft(adapter, spec.weights, component=read_options.component_for(adapter), config=theirs)
        config = None  # translated() put it into the file
    elif isinstance(adapter, AdapterFile):
        read_options.check_no_component(source)
    else:
        raise AdaptcError(
            f"an adapter is a directory, a file, a state dict, a binding, or what prog.bind returned; got "
            f"{type(adapter).__name__}"
        )
    return replace(_bind_file(plans, spec, adapter, source, config, copy=copy), origin=adapter.origin)


def _bind_file(
    plans: BindingPlanCache | None, spec: BindingSpec, file: AdapterFile, source: str, config: Any, *, copy: bool
) -> Binding:
    """Return the binding of a file's tensors, with ``config``, or with the file's own config if that is None."""
    plan_key = None if plans is None or config is not None else structure_key(spec, file.config, file.tensors)
    recipe = None if plans is None or plan_key is None else plans.find_plan(plan_key)
    if recipe is not None:
        own = config_of_file(file)
        if type(own) is recipe.config_class and all_finite(file.flat_tensors or file.tensors.values()):
            made = recipe(own, file.tensors, source, copy=copy)
            if made is not None:
                return made
    stacked = stack_old_experts(file, spec.weights)
    own = as_config(config) if config is not None else config_of_file(stacked)
    binding = bind_tensors(spec, own, stacked.tensors, source, infer_ranks=False, copy=copy)
    if plans is not None and stacked is file:
        plans.learn_plan(plan_key, spec, binding, file.tensors, infer_ranks=False)
    return binding


def _bind_state_dict(
    plans: BindingPlanCache | None,
    spec: BindingSpec,
    adapter: Mapping[str, Tensor],
    current_config: AdapterConfig,
    config: Any,
    key_mapping: Mapping[str, str] | None,
    *,
    copy: bool,
) -> Binding:
    """Return the binding of a state dict with ``config``, or if that is None, with ``theirs`` and the rank of the
    tensors."""
    tensors, infer_ranks = check_state_dict(adapter, "state dict", current_config.peft_type), config is None
    tensors = rename_tensors(tensors, key_mapping, "state dict")
    own_config = current_config if config is None else as_config(config)
    plan_key = None if plans is None else structure_key(spec, own_config, tensors, infer_ranks)
    recipe = None if plans is None or plan_key is None else plans.find_plan(plan_key)
    if recipe is not None:
        made = recipe(own_config, tensors, "state dict", copy=copy)
        # The caller may write to its tensors meanwhile, so copies are checked, not originals. Scales, which have no
        # axes, come from the config.
        if made is not None and all_finite([v for v in made.values.values() if v.ndim] if copy else tensors.values()):
            return made
    binding = bind_tensors(spec, own_config, tensors, "state dict", infer_ranks=infer_ranks, copy=copy)
    if plans is not None:
        plans.learn_plan(plan_key, spec, binding, tensors, infer_ranks=infer_ranks)
    return binding
