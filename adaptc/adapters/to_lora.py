"""Convert adapters of any method to LoRA (``convert_to_lora``), alone or combined by their changes of a model's
weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from adaptc.adapters.adapter import Adapter
from adaptc.adapters.combining.average_saved_modules import average_saved
from adaptc.adapters.combining.combine_options import CombineOptions
from adaptc.adapters.combining.combine_rules import combine_by_rule
from adaptc.adapters.combining.truncated_svd import Truncation
from adaptc.adapters.deltas.deltas_to_lora import make_lora, parse_rank
from adaptc.adapters.deltas.weight_deltas import AdapterDeltas, WeightDelta
from adaptc.adapters.from_program import program_and_binding
from adaptc.binding.bind_adapter import bind_adapter
from adaptc.binding.binding import Binding
from adaptc.errors import ConfigError
from adaptc.methods import union_target_fields
from adaptc.passes.protocol.attachment import Attachment
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.compile_program import compile_model
from adaptc.program.wrapper import unwrap
from adaptc.runtime.options import RunOptions
from adaptc.state.core import ProgramCore
from adaptc.state.graph_engine import graph_runner
from adaptc.state.merge_program import unload_program


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

    Every method that changes weights has a LoRA. Tensors that are trained whole stay as they are.

    Args:
        adapter: a program or generator, whose current adapter is meant, or a result of ``bind``. With ``model``, any
            adapter that :func:`compile` takes.
        model: the model that the adapter is for, as for :func:`compile`.
        rank: an integer, or a fraction above 0 and at most 1. A fraction is the part of the energy (the sum of the
            squared singular values) to keep of each weight, which decides its rank.
        example_inputs: the inputs of ``model``, as for :func:`compile`.
        config: the config of an adapter without one.
        key_mapping: regular expression -> replacement, applied to the keys as :func:`swap` does.
        component: the part to take of a file that has several; see :func:`compile`.

    Returns:
        an adapter with scale 1 (alpha = r), whose ``report`` has the error of each weight.

    Raises:
        ConfigError: LoRA has no form for the method or for a layer.
        CheckpointError: the adapter does not fit.

    Example:
        >>> config = adaptc.LoHaConfig(r=2, target_modules=["0"], init_weights=False)
        >>> adapted = adaptc.compile(model, config, example_inputs=x)
        >>> adaptc.convert_to_lora(adapted, rank=4).config.r
        4
    """
    truncation = parse_rank(rank)
    changes = deltas_of(
        adapter, model, example_inputs=example_inputs, config=config, key_mapping=key_mapping, component=component
    )
    sites = [(group[0], lambda f=fqn: changes.delta_of(f)) for fqn, group in changes.sites.items()]
    source = changes.binding.source
    made = make_lora(
        changes.config, changes.spec, sites, truncation, source or "the program's adapter", changes.saved_tensors
    )
    return Adapter(made.config, made.tensors, f"LoRA of {source}", made.report)


def deltas_of(
    adapter: Any,
    model: Any,
    *,
    example_inputs: Any,
    config: Any,
    key_mapping: Mapping[str, str] | None,
    component: str | None,
) -> AdapterDeltas:
    """Return the changes of an adapter, which is one of a program, or any other with ``model``.

    The arguments and errors are those of :func:`convert_to_lora`.
    """
    adapter = unwrap(adapter)
    if isinstance(adapter, ProgramCore) or graph_runner(adapter) is not None:
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
                "what an adapter changes is known with the model: give it, as the second argument, or give a program "
                "that has the adapter"
            )
        program = _compile_program(
            model, adapter, example_inputs, override=config, key_mapping=key_mapping, component=component
        )
        binding = program.binding
    changes = AdapterDeltas(program.spec(), binding)
    if not changes.sites:
        raise ConfigError(f"{binding.source} changes no weight by its method, so there is nothing to make LoRA of")
    return changes


@torch.no_grad()
def combine_deltas(
    adapters: Sequence[Any],
    weights: Sequence[float],
    options: CombineOptions,
    model: Any,
    example_inputs: Any,
    key_mapping: Mapping[str, str] | None,
    source: str,
) -> Adapter:
    """Return the LoRA of the changes that several adapters of any methods make to a model's weights, combined by a
    rule."""
    options = options.resolve("svd")
    if not options.is_dense:
        raise ConfigError(
            f"method={options.method!r} works on factors that adapters have in common, and with model= the changes of "
            "its weights are combined: use svd, ties_svd, dare_linear_svd, dare_ties_svd or magnitude_prune_svd"
        )
    program = _compile_program(model, list(adapters), example_inputs, key_mapping=key_mapping)
    spec = program.spec()
    deltas = [AdapterDeltas(spec, _bind_to_program(program, a, key_mapping)) for a in adapters]
    names = [[g[0].name or g[0].module for g in p.sites.values()] for p in deltas]
    config = deltas[0].config.with_missing_filled({})
    for name, value in union_target_fields([p.config for p in deltas], names).items():
        setattr(config, name, value)
    sites_by_weight: dict[str, Attachment] = {f: g[0] for p in deltas for f, g in p.sites.items()}
    ranks = [r for p in deltas for m in p.binding.methods.values() if (r := m.sizes.rank()) is not None]
    if options.svd_rank is None and not ranks:
        raise ConfigError(f"adapters of {deltas[0].config.peft_type} have no rank: say that of the result, svd_rank=")
    truncation = Truncation(
        options.svd_rank or max(ranks), None, options.svd_clamp, options.svd_full_matrices, options.svd_driver
    )

    def combine_delta(fqn: str) -> WeightDelta:
        has = [i for i, p in enumerate(deltas) if fqn in p.sites]
        own = [weights[i] for i in has]
        found = [deltas[i].delta_of(fqn) for i in has]
        bias = next((c.bias for c in found if c.bias is not None), None)
        if bias is not None:
            none = torch.zeros_like(bias)
            bias = combine_by_rule([none if c.bias is None else c.bias for c in found], own, options)
        return WeightDelta(combine_by_rule([c.matrix for c in found], own, options), bias)

    sites = [(a, lambda f=fqn: combine_delta(f)) for fqn, a in sites_by_weight.items()]
    base = {k: t.detach() for k, t in spec.weights.items()}
    others = average_saved(_DeltaSource.of_all(deltas), weights, [p.saved_tensors for p in deltas], base)
    made = make_lora(config, spec, sites, truncation, source, others)
    return Adapter(made.config, made.tensors, source, made.report)


class _DeltaSource:
    """An adapter with the attributes that messages and :func:`average_saved` need."""

    def __init__(self, changes: AdapterDeltas) -> None:
        self.config, self.tensors, self.source = changes.config, changes.saved_tensors, changes.binding.source

    @classmethod
    def of_all(cls, deltas: Sequence[AdapterDeltas]) -> list[_DeltaSource]:
        return [cls(p) for p in deltas]


def _compile_program(model: Any, adapter: Any, example_inputs: Any, **options: Any) -> AdaptedProgram:
    model = unwrap(model)
    base = unload_program(model) if isinstance(model, AdaptedProgram) else model
    return compile_model(AdaptedProgram, base, adapter, RunOptions(), example_inputs=example_inputs, **options)


def _bind_to_program(program: AdaptedProgram, adapter: Any, key_mapping: Mapping[str, str] | None) -> Binding:
    return bind_adapter(program, adapter, key_mapping=key_mapping)
