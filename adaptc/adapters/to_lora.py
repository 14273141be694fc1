"""Convert adapters of any method to LoRA (``convert_to_lora``), alone or combined by their changes of a model's
weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from adaptc.adapters.adapter import Adapter
from adaptc.adapters.combining.average_saved_modules import averaged
from adaptc.adapters.combining.combine_options import Options
from adaptc.adapters.combining.combine_rules import mixed
from adaptc.adapters.combining.truncated_svd import Cut
from adaptc.adapters.deltas_to_lora import as_lora, cut_of
from adaptc.adapters.from_program import program_and_binding
from adaptc.adapters.weight_deltas import Change, Changes
from adaptc.binding.binding import Binding
from adaptc.binding.sources.source import bind_adapter
from adaptc.errors import ConfigError
from adaptc.methods import united
from adaptc.passes.protocol.attachment import Attachment
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.compile_program import compiled
from adaptc.program.wrapper import inside
from adaptc.runtime.options import RunOptions
from adaptc.state.bound import Bound
from adaptc.state.core import ProgramCore
from adaptc.state.unload_program import unloaded


def convert_to_lora(
    adapter: Any,
    model: Any = None,
    *,
    rank: float,
    example_inputs: Any = None,
    config: Any = None,
    key_mapping: Mapping[str, str] | None = None,
    component: str | None = None,
) -> Adapter:
    """Return the LoRA adapter nearest to ``adapter``: the changes that it makes to each weight, cut to a rank.

    ``adapter`` is a program or generator, whose current adapter is meant, or a result of ``bind``. With the ``model``
    that it is for, it is any adapter that :func:`compile` takes. ``model`` and ``example_inputs`` are as for
    :func:`compile`. ``rank`` is an integer, or a fraction above 0 and at most 1. A fraction is the part of the energy
    (the sum of the squared singular values) to keep of each weight, which decides its rank. Every method that changes
    weights has a LoRA; ``.report`` of the result has the error of each weight. Tensors that are trained whole stay as
    they are. The result has scale 1 (alpha = r).

    Raises ConfigError for methods and layers for which LoRA has no form, and CheckpointError for adapters that do not
    fit.
    """
    cut, adapter = cut_of(rank), inside(adapter)
    if isinstance(adapter, (ProgramCore, Bound)):
        said = {"model": model, "example_inputs": example_inputs, "config": config}
        if given := [
            n for n, v in (said | {"key_mapping": key_mapping, "component": component}).items() if v is not None
        ]:
            raise ConfigError(
                f"{given[0]} goes with an adapter that is no program's; a program has its model: leave it out"
            )
        program, binding = program_and_binding(adapter)
    else:
        if model is None:
            raise ConfigError(
                "what an adapter changes is known with the model: give it, convert_to_lora(adapter, model, rank=...), "
                "or a program that has the adapter"
            )
        program = _program(
            model, adapter, example_inputs, override=config, key_mapping=key_mapping, component=component
        )
        binding = program.binding
    spec = program.spec()
    changes = Changes(spec, binding)
    if not changes.sites:
        raise ConfigError(f"{binding.source} changes no weight by its method, so there is nothing to make LoRA of")
    sites = [(group[0], lambda f=fqn: changes.at(f)) for fqn, group in changes.sites.items()]
    made = as_lora(changes.config, spec, sites, cut, binding.source or "the program's adapter", changes.others)
    return Adapter(made.config, made.tensors, f"LoRA of {binding.source}", made.report)


@torch.no_grad()
def combined_changes(
    adapters: Sequence[Any],
    weights: Sequence[float],
    options: Options,
    model: Any,
    example_inputs: Any,
    key_mapping: Mapping[str, str] | None,
    source: str,
) -> Adapter:
    """Return the LoRA of the changes that several adapters of any methods make to a model's weights, combined by a
    rule."""
    options = options.of("svd")
    if not options.dense:
        raise ConfigError(
            f"method={options.method!r} works on factors that adapters have in common, and with model= the changes of "
            "its weights are combined: use svd, ties_svd, dare_linear_svd, dare_ties_svd or magnitude_prune_svd"
        )
    program = _program(model, list(adapters), example_inputs, key_mapping=key_mapping)
    spec = program.spec()
    parts = [Changes(spec, _bound(program, a, key_mapping)) for a in adapters]
    names = [[g[0].name or g[0].module for g in p.sites.values()] for p in parts]
    config = parts[0].config.completed({})
    for name, value in united([p.config for p in parts], names).items():
        setattr(config, name, value)
    where: dict[str, Attachment] = {f: g[0] for p in parts for f, g in p.sites.items()}
    ranks = [r for p in parts for m in p.binding.methods.values() if (r := m.rank()) is not None]
    if options.svd_rank is None and not ranks:
        raise ConfigError(f"adapters of {parts[0].config.peft_type} have no rank: say that of the result, svd_rank=")
    cut = Cut(options.svd_rank or max(ranks), None, options.svd_clamp, options.svd_full_matrices, options.svd_driver)

    def change(fqn: str) -> Change:
        has = [i for i, p in enumerate(parts) if fqn in p.sites]
        own = [weights[i] for i in has]
        found = [parts[i].at(fqn) for i in has]
        bias = next((c.bias for c in found if c.bias is not None), None)
        if bias is not None:
            none = torch.zeros_like(bias)
            bias = mixed([none if c.bias is None else c.bias for c in found], own, options)
        return Change(mixed([c.matrix for c in found], own, options), bias)

    sites = [(a, lambda f=fqn: change(f)) for fqn, a in where.items()]
    base = {k: t.detach() for k, t in spec.weights.items()}
    others = averaged(_Named.all(parts), weights, [p.others for p in parts], base)
    made = as_lora(config, spec, sites, cut, source, others)
    return Adapter(made.config, made.tensors, source, made.report)


class _Named:
    """An adapter with the attributes that messages and :func:`averaged` need."""

    def __init__(self, changes: Changes) -> None:
        self.config, self.tensors, self.source = changes.config, changes.others, changes.binding.source

    @classmethod
    def all(cls, parts: Sequence[Changes]) -> list[_Named]:
        return [cls(p) for p in parts]


def _program(model: Any, adapter: Any, example_inputs: Any, **options: Any) -> AdaptedProgram:
    model = inside(model)
    base = unloaded(model) if isinstance(model, AdaptedProgram) else model
    return compiled(base, adapter, RunOptions(), example_inputs=example_inputs, **options)


def _bound(program: AdaptedProgram, adapter: Any, key_mapping: Mapping[str, str] | None) -> Binding:
    return bind_adapter(program, adapter, key_mapping=key_mapping)
