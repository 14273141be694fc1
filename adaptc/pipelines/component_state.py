"""Hold what one component of a pipeline runs: its program, the adapters that were loaded, and which of them act.

A state is frozen. Each change makes another one, which shares the programs. So a change of several components is made
in full before any of it is seen. ``runner`` is what calls run. Several LoRA adapters that act together are bound as one
adapter, their exact sum. Calls cost what their ranks add up to, and adapters that do not act cost nothing.

All LoRA adapters are bound to one program, and adapters of another method to a program that has its sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

from torch import Tensor

from adaptc.adapter_files.load import has_tensors
from adaptc.adapters.adapter import Adapter
from adaptc.adapters.combining.combine_options import CombineOptions
from adaptc.adapters.combining.combine_tensors import combine_tensors
from adaptc.adapters.from_program import adapter_of_program
from adaptc.binding.bind import initial_values
from adaptc.binding.bind_adapter import bind_adapter
from adaptc.binding.binding import Binding
from adaptc.binding.binding_scale import sites_with_scale, with_scale, with_scales_multiplied, with_site_factors
from adaptc.errors import ConfigError, SwapError, listing
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.passes.quantized.quantized_merge import QuantizedMerge
from adaptc.pipelines.component_program import ComponentOptions, with_new_base, with_sites_of
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.state.merge_program import merge_program

#: a factor on an adapter's scale, or one for each module that the adapter has
Factor = float | Mapping[str, float]
#: how many factors of single calls are kept with their tensors
_MAX_SCALED = 4


@dataclass(frozen=True, eq=False)
class PlacedAdapter:
    """An adapter with the program that it is bound to."""

    program: AdaptedProgram | PackagedProgram
    binding: Binding


@dataclass(frozen=True, eq=False)
class ComponentState:
    """The adapters and programs of one component.

    Attributes:
        program: the program for LoRA, whose own binding is never read; or the package of one.
        options: the options that its programs are made with.
        adapters: name -> the adapter, bound with the scale that it was made with.
        factors: name -> its factor, whether it acts or not; 1 where there is none.
        active: the names that act, which may be those of adapters that only other components have.
        is_on: whether adapters act at all.
        merged: the program with adapters in its weights; None where nothing is fused.
        merged_names: the names of these adapters.
    """

    program: AdaptedProgram | PackagedProgram
    options: ComponentOptions
    adapters: Mapping[str, PlacedAdapter] = field(default_factory=dict[str, PlacedAdapter])
    factors: Mapping[str, Factor] = field(default_factory=dict[str, Factor])
    active: Sequence[str] = ()
    is_on: bool = True
    merged: AdaptedProgram | None = None
    merged_names: Sequence[str] = ()
    _scaled: dict[float, Any] = field(default_factory=dict[float, Any], repr=False)

    # -- changes -------------------------------------------------------------------------------------------------------

    def with_adapter(self, name: str, adapter: Any, keep_active: bool = False) -> Self:
        """Return the state with one more adapter, which acts alone from now on; ``keep_active`` leaves what acts.

        An adapter of the name is exchanged. Sites that are missing are added, on the same base. Raises
        CheckpointError, ConfigError and SwapError like ``adaptc.swap``.
        """
        self.check_not_fused("load an adapter")
        changed: Any = {"active": self.active if keep_active else (name,)}
        if not keep_active:
            changed["factors"] = {n: f for n, f in self.factors.items() if n != name}
        return self.changed(adapters={**self.adapters, name: self._place(adapter)}, **changed)

    def _place(self, adapter: Any) -> PlacedAdapter:
        """Return an adapter bound to the first program that has its sites, or to a new one."""
        source = adapter
        if isinstance(self.program, PackagedProgram):
            # What does not fit the package's sites and ranks is an error: there is no graph to make others of.
            self.program.pad_adapter(source)
            return PlacedAdapter(self.program, bind_adapter(self.program, source))
        if not has_tensors(adapter):
            source = adapter_of_program(made := with_sites_of(self.program, adapter, self.options), made.binding)
        programs = {id(p): p for p in (self.program, *(a.program for a in self.adapters.values()))}
        for program in programs.values():
            try:
                return PlacedAdapter(program, bind_adapter(program, source))
            except SwapError:  # it has no such sites
                continue
        program = with_sites_of(self.program, source, self.options)
        return PlacedAdapter(program, program.binding)

    def with_active(self, factors: Mapping[str, Factor]) -> Self:
        """Return the state in which these adapters act, with these factors, and no others."""
        self.check_not_fused("choose adapters")
        own = {n: f for n, f in factors.items() if n in self.adapters}
        return self.changed(active=tuple(factors), factors={**self.factors, **own})

    def without(self, names: Iterable[str]) -> Self:
        """Return the state without these adapters. Where none that acted is left, the first of the others acts, as in
        PEFT."""
        self.check_not_fused("delete an adapter")
        gone = set(names)
        left = {n: b for n, b in self.adapters.items() if n not in gone}
        acting = tuple(n for n in self.active if n not in gone)
        if not acting and gone & set(self.active) & set(self.adapters):
            acting = tuple(left)[:1]
        return self.changed(
            adapters=left, active=acting, factors={n: f for n, f in self.factors.items() if n not in gone}
        )

    def without_all(self) -> Self:
        """Return the state without adapters. What was fused stays in the weights for good, as in diffusers."""
        none: dict[str, Any] = {"adapters": {}, "factors": {}, "active": (), "is_on": True}
        if self.merged is None:
            return self.changed(**none)
        program = with_new_base(self.require_program("is merged"), self.merged, self.options)
        return self.changed(program=program, merged=None, merged_names=(), **none)

    def switched(self, is_on: bool) -> Self:
        """Return the state in which adapters act, or none of them."""
        self.check_not_fused("turn adapters on or off")
        return self.changed(is_on=is_on)

    def fused(
        self, names: Sequence[str] | None, scale: float, safe: bool, quantized: QuantizedMerge | None = None
    ) -> Self:
        """Return the state with adapters merged into the weights: these ``names``, or those that act.

        The weights of ``program`` stay, so that :meth:`unfused` is exact. ``quantized`` says what becomes of quantised
        weights. Raises MergeError like ``adaptc.merge``.
        """
        self.check_not_fused("fuse adapters")
        self.require_program("fuse_lora merges into its weights")
        acting = [n for n in (self.active if names is None else names) if n in self.adapters]
        if not acting:
            return self
        chosen = self.changed(active=tuple(acting), is_on=True).acting
        program: Any = chosen.program
        bound = program.with_binding(_scaled(chosen, scale))
        merged, _ = merge_program(bound, safe=safe, quantized=quantized)
        return self.changed(merged=merged, merged_names=tuple(acting))

    def unfused(self) -> Self:
        """Return the state on the original weights."""
        return self.changed(merged=None, merged_names=())

    def changed(self, **changes: Any) -> Self:
        """Return the state with other values of these fields."""
        return replace(self, **changes, _scaled={})

    def require_program(self, why: str) -> AdaptedProgram:
        """Return the program for LoRA. Raises ConfigError, which says ``why``, where a package has its place."""
        if isinstance(self.program, PackagedProgram):
            raise ConfigError(
                f"{self.program.path} is compiled code, and {why}: capture the component, adaptc.compile(pipe, ...) "
                "without packages="
            )
        return self.program

    def check_not_fused(self, what: str) -> None:
        """Raise ConfigError, which says that one cannot do ``what``, where adapters are fused."""
        if self.merged is not None:
            raise ConfigError(
                f"the adapters {listing(map(repr, self.merged_names))} are fused into the weights, which cannot tell "
                f"adapters apart: call pipe.unfuse_lora() before you {what}, or pipe.unload_lora_weights() to keep "
                "what is fused for good"
            )

    # -- what calls run ------------------------------------------------------------------------------------------------

    @cached_property
    def acting(self) -> PlacedAdapter:
        """Return the adapters that act, as one adapter."""
        acting = {n: self.adapters[n] for n in self.active if n in self.adapters and self.is_on}
        factors: dict[str, Factor] = {n: self.factors.get(n, 1.0) for n in acting}
        acting = {n: a for n, a in acting.items() if not _is_zero(factors[n])}
        if not acting:
            none = initial_values(self.program.spec(), self.program.binding.config, methods_by_id={})
            return _fitting(self.program, none)
        if len(acting) > 1:
            program = next(iter(acting.values())).program
            return PlacedAdapter(program, bind_adapter(program, self._sum_of(acting, factors)))
        ((name, placed),) = acting.items()
        program, bound, factor = placed.program, placed.binding, factors[name]
        spec = program.spec()
        if not isinstance(factor, Mapping):
            bound = with_scale(spec, bound, None if factor == 1 else factor)
        else:
            # By site: names of modules would also choose modules whose path ends so.
            sites = {a.id: factor[a.module] for a in sites_with_scale(spec, bound) if a.module in factor}
            if not sites:
                bound = with_scale(spec, bound, 1.0)  # raises the error of a method without a scale
            bound = with_site_factors(spec, bound, sites)
        return _fitting(program, bound)

    @cached_property
    def runner(self) -> Any:
        """Return what calls run."""
        return self.acting.program.bind(self.acting.binding) if self.merged is None else self.merged

    def scaled_runner(self, scale: float) -> Any:
        """Return what calls run whose adapters have ``scale`` times their factors. The last few are kept."""
        if scale == 1:
            return self.runner
        self.check_not_fused("scale adapters in a call")
        if not self.acting.binding.methods:
            return self.runner
        found = self._scaled.get(scale)
        if found is None:
            if len(self._scaled) >= _MAX_SCALED:
                self._scaled.clear()
            found = self.acting.program.bind(_scaled(self.acting, scale))
            self._scaled[scale] = found
        return found

    @property
    def current(self) -> AdaptedProgram | PackagedProgram:
        """Return the program that calls run, with the adapters that act as its current adapter; a package as it is."""
        program = self.acting.program
        return self.merged or (
            program if isinstance(program, PackagedProgram) else program.with_binding(self.acting.binding)
        )

    def adapter(self, name: str) -> Adapter:
        """Return the adapter ``name`` as an object, with the scale that it was made with."""
        return adapter_of_program(self.adapters[name].program, self.adapters[name].binding)

    def moved(self, place: Callable[[Any], Any]) -> Self:
        """Return the state on another device. ``place`` gives a program, or a binding, as it is there."""
        there = {id(p): place(p) for p in self.programs}
        adapters = {n: PlacedAdapter(there[id(a.program)], place(a.binding)) for n, a in self.adapters.items()}
        merged = None if self.merged is None else there[id(self.merged)]
        return self.changed(program=there[id(self.program)], adapters=adapters, merged=merged)

    @property
    def programs(self) -> list[Any]:
        """Return all programs of the state, each once."""
        merged = [] if self.merged is None else [self.merged]
        return list({id(p): p for p in (self.program, *(a.program for a in self.adapters.values()), *merged)}.values())

    def modules_of(self, name: str) -> list[str]:
        """Return the modules that an adapter has."""
        placed = self.adapters[name]
        sites = placed.program.adaptation.attachments
        return list(dict.fromkeys(a.module for a in sites if a.id in placed.binding.methods))

    def _sum_of(self, acting: Mapping[str, Any], factors: Mapping[str, Factor]) -> Adapter:
        objects = [self._with_module_factors(n, factors[n]) for n in acting]
        weights = [f if isinstance(f := factors[n], (int, float)) else 1.0 for n in acting]
        try:
            made = combine_tensors(objects, weights, CombineOptions(), "cat")
        except ConfigError as error:
            raise ConfigError(
                f"the adapters {listing(map(repr, acting))} cannot act together: {error}. Let one of them act: "
                f"pipe.set_adapters({next(iter(acting))!r})"
            ) from error
        return Adapter(*made, " + ".join(acting))

    def _with_module_factors(self, name: str, factor: Factor) -> Adapter:
        adapter = self.adapter(name)
        if not isinstance(factor, Mapping):
            return adapter
        tensors: dict[str, Tensor] = {}
        for key, tensor in adapter.tensors.items():
            module, _, slot = key.partition(".lora_")
            scaled = slot.startswith(("B.", "embedding_B"))
            tensors[key] = tensor * factor[module] if scaled and module in factor else tensor
        return Adapter(adapter.config, tensors, adapter.source)


def _fitting(program: AdaptedProgram | PackagedProgram, binding: Binding) -> PlacedAdapter:
    return PlacedAdapter(program, program.binding_plans.remember_fitting(binding))


def _scaled(placed: PlacedAdapter, scale: float) -> Binding:
    if scale == 1:
        return placed.binding
    return with_scales_multiplied(placed.program.spec(), placed.binding, scale)


def _is_zero(factor: Factor) -> bool:
    return not any(factor.values()) if isinstance(factor, Mapping) else factor == 0
