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

from adaptc.adapter_files.check_state_dict import given, is_state_dict
from adaptc.adapter_files.directory import AdapterFile, all_finite, read_config
from adaptc.adapter_files.foreign_file import RawFile, rename
from adaptc.adapter_files.safe_load import read_json_object
from adaptc.adapter_files.stable_read import OpenedFile, Unsettled
from adaptc.binding.bind import bind, first_values
from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.binding_plan_cache import Recipes, structure
from adaptc.binding.binding_scale import binding_of_parts, with_scale
from adaptc.binding.check_binding import check_fits
from adaptc.binding.combine_bindings import part_of
from adaptc.binding.sources.composite_adapters import has_parts, read_experts
from adaptc.binding.sources.old_experts import stack_old_experts
from adaptc.binding.sources.other_formats import (
    components_of,
    in_memory,
    nothing_to_choose,
    of_other_format,
    translated,
    with_targets,
)
from adaptc.binding.sources.read_directory import from_dict, of_file, read_whole
from adaptc.errors import AdaptcError, CheckpointError, ConfigError, SwapError, shown
from adaptc.methods import AdapterConfig, TargetedConfig, config_class
from adaptc.patterns import limited
from adaptc.torch_modes import plainly
from adaptc.value_types import checked


def read_adapter_source(
    adapter: Any, key_mapping: Mapping[str, str] | None = None
) -> tuple[AdapterConfig | None, AdapterFile | RawFile | None]:
    """Return the config of an adapter, and its file where it has one, or is an object with ``as_file``.

    The config is None for a file of another format and for a state dict, since it takes the model to know it. Raises
    ConfigError or CheckpointError.
    """
    if is_state_dict(adapter):
        tensors = rename(given(adapter, "state dict"), key_mapping, "state dict")
        return None, in_memory(_copied(tensors))
    if hasattr(adapter, "as_file"):
        file = adapter.as_file()
        return of_file(file), replace(file, tensors=_copied(rename(file.tensors, key_mapping, file.path)))
    if isinstance(adapter, (str, os.PathLike)):
        file = read_whole(adapter, key_mapping=key_mapping)
        return (of_file(file) if isinstance(file, AdapterFile) else None), file
    return as_config(adapter), None


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: t.detach().clone() for k, t in tensors.items()}


def as_config(config: Any) -> AdapterConfig:
    """Return a config from any object or path that gives one, an adapter directory included.

    Raises ConfigError or CheckpointError.
    """
    if isinstance(config, AdapterConfig):
        config.check_types()  # fields may have been set since it was made
        return config
    if isinstance(config, (str, os.PathLike)):
        return from_dict(read_config(config))
    if isinstance(config, Mapping):
        return from_dict(config)
    if hasattr(config, "to_dict") and hasattr(config, "peft_type"):
        return from_peft(config)
    raise ConfigError(
        f"expected a config such as LoraConfig, a peft config, or an adapter directory; got {type(config).__name__}"
    )


def config_of(path: Path) -> AdapterConfig:
    """Return the config in a JSON file with the content of an ``adapter_config.json``. Raises CheckpointError for other
    files."""
    try:
        with OpenedFile(path) as file:
            data = read_json_object(file)
    except Unsettled:
        raise CheckpointError(
            f"there is no file {path}; expected an adapter directory, or the JSON of a config"
        ) from None
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} is no config of an adapter, a JSON object with a 'peft_type': {error}"
        ) from error.__cause__
    if "peft_type" not in data:
        raise CheckpointError(f"{path} is no config of an adapter: expected a JSON object with a 'peft_type'")
    return from_dict(data)


def fitted(
    config: AdapterConfig | None,
    file: AdapterFile | RawFile | None,
    weights: Mapping[str, Tensor],
    component: str | None = None,
    stated: bool = False,
) -> tuple[AdapterConfig, AdapterFile | None]:
    """Return ``config`` and ``file`` for a model with these weights.

    A file of another format, or for an older layout of the model, is converted. ``config`` is that of a PEFT directory.
    If ``stated``, it is the caller's, and the keys give the targets that it leaves open.
    """
    if stated and isinstance(file, AdapterFile):
        if isinstance(config, TargetedConfig):
            config = with_targets(config, file.tensors, weights)
        assert config is not None
        file = replace(file, config=config.to_dict())
    if isinstance(file, RawFile):
        file, config = translated(file, weights, component=component, config=config), None
    if file is None:
        assert config is not None
        return read_experts(config, None, weights, of_file)
    new = stack_old_experts(file, weights)
    config, file = (config, file) if new is file and config is not None else (of_file(new), new)
    return read_experts(config, file, weights, of_file)


def from_peft(config: Any) -> AdapterConfig:
    """Return a config from a config object of the peft library, which need not be importable here.

    Raises ConfigError where its ``to_dict()`` fails.
    """
    try:
        data = dict(config.to_dict())
    except Exception as error:  # an object that is no peft config may fail in any way
        raise ConfigError(f"{type(config).__name__}.to_dict() gives no config: {shown(error)}") from error
    data["peft_type"] = getattr(data.get("peft_type"), "value", data.get("peft_type"))
    data["task_type"] = getattr(data.get("task_type"), "value", data.get("task_type"))
    if getattr(config, "runtime_config", None) is not None:
        offload = getattr(config.runtime_config, "ephemeral_gpu_offload", False)
        data["runtime_config"] = {"ephemeral_gpu_offload": True} if offload else None
    new = from_dict(data)
    for name in new.unsaved:
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
    def recipes(self) -> Recipes: ...

    def spec(self, trainable: bool = False) -> BindingSpec: ...


@dataclass(frozen=True)
class Reading:
    """The options for reading a file: the adapter of a directory, the renaming of keys, and the component.

    ``several`` says that the file is one of several, some of which may have no components.
    """

    adapter_name: str | None = None
    key_mapping: Mapping[str, str] | None = None
    component: str | None = None
    several: bool = False

    def nothing_to_choose(self, source: str) -> None:
        """Raise ConfigError where a component is asked for of the file at ``source``, whose keys name none."""
        if not self.several:
            nothing_to_choose(self.component, source)

    def component_of(self, raw: RawFile) -> str | None:
        """Return the component to take from a file of another format, or None where the keys are to tell."""
        return None if self.several and self.component is not None and not components_of(raw) else self.component


@checked("adapter_name", "key_mapping", "component")
@limited()
@plainly()
def bind_adapter(
    target: Bindable,
    adapter: Any,
    *,
    config: Any = None,
    adapter_name: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    component: str | None = None,
    trainable: bool = False,
    own: bool = True,
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
        return _strong(target, _checked(target, binding), scale)
    reading = Reading(adapter_name, key_mapping, component)
    if current.parts:
        made = target.recipes.note(_together(target, current, adapter, config, trainable, reading))
        return _strong(target, made, scale, list(adapter) if isinstance(adapter, Mapping) else None)
    spec = target.spec(trainable)
    if lost := list(spec.residual):
        raise SwapError(
            f"the file this program came from holds only its own adapter's version of {lost[:3]} (its initialisation "
            "changed the base), so no other adapter can be bound to it. Compile the original model instead."
        )
    recipes = target.recipes
    return _strong(target, recipes.note(_bound(spec, adapter, config, reading, current.config, recipes, own)), scale)


def _strong(target: Bindable, binding: Binding, scale: Any, names: Iterable[str] | None = None) -> Binding:
    """Return ``binding``, which fits ``target``, with the factors of ``scale``; note that the new binding fits, too."""
    return binding if scale is None else target.recipes.note(with_scale(target.spec(), binding, scale, names))


def _checked(target: Bindable, binding: Binding) -> Binding:
    if not binding.values:
        raise SwapError(
            "this is the base, which is no adapter: call prog.base or what prog.bind(None) returned, or take the "
            "adapter out with adaptc.unload"
        )
    if binding.values.keys() != target.recipes.needed:
        raise SwapError(
            "the binding belongs to a program with other sites; bind the adapter to this one: prog.bind(...)"
        )
    name, value = next(iter(binding.values.items()))
    if value.device != target.device:
        raise SwapError(
            f"the binding has {name!r} on {value.device}, and the program is on {target.device}; bind the adapter to "
            f"this program, or move the binding there: binding.to({str(target.device)!r})"
        )
    if not target.recipes.fit(binding):
        check_fits(target.spec(), binding)
    return target.recipes.note(binding)


def _together(
    target: Bindable, current: Binding, adapter: Any, config: Any, trainable: bool, reading: Reading
) -> Binding:
    """Return a binding in which the named adapters of several that act together are exchanged.

    Adapters that are not named stay, and None turns one off.
    """
    parts = dict(current.parts)
    if not isinstance(adapter, Mapping) or not adapter or not parts.keys() >= adapter.keys():
        raise SwapError(
            f"the program has several adapters that act together; name the one to change, for example "
            f"swap(prog, {{{next(iter(parts))!r}: adapter}}), of {list(parts)}"
        )
    if config is not None and len(adapter) > 1:
        raise ConfigError(f"config= is of one adapter, and {len(adapter)} are given: swap to one after the other")
    spec, reading = target.spec(trainable), replace(reading, several=len(adapter) > 1)
    for name, new in adapter.items():
        own = part_of(spec, name)
        if new is None:
            parts[name] = first_values(own, parts[name].config, only={})
        else:
            # Recipes are for the spec of the whole program, and a part has its own.
            parts[name] = _bound(own, new, config, reading, parts[name].config, None, True)
    if reading.several and reading.component not in (None, *(parts[n].origin.component for n in adapter)):
        raise ConfigError(
            f"component={reading.component!r} chooses from a file whose keys name components, and none of "
            f"{', '.join(map(repr, adapter))} is one; leave it out"
        )
    return binding_of_parts(spec, parts)


def _bound(
    spec: BindingSpec,
    adapter: Any,
    config: Any,
    reading: Reading,
    current: AdapterConfig,
    recipes: Recipes | None,
    own: bool,
) -> Binding:
    if hasattr(adapter, "as_file"):
        adapter = adapter.as_file()
    source, copy = str(adapter) if isinstance(adapter, (str, os.PathLike)) else "state dict", own
    if isinstance(adapter, (str, os.PathLike)):
        adapter = read_whole(adapter, adapter_name=reading.adapter_name, key_mapping=reading.key_mapping)
        copy = False
    elif reading.adapter_name is not None:
        raise ConfigError(
            f"adapter_name={reading.adapter_name!r} chooses from a directory of adapters, and the adapter is a "
            f"{type(adapter).__name__}: leave it out"
        )
    elif isinstance(adapter, Mapping):
        if not (adapter and isinstance(first := next(iter(adapter)), str) and of_other_format(first, spec.weights)):
            reading.nothing_to_choose(source)
            return _of_mapping(recipes, spec, adapter, current, config, reading.key_mapping, copy=own)
        adapter = in_memory(rename(given(adapter, source), reading.key_mapping, source))
    elif isinstance(adapter, AdapterFile):
        source = str(adapter.path)
        given(adapter.tensors, source)
        adapter = replace(adapter, tensors=rename(adapter.tensors, reading.key_mapping, source))
    if isinstance(adapter, AdapterFile) and has_parts(config_class(str(adapter.config.get("peft_type")))):
        stated = of_file(adapter) if config is None else as_config(config)
        stated, adapter = read_experts(stated, adapter, spec.weights, of_file)
        config = None if config is None else stated
    if isinstance(adapter, RawFile):
        theirs = None if config is None else as_config(config)
        adapter = translated(adapter, spec.weights, component=reading.component_of(adapter), config=theirs)
        config = None  # translated() put it into the file
    elif isinstance(adapter, AdapterFile):
        reading.nothing_to_choose(source)
    else:
        raise AdaptcError(
            f"an adapter is a directory, a file, a state dict, a binding, or what prog.bind returned; got "
            f"{type(adapter).__name__}"
        )
    return replace(_of_file(recipes, spec, adapter, source, config, copy=copy), origin=adapter.origin)


def _of_file(
    recipes: Recipes | None, spec: BindingSpec, file: AdapterFile, source: str, config: Any, *, copy: bool
) -> Binding:
    """Return the binding of a file's tensors, with ``config``, or with the file's own config if that is None."""
    kind = None if recipes is None or config is not None else structure(spec, file.config, file.tensors)
    recipe = None if recipes is None or kind is None else recipes.find(kind)
    if recipe is not None:
        own = of_file(file)
        if type(own) is recipe.kind and all_finite(file.runs or file.tensors.values()):
            made = recipe(own, file.tensors, source, copy=copy)
            if made is not None:
                return made
    stacked = stack_old_experts(file, spec.weights)
    own = as_config(config) if config is not None else of_file(stacked)
    binding = bind(spec, own, stacked.tensors, source, fit=False, copy=copy)
    if recipes is not None and stacked is file:
        recipes.learn(kind, spec, binding, file.tensors, fit=False)
    return binding


def _of_mapping(
    recipes: Recipes | None,
    spec: BindingSpec,
    adapter: Mapping[str, Tensor],
    theirs: AdapterConfig,
    config: Any,
    key_mapping: Mapping[str, str] | None,
    *,
    copy: bool,
) -> Binding:
    """Return the binding of a state dict with ``config``, or if that is None, with ``theirs`` and the rank of the
    tensors."""
    tensors, fit = given(adapter, "state dict", theirs.peft_type), config is None
    tensors = rename(tensors, key_mapping, "state dict")
    own = theirs if config is None else as_config(config)
    kind = None if recipes is None else structure(spec, own, tensors, fit)
    recipe = None if recipes is None or kind is None else recipes.find(kind)
    if recipe is not None:
        made = recipe(own, tensors, "state dict", copy=copy)
        # The caller may write to its tensors meanwhile, so copies are checked, not originals. Scales, which have no
        # axes, come from the config.
        if made is not None and all_finite([v for v in made.values.values() if v.ndim] if copy else tensors.values()):
            return made
    binding = bind(spec, own, tensors, "state dict", fit=fit, copy=copy)
    if recipes is not None:
        recipes.learn(kind, spec, binding, tensors, fit=fit)
    return binding
