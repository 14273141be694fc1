"""Compile a model and configs into a program: capture, plan, first values, inject.

The program has a region at every site that any of the adapters asks for. It is bound to the first adapter, or to all of
them together where they came by name. After an error the model is as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from math import prod
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.export import ExportedProgram

from adaptc.adapter_files.adapter_data import PEFT_KEYS, AdapterData
from adaptc.adapter_files.load import has_tensors, load
from adaptc.binding.bind import bind, initial_values
from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.combine_bindings import adapters_by_name, spec_of_adapter, stack_bindings, with_settled_sizes
from adaptc.binding.common_to_sites import settle_shared_slots
from adaptc.binding.sources.composite_adapters import join_routed
from adaptc.binding.sources.configs import as_config, loaded_config, new_adapter
from adaptc.binding.sources.other_formats import for_component
from adaptc.binding.sources.resolve import resolve
from adaptc.capture.capture import CapturedProgram, capture
from adaptc.capture.repeated_layers.replicate_layers import replicate_layers
from adaptc.capture.where_made import check_can_train, match_inference_mode
from adaptc.errors import ConfigError, EntryHandler, refuse_entry, short_repr, warn_of_entry
from adaptc.methods import (
    AdapterConfig,
    AttentionConfig,
    ModelFacts,
    ProgramConfig,
    TargetedConfig,
    check_registered,
    check_sizes,
    is_builtin,
)
from adaptc.passes.adapt.choose_forms import FORMS
from adaptc.passes.adapt.embedding_max_norm import max_norms_of
from adaptc.passes.adapt.expose_subgraph_params import ExposeSubgraphParams, has_unexposed_params
from adaptc.passes.adapt.inject import Inject
from adaptc.passes.analysis.sites import layer_ops
from adaptc.passes.analysis.unread_weights import unread_weights
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import Op, op_of
from adaptc.passes.graph.pass_infra import PassManager
from adaptc.passes.graph.torch_caches import drop_dead_code, release_shape_env
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Method
from adaptc.passes.protocol.method_checks import check_promises
from adaptc.passes.protocol.program_checks import check_program_promises
from adaptc.passes.protocol.program_method import ProgramMethod
from adaptc.patterns import limit_pattern_time
from adaptc.progress import stage
from adaptc.runtime.calls.call_inputs import FULL_LIKE
from adaptc.runtime.options import RunOptions
from adaptc.runtime.weight_buffers import remember_tensors
from adaptc.state.adaptation import Adaptation, ModuleGenerate
from adaptc.state.core import ProgramCore
from adaptc.targets.attention_plan import plan_attention
from adaptc.targets.expert_targets import with_stacked_experts
from adaptc.targets.merge_plans import merge_plans
from adaptc.targets.plan_layers import Plan, plan_layers
from adaptc.targets.program_plan import plan_program
from adaptc.torch_typing import is_list_or_tuple, named_modules

P = TypeVar("P", bound=ProgramCore)

#: configs that say where a program is to be adapted
PlannedConfig = TargetedConfig | ProgramConfig | AttentionConfig


@dataclass(frozen=True)
class PlannedAdapter:
    """An adapter for the captured model: its name, and what it was resolved to.

    A new adapter that was given as a config has no tensors.
    """

    name: str
    data: AdapterData[PlannedConfig]

    @property
    def on_unmatched_entry(self) -> EntryHandler:
        """Return what is called for an entry of the config that binds to nothing: it warns where a file has the config,
        else it raises TargetError."""
        return refuse_entry if self.data.is_new else warn_of_entry


@dataclass(frozen=True)
class AdapterRequest:
    """An adapter before the model is known, as a config or loaded; ``config`` is the caller's, in place of a file's."""

    name: str
    data: AdapterData[Any]
    config: AdapterConfig | None = None

    def resolve_for(self, base: LiftedProgram, program: ExportedProgram) -> PlannedAdapter:
        find_ops = partial(layer_ops, program, base)
        data = resolve(self.data, base.state_dict, config=self.config, find_targets=True, find_ops=find_ops)
        return PlannedAdapter(self.name, data.with_config(_require_targets(data.config)))

    def known_config(self) -> PlannedConfig | None:
        """Return the config where it takes no model to know it. Raises ConfigError where it chooses no layers."""
        known = self.config or self.data.config
        return _require_targets(known) if isinstance(known, AdapterConfig) else None


@dataclass(frozen=True)
class CompilePlan:
    """A captured model, and the plan for it: the sites of all adapters, and what bindings must fill."""

    captured: CapturedProgram
    adapters: Sequence[PlannedAdapter]
    plans: Sequence[Plan]
    spec: BindingSpec
    #: whether the adapters came by name, so that each has attachments and values of its own
    are_named: bool


@limit_pattern_time()
@with_graph_lock
@match_inference_mode
def plan_adapters(
    model: Any,
    config: Any,
    options: RunOptions,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = "auto",
    adapter_name: str = "default",
    training: bool = False,
    form: str = "auto",
    autocast: bool = True,
    key_mapping: Mapping[str, str] | None = None,
    component: str | None = None,
    override: Any = None,
) -> CompilePlan:
    """Capture ``model`` and plan its sites: the first half of ``adaptc.compile``, which makes no values yet."""
    given: Any = form  # callers may give anything
    if not isinstance(given, str) or given not in FORMS:
        raise ConfigError(f"form={short_repr(form)} is not one of {', '.join(FORMS)}")
    by_name = adapters_by_name(config)
    if training:
        check_can_train(model)
    requests = _parse_requests(config, by_name, adapter_name, key_mapping, component, override)
    model = _replicate_layers(model, [c for a in requests if (c := a.known_config()) is not None])
    captured = capture(model, example_inputs, dynamic_shapes=dynamic_shapes, training=training)
    if has_unexposed_params(captured.program):
        captured = replace(captured, program=ExposeSubgraphParams(captured.module_types)(captured.program).output)
    facts = ModelFacts(
        captured.module_types,
        captured.model_type,
        captured.output_embedding,
        captured.input_embedding,
        _transposed_experts(model),
        captured.linear_modules,
        is_bare_program=not isinstance(model, nn.Module),
        config=None if captured.source is None else captured.source.config,
    )
    base = LiftedProgram(captured.program, edit=False)
    adapters = [_with_stacked_experts(a.resolve_for(base, captured.program), facts, base) for a in requests]
    plans = [_plan_adapter(a, captured, facts, base) for a in adapters]
    adapters = [
        _with_base_model_names(replace(a, data=a.data.with_config(p.config)), captured)
        for a, p in zip(adapters, plans, strict=True)
    ]
    attachments = merge_plans(plans, training, options.backend, form, separate=by_name is not None)
    spec = _make_binding_spec(base, attachments, autocast, _is_trainable(adapters[0], training), plans)
    for p in plans:
        ops = {**_ops_by_site(base, [a for a in p.attachments if a.id not in spec.ops]), **spec.ops}
        methods = settle_shared_slots({a.id: a.method for a in p.attachments}, ops, spec.weights)
        check_sizes(p.config, [(a, methods[a.id], ops[a.id]) for a in p.attachments])
    return CompilePlan(captured, adapters, plans, spec, by_name is not None)


@with_graph_lock
@match_inference_mode
def compile_model(
    program_class: type[P],
    model: Any,
    config: Any,
    options: RunOptions,
    *,
    generator: torch.Generator | None = None,
    generate: ModuleGenerate | None = None,
    **plan_options: Any,
) -> P:
    """Compile ``model`` as ``adaptc.compile`` does, into a program of ``program_class``.

    ``generate``: see :attr:`Adaptation.generate`. ``plan_options``: as for :func:`plan_adapters`.
    """
    planned = plan_adapters(model, config, options, **plan_options)
    return build_program(program_class, planned, options, generator, generate)


@with_graph_lock
def build_program(
    program_class: type[P],
    planned: CompilePlan,
    options: RunOptions,
    generator: torch.Generator | None = None,
    generate: ModuleGenerate | None = None,
) -> P:
    """Return the captured program with its adapters, whose values are made here: the second half of
    ``adaptc.compile``. The arguments are those of :func:`compile_model`."""
    spec, captured = planned.spec, planned.captured
    _check_methods(spec)
    name = "the program" if captured.base is None else captured.base.class_name
    with stage(f"making the adapter's values at {len(spec.attachments)} sites of {name}"):
        if not planned.are_named:
            binding = _initial_binding(spec, planned.plans[0], planned.adapters[0], generator)
        else:
            parts = {
                a.name: _initial_binding(spec_of_adapter(spec, a.name), None, a, generator) for a in planned.adapters
            }
            binding = stack_bindings(parts, spec.attachments)
    adaptation = Adaptation(
        spec.attachments,
        matches={k: v for one in planned.plans for k, v in one.matches.items()},
        left_out=planned.plans[0].left_out,
        fills={**captured.fills, **_default_inputs(spec)},
        forward_arg_names=captured.forward_parameters,
        training=captured.training,
        autocast=spec.autocast_adapter_dtype,
        unread=spec.unread,
        source=captured.source,
        generate=generate,
    )
    inject = Inject(spec.attachments, binding.values, adaptation.header(binding), captured.training)
    with stage(f"inserting adapters at {len(spec.attachments)} sites of {name}"):
        done = PassManager([inject])(captured.program)
    adaptation = replace(adaptation, attachments=done.data[0], trail=done.trail)
    remember_tensors([*captured.program.state_dict.values(), *done.output.state_dict.values()])
    drop_dead_code()
    release_shape_env(done.output.graph, just_captured=captured.base is not None)
    return program_class(done.output, adaptation, binding, options)


def _default_inputs(spec: BindingSpec) -> dict[str, tuple[str, str]]:
    """Return how inputs that adapters add are made where a caller leaves them out: name -> (how, from which input)."""
    extras = {
        n: e.fill for a in spec.attachments for n, e in a.method.extra_inputs.extras().items() if e.fill is not None
    }
    return {n: (f"{FULL_LIKE}{fill}", "input_ids") for n, fill in extras.items()}


def _check_methods(spec: BindingSpec) -> None:
    """Check that methods that are not adaptc's own keep their promises, before there is a program that relies on them.

    The promises about values are tried where the weight is smallest, since trying them takes longer for a larger
    weight.
    """
    methods_to_check: dict[type[Method], dict[tuple[Method, Op, bool], None]] = {}
    for a in spec.attachments:
        check_registered(a.method)
        method, op = a.method.evaluated().unwrap(spec.ops[a.id])
        if not is_builtin(method):
            if isinstance(method, ProgramMethod):
                check_program_promises(method, op)
                continue
            half = spec.weights[a.fqn].dtype.itemsize < 4
            methods_to_check.setdefault(cast(type[Method], type(method)), {})[(method, op, half)] = None
    for sites in methods_to_check.values():
        smallest = min(sites, key=lambda site: prod(site[1].shape))
        for site in sites:
            check_promises(*site, with_values=site == smallest)


def _parse_requests(
    config: Any,
    by_name: Mapping[str, Any] | None,
    name: str,
    key_mapping: Mapping[str, str] | None,
    component: str | None,
    override: Any,
) -> list[AdapterRequest]:
    given: list[tuple[str, Any]]
    if by_name is not None:
        given = list(by_name.items())
    else:
        given = [(name, c) for c in (config if is_list_or_tuple(config) else [config])]
    if not given:
        raise ConfigError("config is an empty list: give a config, an adapter directory, or a list of them")
    read = [_read_adapter(c, key_mapping) for _, c in given]
    if key_mapping and all(data.is_new for data in read):
        raise ConfigError(
            "key_mapping renames the keys of adapter directories, and config names none: leave it out, or give it to "
            "swap or bind with the adapter"
        )
    if override is not None and (len(read) > 1 or read[0].is_new):
        raise ConfigError(
            "config= says what the config of one adapter's tensors is, and goes with one directory, file or state "
            "dict; give configs themselves in the first place"
        )
    known = None if override is None else as_config(override)
    chosen = for_component(read, component)
    return [AdapterRequest(n, data, known) for (n, _), data in zip(given, chosen, strict=True)]


def _read_adapter(source: Any, key_mapping: Mapping[str, str] | None) -> AdapterData[Any]:
    """Return the adapter that ``source`` holds, or a new one where it is a config.

    Its config is an object where it takes no model to know it.
    """
    if not has_tensors(source):
        return new_adapter(as_config(source))
    data = load(source, key_mapping=key_mapping)
    if data.format != PEFT_KEYS:
        return data
    joined = join_routed(data)
    return joined.with_config(loaded_config(joined.config))


def _require_targets(config: AdapterConfig) -> PlannedConfig:
    if not isinstance(config, PlannedConfig):
        raise ConfigError(f"{type(config).__name__} does not choose layers, so it cannot be compiled into a program")
    return config


def _with_stacked_experts(adapter: PlannedAdapter, facts: ModelFacts, base: LiftedProgram) -> PlannedAdapter:
    """Return a new adapter with a config that names the parameters where it means experts; others as they are."""
    if not adapter.data.is_new:
        return adapter
    read = [fqn for fqn, node in base.placeholders.items() if node.users]
    config = with_stacked_experts(adapter.data.config, facts, read)
    return replace(adapter, data=adapter.data.with_config(config))


def _with_base_model_names(adapter: PlannedAdapter, captured: CapturedProgram) -> PlannedAdapter:
    """Return a new adapter with a config that names the model it is for, as PEFT's configs do.

    An adapter from a file is returned as it is: it says what its file says.
    """
    config = adapter.data.config
    if not adapter.data.is_new or captured.base is None:
        return adapter
    base = captured.base
    values: dict[str, Any] = {"base_model_name_or_path": base.name_or_path}
    if config.task_type is None:
        values["auto_mapping"] = {"base_model_class": base.class_name, "parent_library": base.module_name}
    return replace(adapter, data=adapter.data.with_config(config.with_missing_filled(values)))


def _plan_adapter(adapter: PlannedAdapter, captured: CapturedProgram, facts: ModelFacts, base: LiftedProgram) -> Plan:
    config, rest = adapter.data.config, (captured.program, facts, adapter.name, base, adapter.on_unmatched_entry)
    if isinstance(config, AttentionConfig):
        return plan_attention(config, *rest[:-1])
    return plan_program(config, *rest) if isinstance(config, ProgramConfig) else plan_layers(config, *rest)


def _replicate_layers(model: Any, configs: Sequence[PlannedConfig]) -> Any:
    wanted = {str(c.layer_replication) for c in configs}
    ranges = configs[0].layer_replication if configs else None
    if wanted <= {"None"}:
        return model
    if len(wanted) > 1 or ranges is None:
        raise ConfigError(
            f"layer_replication differs between the adapters: {short_repr(sorted(wanted))}; they need programs of "
            "their own"
        )
    if not isinstance(model, nn.Module):
        raise ConfigError(
            "layer_replication restacks the model's layers, so it needs the nn.Module, not a program of it"
        )
    return replicate_layers(model, ranges)


def _transposed_experts(model: Any) -> frozenset[str]:
    """Return the modules that store stacked experts as (experts, in, out), by transformers' own flag."""
    if not isinstance(model, nn.Module):
        return frozenset()
    return frozenset(n for n, m in named_modules(model) if getattr(m, "is_transposed", False))


def _is_trainable(adapter: PlannedAdapter, training: bool) -> bool:
    """Return whether the adapter's tensors are to be trained.

    Files always say inference_mode, so for an adapter from a file the program's purpose decides.
    """
    return not adapter.data.config.inference_mode if adapter.data.is_new else training


def _make_binding_spec(
    base: LiftedProgram, attachments: Sequence[Attachment], autocast: bool, trainable: bool, plans: Sequence[Plan]
) -> BindingSpec:
    ops = _ops_by_site(base, attachments)
    unread = {key: fqn for p in plans for key, fqn in p.unread_tensors.items()}
    bounds = max_norms_of(base.graph, base.signature())
    return with_settled_sizes(
        BindingSpec(
            attachments,
            ops,
            base.state_dict,
            autocast,
            trainable,
            unread,
            max_norms=bounds,
            find_idle=cache(partial(unread_weights, base.graph, base.signature(), base.state_dict)),
        )
    )


def _ops_by_site(base: LiftedProgram, attachments: Sequence[Attachment]) -> dict[str, Op]:
    return {a.id: op_of(a.kind, base.tensor(a.fqn), base.nodes[a.consumers[0]]) for a in attachments}


def _initial_binding(
    spec: BindingSpec, plan: Plan | None, adapter: PlannedAdapter, generator: torch.Generator | None
) -> Binding:
    """Return the binding that an adapter starts with. ``plan``: its plan, None where ``spec`` has its sites alone."""
    if adapter.data.tensors:
        return bind(spec, adapter.data)
    config = adapter.data.config
    if plan is None:
        return initial_values(spec, config, generator)
    own = settle_shared_slots({a.id: a.method for a in plan.attachments}, spec.ops, spec.weights)
    return initial_values(spec, config, generator, methods_by_id=own)
