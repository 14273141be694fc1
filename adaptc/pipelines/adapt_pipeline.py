"""Adapt a pipeline of diffusers: a shallow copy of it whose denoiser runs as a program, and its text encoders where an
adapter is for them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from adaptc.binding.combine_bindings import adapters_by_name
from adaptc.errors import CaptureError, ConfigError, listing
from adaptc.pipelines.adapted_pipeline import AdaptedPipeline
from adaptc.pipelines.component_module import ComponentModule
from adaptc.pipelines.component_program import ComponentOptions
from adaptc.pipelines.pipeline_adapters import PipelineAdapters, adaptable_components
from adaptc.pipelines.token_times import gives_token_times


def is_pipeline(model: object) -> bool:
    """Return whether ``model`` is a pipeline of diffusers, told by the names of its classes."""
    return any(c.__name__ == "DiffusionPipeline" and c.__module__.startswith("diffusers.") for c in type(model).__mro__)


def adapt_pipeline(pipeline: Any, adapter: Any, options: ComponentOptions, adapter_name: str = "default") -> Any:
    """Return a shallow copy of ``pipeline`` with ``adapter``, a config, a file, or a dict of these by name.

    The caller's pipeline and its modules are unchanged. Raises CaptureError for a denoiser that cannot be captured, and
    ConfigError and CheckpointError for what is no adapter of the pipeline.
    """
    if isinstance(pipeline, AdaptedPipeline):
        raise ConfigError("the pipeline is adapted already: pipe.load_lora_weights loads another adapter")
    components = adaptable_components(pipeline)
    if all(m is None for m in components.values()):
        raise CaptureError(
            f"{type(pipeline).__name__} has no denoiser that takes adapters: one of {listing(components)}"
        )
    new = copy.copy(pipeline)
    new.__class__ = _adapted_class(type(pipeline))
    # A scheduler counts the steps of a call, and calls of the two pipelines must not meet in it.
    vars(new).update({n: copy.deepcopy(v) for n, v in vars(pipeline).items() if n == "scheduler"})
    # Another task of an adapted pipeline, by from_pipe, has its programs.
    vars(new).update({n: m.twin() for n, m in components.items() if isinstance(m, ComponentModule)})
    with_residuals = getattr(pipeline, "controlnet", None) is not None
    for name in options.packages:
        if components.get(name) is None or isinstance(components[name], ComponentModule):
            raise ConfigError(f"packages has {name!r}, and a package can take the place of: {_capturable(components)}")
    calls_with = {"with_residuals": with_residuals, "token_times": gives_token_times(pipeline)}
    held = PipelineAdapters(new, replace(options, **calls_with))
    vars(new)["adapters"] = held
    named = adapters_by_name(adapter) if isinstance(adapter, Mapping) else None
    given: Mapping[str, Any] = {adapter_name: adapter} if named is None else named
    for name, source in given.items():
        if source is not None:
            held.load(name, source)
    captured = {n: held.capture(n, components[n]) for n in held.denoisers if n not in held.programs}
    vars(new).update(captured)
    if len(given) > 1:
        held.set_active(list(given), None)
    return new


def _capturable(components: Mapping[str, Any]) -> str:
    return listing(n for n, m in components.items() if m is not None and not isinstance(m, ComponentModule))


@cache
def _adapted_class(pipeline_class: type) -> type:
    """Return the class of adapted pipelines of a class; it has its name, by which diffusers finds related classes."""
    return type(pipeline_class.__name__, (AdaptedPipeline, pipeline_class), {"__module__": pipeline_class.__module__})
