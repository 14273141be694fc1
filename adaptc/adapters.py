"""What a user may hand over as an adapter, turned into a config or a binding.

A config object of adaptc or peft, a PEFT adapter directory, a state dict with PEFT's keys, or a ready Binding.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from adaptc._recipes import Recipes, recipes_of, structure
from adaptc.binding import Binding, Slate, bind, first_values
from adaptc.checkpoint import AdapterFile, all_finite, bare_key, read_adapter
from adaptc.errors import AdaptcError, ConfigError, SwapError
from adaptc.methods._base import AdapterConfig
from adaptc.methods._registry import config_class
from adaptc.several import part_of, together
from adaptc.stacked_experts import restack

if TYPE_CHECKING:
    from adaptc.program import AdaptedProgram


def as_config(config: Any, key_mapping: Mapping[str, str] | None = None) -> tuple[AdapterConfig, AdapterFile | None]:
    """A config, and the adapter's file when ``config`` is a directory. Raises ConfigError or CheckpointError."""
    if isinstance(config, AdapterConfig):
        return config, None
    if isinstance(config, (str, os.PathLike)):
        file = read_adapter(Path(config), key_mapping=key_mapping)
        return of_file(file), file
    if isinstance(config, Mapping):
        return from_dict(config), None
    if hasattr(config, "to_dict") and hasattr(config, "peft_type"):
        return from_peft(config), None
    raise ConfigError(
        f"expected a config such as LoraConfig, a peft config, or an adapter directory; got {type(config).__name__}"
    )


def from_dict(data: Mapping[str, Any]) -> AdapterConfig:
    """From the content of ``adapter_config.json``."""
    cls = config_class(str(data.get("peft_type")))
    return cls.from_dict(data)


def of_file(file: AdapterFile) -> AdapterConfig:
    """The config of a file. How EVA chose the first values is of no matter any more: it leaves the base as it was."""
    data = dict(file.config)
    if data.get("init_lora_weights") == "eva":
        data |= {"init_lora_weights": True, "eva_config": None}
    return from_dict(data)


def fitted(
    config: AdapterConfig, file: AdapterFile | None, weights: Mapping[str, Tensor]
) -> tuple[AdapterConfig, AdapterFile | None]:
    """Both for a model with these weights, where the file was made for an older layout of it."""
    new = None if file is None else restack(file, weights)
    return (config, file) if new is None or new is file else (of_file(new), new)


def from_peft(config: Any) -> AdapterConfig:
    """From a config object of the peft library, which need not be importable here."""
    data = dict(config.to_dict())
    data["peft_type"] = getattr(data.get("peft_type"), "value", data.get("peft_type"))
    data["task_type"] = getattr(data.get("task_type"), "value", data.get("task_type"))
    if getattr(config, "runtime_config", None) is not None:
        offload = getattr(config.runtime_config, "ephemeral_gpu_offload", False)
        data["runtime_config"] = {"ephemeral_gpu_offload": True} if offload else None
    new = from_dict(data)
    for name in new.unsaved:
        setattr(new, name, getattr(config, name, None))
    return new


def as_binding(
    program: AdaptedProgram,
    adapter: Any,
    *,
    config: Any = None,
    adapter_name: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    trainable: bool = False,
) -> Binding:
    """``adapter`` bound to the program's slots; nothing of the program changes.

    ``key_mapping``: regular expression -> replacement, for directories whose keys were written for other module names.
    A state dict has PEFT's keys, with or without ``base_model.model.``; its scale comes from ``config``, or else from
    the program's own config, with the rank of the tensors. Raises SwapError or CheckpointError.
    """
    if program._binding is None:
        raise SwapError("the program has no adapter sites; it was merged or unloaded")
    if isinstance(adapter, Binding):
        if adapter.values.keys() != recipes_of(program).needed:
            raise SwapError(
                "the binding belongs to a program with other sites; bind the adapter to this one: prog.bind(...)"
            )
        return adapter
    if program.binding.parts:
        return _together(program, adapter, trainable, key_mapping)
    if lost := list(program.adaptation.residual):
        raise SwapError(
            f"the file this program came from holds only its own adapter's version of {lost[:3]} (its initialisation "
            "changed the base), so no other adapter can be bound to it. Compile the original model instead."
        )
    return _bound(program, program.slate(trainable), adapter, config, adapter_name, key_mapping)


def _together(program: AdaptedProgram, adapter: Any, trainable: bool, key_mapping: Mapping[str, str] | None) -> Binding:
    """Adapters by name for a program in which several act together; those not named stay, None turns one off."""
    parts = dict(program.binding.parts)
    if not isinstance(adapter, Mapping) or not adapter or not parts.keys() >= adapter.keys():
        raise SwapError(
            f"the program has several adapters that act together; name the one to change, for example "
            f"swap(prog, {{{next(iter(parts))!r}: adapter}}), of {list(parts)}"
        )
    slate = program.slate(trainable)
    for name, new in adapter.items():
        own = part_of(slate, name)
        if new is None:
            parts[name] = first_values(own, parts[name].config, only={})
        else:
            parts[name] = _bound(program, own, new, None, None, key_mapping, parts[name].config)
    return together(parts)


def _bound(
    program: AdaptedProgram,
    slate: Slate,
    adapter: Any,
    config: Any,
    adapter_name: str | None,
    key_mapping: Mapping[str, str] | None,
    current: AdapterConfig | None = None,
) -> Binding:
    # A part of a program has a slate of its own, which the program's recipes are not for.
    recipes = recipes_of(program) if current is None else None
    if isinstance(adapter, (str, os.PathLike)):
        file = read_adapter(Path(adapter), adapter_name=adapter_name, key_mapping=key_mapping)
        return _of_file(recipes, slate, file, str(adapter), config)
    if isinstance(adapter, Mapping):
        return _of_mapping(recipes, slate, adapter, current or program.binding.config, config)
    if isinstance(adapter, AdapterFile):
        return _of_file(recipes, slate, adapter, str(adapter.path), None)
    raise AdaptcError(f"an adapter is a directory, a state dict or a binding; got {type(adapter).__name__}")


def _of_file(recipes: Recipes | None, slate: Slate, file: AdapterFile, source: str, config: Any) -> Binding:
    """A file's tensors, with ``config`` instead of the file's own unless it is None."""
    kind = None if recipes is None or config is not None else structure(slate, file.config, file.tensors)
    recipe = None if recipes is None or kind is None else recipes.find(kind)
    if recipe is not None:
        own = of_file(file)
        if type(own) is recipe.kind and all_finite(file.runs or file.tensors.values()):
            return recipe(own, file.tensors, source)
    stacked = restack(file, slate.weights)
    own = as_config(config)[0] if config is not None else of_file(stacked)
    binding = bind(slate, own, stacked.tensors, source, fit=False)
    if recipes is not None and stacked is file:
        recipes.learn(kind, slate, binding, file.tensors, fit=False)
    return binding


def _of_mapping(
    recipes: Recipes | None, slate: Slate, adapter: Mapping[str, Tensor], theirs: AdapterConfig, config: Any
) -> Binding:
    """A state dict, with ``config`` or, if that is None, with ``theirs`` and the rank of the tensors."""
    tensors, fit = bare(adapter, theirs.peft_type), config is None
    own = theirs if config is None else as_config(config)[0]
    kind = None if recipes is None else structure(slate, own, tensors, fit)
    recipe = None if recipes is None or kind is None else recipes.find(kind)
    if recipe is not None and all_finite(tensors.values()):
        return recipe(own, tensors, "state dict")
    binding = bind(slate, own, tensors, "state dict", fit=fit)
    if recipes is not None:
        recipes.learn(kind, slate, binding, tensors, fit=fit)
    return binding


def bare(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        out[bare_key(key, kind) or key] = value
    return out
