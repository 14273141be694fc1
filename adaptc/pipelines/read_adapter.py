"""Read an adapter for a pipeline, and split it by the pipeline's components.

A file's keys are given to diffusers' own converter for the pipeline, ``lora_state_dict``. Where that refuses them, or
drops some (LyCORIS, DoRA of kohya), adaptc's own formats read the file. Either way every tensor of the file is used, or
named in an error.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from adaptc.adapter_files.adapter_data import FILE_KEYS, PEFT_KEYS, AdapterData
from adaptc.adapter_files.formats.detect import detect_format
from adaptc.adapter_files.formats.diffusers import LORA_WEIGHT_NAME_SAFE
from adaptc.adapter_files.formats.parts import split_component
from adaptc.adapter_files.load import has_tensors, load
from adaptc.adapters.from_program import as_adapter_object
from adaptc.binding.sources.other_formats import component_names
from adaptc.errors import AdaptcError, CheckpointError, ConfigError, listing, short_repr
from adaptc.pipelines.traced_tensors import lost_keys, plain, traced

#: options of diffusers' ``load_lora_weights`` that say where a file of the Hub is
HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")

_ALPHA = ".alpha"


def find_source(source: Any, options: dict[str, Any]) -> Any:
    """Return ``source``, or the path of the file that it and ``options`` of diffusers' ``load_lora_weights`` name.

    A path that does not exist is taken for a repository of the Hugging Face Hub, from which the file is downloaded.
    Raises CheckpointError where that fails.
    """
    weight_name, subfolder = options.pop("weight_name", None), options.pop("subfolder", None)
    hub = {n: options.pop(n) for n in HUB_OPTIONS if n in options}
    if not isinstance(source, (str, os.PathLike)):
        if weight_name or subfolder:
            raise ConfigError("weight_name and subfolder choose a file, and the adapter is none: leave them out")
        return source
    path = Path(source)
    if path.exists():
        for piece in (subfolder, weight_name):
            path = path / piece if piece and path.is_dir() else path
        return path
    if path.is_absolute() or str(source).count("/") != 1:
        raise CheckpointError(f"there is no file or directory {str(source)!r}, and it is no repository of the Hub")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(source), weight_name or LORA_WEIGHT_NAME_SAFE, subfolder=subfolder, **hub))
    except Exception as error:  # the client has many errors of its own, of networks and of repositories
        raise CheckpointError(
            f"there is no file or directory {str(source)!r}, and the Hub did not give the repository of that name: "
            f"{error}"
        ) from error


def read_adapter(pipeline: Any, source: Any) -> list[Any]:
    """Return what the adapter ``source`` may be, the likeliest first: a config, or tensors whose keys name components.

    The first is what diffusers' converter makes of it, and the second what is in the file. Only the modules tell
    whether the keys of the first are right. Raises CheckpointError for a file that is damaged, or that no format has.
    """
    if not has_tensors(source):
        if isinstance(source, Mapping) and "peft_type" not in source:
            raise CheckpointError(
                f"a dict of {listing(map(short_repr, source)) or 'nothing'} is no adapter: give a state dict, whose "
                "values are tensors, or a dict of adapters by component"
            )
        return [source]
    data = load(source)
    if data.format == PEFT_KEYS:
        return [data]
    converted, why_not = _convert(pipeline, data)
    try:
        component_names(data)
    except CheckpointError as error:
        if converted is None:
            raise CheckpointError(
                f"{error} diffusers' {type(pipeline).__name__} does not read it either: {why_not}"
            ) from error
        return [converted]
    return [data] if converted is None else [converted, data]


def adapters_of_components(source: Any, components: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return component -> adapter where ``source`` is a dict of these, and None where it is anything else.

    An adapter is a program, whose current values are meant, an :class:`adaptc.Adapter`, a config, or what has PEFT's
    keys. Raises CheckpointError for a component that the pipeline lacks.
    """
    if not isinstance(source, Mapping) or not source or not all(n in components for n in source):
        return None
    if missing := [n for n in source if components[n] is None]:
        raise CheckpointError(
            f"there is an adapter for {missing[0]}, which the pipeline lacks: it has "
            f"{listing(n for n, m in components.items() if m is not None)}"
        )
    return {n: _adapter_of_component(a) for n, a in source.items()}


def _adapter_of_component(adapter: Any) -> Any:
    if isinstance(adapter, ExportedProgram):
        return load(as_adapter_object(adapter))
    return load(adapter) if has_tensors(adapter) else adapter


def split_by_component(data: Any, components: Mapping[str, Any], denoiser: str) -> dict[str, Any]:
    """Return component -> what the adapter has for it; PEFT's keys, keys without a component, and configs are for the
    ``denoiser``.

    ``components`` are those of the pipeline that take adapters, by name, None where it lacks one. Raises
    CheckpointError for a component that the pipeline lacks.
    """
    if not isinstance(data, AdapterData) or data.format == PEFT_KEYS:
        return {denoiser: data}
    names = component_names(data)
    _check_all_have_components(data)
    for name in names:
        own = denoiser if name in ("diffusion_model", "unet", "transformer") else name
        if components.get(own) is None:
            keys = [k for k in data.tensors if split_component(k)[0] == name] or list(data.tensors)
            raise CheckpointError(
                f"{data.source} has tensors for {name}, such as {short_repr(keys[0])}, and the pipeline has no "
                f"{own}: it has {listing(n for n, m in components.items() if m is not None)}. Is the adapter for "
                "another pipeline?"
            )
    if not names:
        return {denoiser: data}
    found: dict[str, Any] = {}
    for name in names:
        own = denoiser if name in ("diffusion_model", "unet", "transformer") else name
        found[own] = replace(data, component=name)
    return found


def _check_all_have_components(data: AdapterData[Any]) -> None:
    """Raise CheckpointError for keys without a component beside keys with one, which no component would get."""
    try:
        _, parts = detect_format(data.tensors, data.source)
    except CheckpointError:  # keys that only a model can tell
        return
    component_of = dict(zip(data.tensors, (p.component for p in parts), strict=True))
    if any(component_of.values()) and (lost := [k for k, c in component_of.items() if not c]):
        raise CheckpointError(
            f"{data.source} names components, and {len(lost)} of its {len(component_of)} keys name none, such as "
            f"{short_repr(lost[0])}: put the component that is meant in front, or drop them"
        )


def without_layers(data: Any, layers: Iterable[str]) -> Any:
    """Return the adapter without its LoRA tensors for ``layers``, by their paths; configs are returned as they are.

    No output of the model depends on these layers, such as the last ones of the text in a transformer of images. A
    program has no such layers, and diffusers' adapters have tensors for them.
    """
    paths = [p for layer in layers for p in (re.escape(layer), re.escape(layer.replace(".", "_")))]
    if not isinstance(data, AdapterData) or not paths:
        return data
    unread = re.compile(rf"(?:.*[._])?(?:{'|'.join(paths)})\.(?:lora_(?:A|B|down|up)\.(?:\w+\.)?weight|alpha)")
    kept = {k: t for k, t in data.tensors.items() if not unread.fullmatch(k)}
    return data if len(kept) == len(data.tensors) else replace(data, tensors=kept, flat_tensors=())


def _convert(pipeline: Any, data: AdapterData[Any]) -> tuple[AdapterData[Any] | None, str]:
    """Return the adapter as diffusers' converter has it, or None and the reason."""
    convert = getattr(type(pipeline), "lora_state_dict", None)
    if convert is None:
        return None, f"{type(pipeline).__name__} takes no adapters"
    options: dict[str, Any] = {"return_lora_metadata": True}
    if "return_alphas" in inspect.signature(inspect.unwrap(convert)).parameters:
        options["return_alphas"] = True
    if any(c.__name__ == "StableDiffusionXLLoraLoaderMixin" for c in type(pipeline).__mro__):
        options["unet_config"] = pipeline.unet.config
    try:
        state, *alphas, _ = convert(traced(data.tensors), **options)
    except Exception as error:  # converters raise KeyError and the like for keys that they do not know
        return None, f"{type(error).__name__}: {error}"
    numbers: Mapping[str, Any] = (alphas[0] if alphas else None) or {}
    if not state:
        return None, "it found nothing in it"
    if lost := lost_keys(data.tensors, state, numbers):
        return None, f"it drops {len(lost)} of {len(data.tensors)} keys, such as {short_repr(lost[0])}"
    tensors = {k: plain(t) for k, t in state.items()}
    for key, alpha in numbers.items():
        down = key.removesuffix(_ALPHA)
        if down in tensors:  # of a text encoder: the alpha of one tensor, which has a name of its own
            tensors[down] = tensors[down] * (float(alpha) / tensors[down].shape[0])
        else:
            tensors[key] = torch.tensor(float(alpha))
    converted = replace(data, tensors=tensors, format=FILE_KEYS, flat_tensors=())
    try:
        component_names(converted)
    except AdaptcError as error:
        return None, str(error)
    return converted, ""
