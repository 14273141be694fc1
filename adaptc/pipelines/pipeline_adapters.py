"""Hold the adapters of a pipeline: which components run programs, and how a verb changes all of them at once.

A verb first makes the new state of every component that it changes, with what its calls will run. Only then does it put
all of them in place. So a verb that raises changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from adaptc.capture.inputs.diffusion_inputs import is_diffusion_model
from adaptc.errors import CheckpointError, ConfigError, did_you_mean, listing, short_repr
from adaptc.passes.quantized.quantized_merge import QuantizedMerge
from adaptc.pipelines.component_factors import component_factor, expand_factor, weights_by_adapter
from adaptc.pipelines.component_module import ComponentModule
from adaptc.pipelines.component_program import ComponentOptions, capture_component, check_package, component_example
from adaptc.pipelines.component_state import ComponentState
from adaptc.pipelines.read_adapter import adapters_of_components, read_adapter, split_by_component

#: names of denoisers of pipelines that have no loader of adapters
_DENOISERS = ("unet", "transformer")


def adaptable_components(pipeline: Any) -> dict[str, Any]:
    """Return name -> module of the components that take adapters, None for those that the pipeline lacks."""
    names = getattr(type(pipeline), "_lora_loadable_modules", _DENOISERS)
    return {n: getattr(pipeline, n, None) for n in names}


@dataclass
class PipelineAdapters:
    """The components of one pipeline that take adapters, and the options of their programs."""

    pipeline: Any
    options: ComponentOptions

    # -- what there is -------------------------------------------------------------------------------------------------

    @property
    def components(self) -> dict[str, Any]:
        """Return name -> module of the components that take adapters; None for those that the pipeline lacks."""
        return adaptable_components(self.pipeline)

    @property
    def programs(self) -> dict[str, ComponentModule]:
        """Return name -> module of the components that run programs."""
        return {n: m for n, m in self.components.items() if isinstance(m, ComponentModule)}

    @property
    def denoisers(self) -> list[str]:
        """Return the names of the denoisers."""
        return [n for n, m in self.components.items() if isinstance(m, ComponentModule) or is_diffusion_model(m)]

    def names(self) -> list[str]:
        """Return the names of all adapters."""
        return list(dict.fromkeys(n for m in self.programs.values() for n in m.state.adapters))

    def check_names(self, names: Iterable[Any]) -> None:
        """Raise ConfigError for a name of no adapter."""
        known = self.names()
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"the pipeline has no adapter {short_repr(name)}{did_you_mean(str(name), known)}; it has "
                    f"{listing(map(repr, known)) or 'none'}"
                )

    # -- changes -------------------------------------------------------------------------------------------------------

    def change(self, make: Callable[[str, ComponentState], ComponentState]) -> None:
        """Replace the state of every component that runs a program by what ``make`` gives for its name and state."""
        self._install({n: make(n, m.state) for n, m in self.programs.items()}, {})

    def load(self, name: str, source: Any, *, keep_active: bool = False, into: str | None = None) -> None:
        """Load an adapter under ``name``. ``into``: the denoiser that it is for; None for the pipeline's first.

        Components that it is for, and that run no program yet, are captured. Raises like ``adaptc.compile``.
        """
        for module in self.programs.values():
            module.state.check_not_fused("load an adapter")
        by_component = adapters_of_components(source, self.components)
        attempts = read_adapter(self.pipeline, source) if by_component is None else [by_component]
        for i, data in enumerate(attempts):
            try:
                states, captured = self._changes(name, data, keep_active, into)
            except CheckpointError:
                if i + 1 == len(attempts):
                    raise
            else:
                self._install(states, captured)
                return

    def _changes(
        self, name: str, data: Any, keep_active: bool, into: str | None
    ) -> tuple[dict[str, ComponentState], dict[str, ComponentModule]]:
        """Return what loading an adapter changes: the states of components that run programs, and new modules."""
        components = self.components
        denoiser = self.denoisers[0] if into is None else into
        found = data if isinstance(data, dict) else split_by_component(data, components, denoiser)
        states: dict[str, ComponentState] = {}
        captured: dict[str, ComponentModule] = {}
        for component, part in found.items():
            module = components[component]
            if isinstance(module, ComponentModule):
                states[component] = module.state.with_adapter(name, module.readable(part), keep_active)
                continue
            new = captured[component] = self.capture(component, module)
            new.state = new.state.with_adapter(name, new.readable(part)).changed(is_on=self._is_on())
        if keep_active:
            for component, module in self.programs.items():
                if component not in found and name in module.state.adapters:
                    states[component] = module.state.without([name])
        return states, captured

    def capture(self, component: str, module: nn.Module) -> ComponentModule:
        """Return a module that runs a program of ``module``, without adapters."""
        example = component_example(module, self.options)
        package = self.options.packages.get(component)
        if package is not None:
            check_package(component, package, example)
        program = package or capture_component(module, example, self.options)
        state = ComponentState(program, self.options)
        return ComponentModule(component, module, example, state)

    def set_active(self, names: str | Sequence[str], weights: Any) -> None:
        """Let these adapters act with these weights, as diffusers' ``set_adapters`` means them."""
        weight_of = weights_by_adapter(names, weights)
        self.check_names(weight_of)
        owners = {n: [c for c, m in self.programs.items() if n in m.state.adapters] for n in weight_of}

        def make(component: str, state: ComponentState) -> ComponentState:
            factors: dict[str, Any] = {}
            for name, weight in weight_of.items():
                one = component_factor(name, weight, component, owners[name], list(self.components))
                if name in state.adapters:
                    original = self.programs[component].original
                    one = expand_factor(name, one, original, state.modules_of(name))
                factors[name] = one
            return state.with_active(factors)

        self.change(make)

    def fuse(
        self,
        components: Sequence[str],
        names: Sequence[str] | None,
        scale: float,
        safe: bool,
        quantized: QuantizedMerge | None,
    ) -> None:
        """Merge adapters into the weights of these components."""
        if names is not None:
            self.check_names(names)
        self.change(lambda n, state: state.fused(names, scale, safe, quantized) if n in components else state)

    def _is_on(self) -> bool:
        return all(m.state.is_on for m in self.programs.values())

    def _install(self, states: Mapping[str, ComponentState], captured: Mapping[str, ComponentModule]) -> None:
        for state in [*states.values(), *(m.state for m in captured.values())]:
            _ = state.runner  # what calls run is made now, so that an error comes before any change
        modules = self.programs
        for component, state in states.items():
            modules[component].state = state
        # diffusers' own setattr would note this class in the pipeline's config.
        vars(self.pipeline).update(captured)


def default_name(adapters: PipelineAdapters) -> str:
    """Return diffusers' name of an adapter that is given none."""
    counts = [len(m.state.adapters) for n, m in adapters.programs.items() if n in adapters.denoisers]
    return f"default_{max(counts, default=0)}"


def check_components(adapters: PipelineAdapters, components: Any) -> list[str]:
    """Return the names of components that a caller gave, or all of them for None. Raises ConfigError for others."""
    known = list(adapters.components)
    if components is None:
        return known
    found = [components] if isinstance(components, str) else list(components)
    for name in found:
        if name not in known:
            raise ConfigError(f"components: {short_repr(name)} takes no adapters; these do: {listing(known)}")
    if not found:
        raise ConfigError(f"components is empty: leave it out for all of {listing(known)}")
    return found
