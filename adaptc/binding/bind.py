"""Make a binding from an adapter's tensors, and tensors for files from a binding.

The tensors are named as in PEFT's files. Without a file, a binding has first values or identity values. A
:class:`Binding` always has a value for every slot of the spec.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter_files.directory import check_finite
from adaptc.binding.binding import Binding, BindingSpec, ResolvedAdapter
from adaptc.binding.binding_plan_cache import BindingPlanCache, structure_key
from adaptc.binding.builder import EMBEDDING_NAMES, BindingBuilder, resize_shared_axes
from adaptc.binding.check_tensors import check_method, check_number_kinds, check_rank, check_shapes, unbound_keys_error
from adaptc.binding.common_to_sites import settle_shared_slots, sites_of_config, with_weights
from adaptc.binding.file_keys import primary_key, slot_file_keys
from adaptc.errors import AdaptcWarning, CheckpointError, ConfigError, SwapError, TargetError, errors_name
from adaptc.methods import AdapterConfig, check_sizes
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Method, Slot, Slots
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor

#: the source of a binding with the values that an adapter begins with
FIRST_VALUES = "first values"


def initial_values(
    spec: BindingSpec,
    config: AdapterConfig,
    generator: torch.Generator | None = None,
    methods_by_id: Mapping[str, Method] | None = None,
) -> Binding:
    """Return a binding with each method's own initial values.

    With ``methods_by_id``, just these attachments have initial values, of the methods that it gives by attachment id.
    All other attachments then have identity values.
    """
    builder = BindingBuilder(spec, config)
    present = [a for a in spec.attachments if methods_by_id is None or a.id in methods_by_id]
    methods = {a.id: a.method if methods_by_id is None else methods_by_id[a.id] for a in present}
    builder.find_shared_slots(methods)
    makers = with_weights(methods, spec)
    for a in present:
        method = methods[a.id]
        if method.base_scheme() is not None and isinstance(spec.weights[a.fqn], QuantizedTensor):
            raise ConfigError(
                f"{a.fqn!r} is quantised already, and the first values of LoftQ are made of the float weight: compile "
                "the float model with init_lora_weights='loftq', and then adaptc.quantize(program, 'nf4'). For the "
                "weights as they are, adaptc.subtract_adapter(float_model, quantised_model, rank=r) makes the adapter"
            )
        maker = makers[a.id].in_mode_of(a.method).with_layer_bias(spec.layer_bias(a))
        with errors_name(a.key):
            init = maker.init(spec.ops[a.id], spec.canonical_weight(a), spec.adapter_dtype(a), generator)
        op, slots = spec.ops[a.id], init.slots
        if any(n not in slots for n in a.method.slots(op)):  # slots that this adapter's options do not have
            slots = {**a.method.identity(op, spec.canonical_weight(a), spec.adapter_dtype(a)), **slots}
        builder.add_site(a, method, slots, init.base)
    builder.fill_absent_sites(methods)
    builder.extra_tensors = {key: spec.weights[fqn].detach() for key, fqn in spec.unread.items()}
    return builder.build(FIRST_VALUES)


def bind(
    spec: BindingSpec,
    data: ResolvedAdapter,
    *,
    plans: BindingPlanCache | None = None,
    copy_tensors: bool = True,
    known_base: Mapping[str, Tensor] | None = None,
) -> Binding:
    """Bind the tensors of an adapter to the slots.

    Ranks that the config does not know are read off the tensors (``data.infer_ranks``). Else the config gives the
    ranks, and a shape that disagrees is an error. Sites for which the adapter has no tensor take identity values.
    ``plans`` are those of the program with this ``spec``. With ``copy_tensors``, no value shares the memory of a
    caller's tensors. ``known_base``: FQN -> the base weight that the adapter's first values changed by data; None where
    that is not known.

    Raises CheckpointError for missing keys, wrong shapes and dtypes of another kind. It does so too for values that are
    not finite, in the tensors or in the dtype of their slot. Raises SwapError for keys of sites that the program does
    not have.
    """
    copy, tensors, source = copy_tensors and data.is_shared, data.tensors, data.source
    structure = None if plans is None else structure_key(spec, data)
    plan = None if plans is None else plans.find_plan(structure)
    if plan is not None and (made := plan(data, copy=copy)) is not None:
        return made
    check_finite(tensors, source)
    config = _complete_from_model(data.config, spec, source)
    builder = BindingBuilder(spec, config, tensors.values() if copy else ())
    builder.is_from_file = True
    unused_keys = dict.fromkeys(tensors)
    matched_sites = _match_sites(spec, config, tensors, unused_keys, infer_ranks=data.infer_ranks, source=source)
    methods = {a.id: method for a, method, _ in matched_sites}
    for a, _, site_tensors in matched_sites:
        check_method(a, config, site_tensors, source)
    if data.infer_ranks:
        for a, method, site_tensors in matched_sites:
            check_rank(a, method, site_tensors, source)
        builder.config = _with_found_ranks(config, spec, [(a, method) for a, method, _ in matched_sites])
    builder.find_shared_slots(methods)
    makers = with_weights(methods, spec)
    for a, method, site_tensors in matched_sites:
        slots, base = _read_slots(spec, a, makers[a.id], site_tensors, source), None
        keeps_base = method.base_scheme() is not None and isinstance(spec.weights[a.fqn], QuantizedTensor)
        if method.changes_base_at_init() and not keeps_base:
            base = method.init(spec.ops[a.id], spec.canonical_weight(a), spec.adapter_dtype(a)).base
            if base is None:
                if known_base is None:
                    raise CheckpointError(_changed_by_data(source, a))
                changed = known_base.get(a.fqn)
                base = None if changed is None else spec.ops[a.id].canonical(changed.detach())
        builder.add_site(a, method, slots, base)
    builder.fill_absent_sites(methods)
    for key in list(unused_keys):
        twin = primary_key(spec, key)
        if twin is not None and twin in tensors and not _equal_values(tensors[key], tensors[twin]):
            raise CheckpointError(f"{source}: {key!r} and {twin!r} are one tensor in the model, and differ in the file")
        if twin in tensors or builder.take_without_slot(key, tensors[key], source):
            del unused_keys[key]
    if unused_keys:
        raise unbound_keys_error(spec, config, list(unused_keys), source, tensors)
    if not methods:
        raise SwapError(
            f"{source} holds no tensor for any site of the program, so it would do nothing; unload() gives the base"
        )
    _warn_of_idle(builder.idle_tensors, source)
    binding = replace(builder.build(source), origin=data.origin)
    if plans is not None:
        plans.learn_plan(structure, spec, binding, data)
    return binding


def _changed_by_data(source: str, a: Attachment) -> str:
    return (
        f"{source}: by its config its first values changed the base weight {a.fqn!r}, by data that no file of an "
        "adapter holds. Where it was trained, adaptc.convert_to_lora(program, rank=2 * r) makes an adapter for the "
        "base as it was. If this program has the changed base already, or there was no data, give the config with "
        "init_lora_weights=True"
    )


def _warn_of_idle(idle: Mapping[str, Tensor], source: str) -> None:
    if idle:
        warnings.warn(
            f"{source}: {len(idle)} of its tensors are of layers that the program never calls, such as "
            f"{next(iter(idle))!r}: they have no effect here, and adaptc.save_adapter writes them with the others",
            AdaptcWarning,
            stacklevel=2,
        )


def _equal_values(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of a file have equal values, whatever their floating dtypes.

    They are compared as float64, since torch has no common dtype of float8 and another.
    """
    if one.dtype != other.dtype:
        one, other = (t.double() if t.is_floating_point() else t for t in (one, other))
    return one.dtype == other.dtype and torch.equal(one, other)


def _complete_from_model(config: AdapterConfig, spec: BindingSpec, source: str) -> AdapterConfig:
    """Return ``config`` with the options that it leaves to the model, such as ``token_dim``, taken from the sites.

    Raises CheckpointError where the config states another ``token_dim`` than the program has.
    """
    for a in spec.attachments:
        values, make = a.method.config_from_model(spec.ops[a.id]), getattr(config, "method", None)
        if not values or make is None or type(make(a.name or a.module, a.kind)) is not type(a.method):
            continue
        width = values.get("token_dim")
        if getattr(config, "token_dim", None) not in (None, width):
            raise CheckpointError(
                f"{source}: its config says token_dim={config.token_dim}, and the program has {width}. The adapter was "  # type: ignore[attr-defined]
                "made for another model, or its config does not belong to its weights."
            )
        config = config.with_missing_filled(values)
    return config


def _with_found_ranks(
    config: AdapterConfig, spec: BindingSpec, methods: Sequence[tuple[Attachment, Method]]
) -> AdapterConfig:
    """Return ``config`` with the ranks that the tensors have, so that a file written with it can be read.

    Returns ``config`` unchanged where its options cannot express these ranks.
    """
    if _gives_ranks(config, spec, methods):
        return config
    ranks = {a.name or a.module: rank for a, method in methods if (rank := method.sizes.rank()) is not None}
    new = config.with_ranks(ranks)
    return new if _gives_ranks(new, spec, methods) else config


def _gives_ranks(config: AdapterConfig, spec: BindingSpec, methods: Sequence[tuple[Attachment, Method]]) -> bool:
    """Return whether ``config`` gives each attachment the rank of its method."""
    rebound = [(a.method.rebind(config, a).sizes.specialized_for(spec.ops[a.id]), method) for a, method in methods]
    return all(one.sizes.rank() == method.sizes.rank() for one, method in rebound)


_MatchedSite = tuple[Attachment, Method, dict[str, Tensor]]


def _match_sites(
    spec: BindingSpec,
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    unused_keys: dict[str, None],
    *,
    infer_ranks: bool,
    source: str,
) -> list[_MatchedSite]:
    """Return the attachments that the adapter has, each with the adapter's own method and tensors.

    Keys of these tensors are removed from ``unused_keys``. An attachment whose code does not suit the adapter's options
    is left out.
    """
    matched: list[_MatchedSite] = []
    shared_keys: set[str] = set()
    chosen: Collection[str] | None = None
    for a in spec.attachments:
        op = spec.ops[a.id]
        method = a.method.rebind(config, a).sizes.specialized_for(op)
        if method.structure() != a.method.structure():
            continue
        specs = {**a.method.slots(op), **_slots_or_empty(method, op)}
        keys = {n: a.file_key(n, s) for n, s in specs.items() if s.saved}
        keys |= {n: a.file_key(n, specs.get(n, Slot(()))) for n in method.files.keys(op)}
        slot_tensors = {n: tensors[k] for n, k in keys.items() if k in tensors}
        common = {n for n, s in specs.items() if s.shared or s.key}
        if keys and not slot_tensors.keys() - common:
            if not slot_tensors or any(s.saved and not (s.shared or s.key) for s in specs.values()):
                continue
            # Files of this method hold nothing of a site, so the config says which sites there are.
            chosen = sites_of_config(spec, config, source) if chosen is None else chosen
            if a.id not in chosen:
                continue
        shared_keys |= {keys[n] for n in slot_tensors.keys() & common if not specs[n].key}
        for name in slot_tensors.keys() - common:
            unused_keys.pop(keys[name], None)
        matched.append((a, method.sizes.with_sizes_of(op, slot_tensors) if infer_ranks else method, slot_tensors))
    for key in shared_keys:
        unused_keys.pop(key, None)
    methods = settle_shared_slots({a.id: method for a, method, _ in matched}, spec.ops, spec.weights)
    for a, _, slot_tensors in matched:
        for name, slot in methods[a.id].slots(spec.ops[a.id]).items():
            if slot.key:
                slot_tensors.pop(name, None)
                if slot.key in tensors:
                    slot_tensors[name] = tensors[slot.key]
                    unused_keys.pop(slot.key, None)
    _check_tied_sites(spec, {a.id for a, _, _ in matched})
    check_sizes(config, [(a, methods[a.id], spec.ops[a.id]) for a, _, _ in matched])
    return [(a, methods[a.id], found) for a, _, found in matched]


def _check_tied_sites(spec: BindingSpec, present_ids: Collection[str]) -> None:
    """Raise SwapError for an adapter that has only some of the sites whose slots are one tensor (tied layers)."""
    first: dict[str, Attachment] = {}
    for a in spec.attachments:
        for name, slot in a.method.slots(spec.ops[a.id]).items():
            other = first.setdefault(a.slots.get(name) or a.slot_fqn(name, slot), a)
            if not slot.shared and (other.id in present_ids) != (a.id in present_ids):
                raise SwapError(
                    f"the program adapts {other.fqn!r} and {a.fqn!r} as one (ensure_weight_tying), and the adapter has "
                    "tensors for one of them alone; compile a program for this adapter"
                )


def _slots_or_empty(method: Method, op: Op) -> Mapping[str, Slot]:
    """Return the slots of a method at a site, or none where its options have no meaning there."""
    try:
        return method.slots(op)
    except (TargetError, ConfigError):
        return {}


def _read_slots(spec: BindingSpec, a: Attachment, method: Method, site_tensors: Slots, source: str) -> Slots:
    """Return the value of each slot of ``a``, made of the tensors that a file has for it.

    Slots without a tensor follow from the config. Where the adapter's own method lacks a slot, it gets its identity
    value. Raises CheckpointError and SwapError for tensors that do not fit.
    """
    op, dtype = spec.ops[a.id], spec.adapter_dtype(a)
    check_number_kinds(a, op, method, site_tensors, dtype, source, is_read=False)
    try:
        slots = method.files.read(op, site_tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    check_shapes(a, op, method, slots, source)
    check_number_kinds(a, op, method, slots, dtype, source, is_read=True)
    if spec.trainable and (why := method.untrainable(slots)):
        raise CheckpointError(f"{source} cannot be trained on: {why}")
    missing = [n for n in a.method.slots(op) if n not in slots]
    if not missing:
        return slots
    derived = method.with_layer_bias(spec.layer_bias(a)).files.derived(op, spec.canonical_weight(a), dtype, slots)
    if not method.slots(op).keys() >= set(missing):
        derived = {**a.method.identity(op, spec.canonical_weight(a), dtype), **derived}
    return {**{n: derived[n] for n in missing}, **slots}


def file_tensors(spec: BindingSpec, binding: Binding) -> dict[str, Tensor]:
    """Return a binding's tensors by the bare keys of PEFT's files, for the sites that the adapter has."""
    tensors: dict[str, Tensor] = {}
    for a in spec.attachments:
        method: Any = binding.methods.get(a.id)
        if method is None:
            continue
        op = spec.ops[a.id]
        slots = method.slots(op)
        values: dict[str, Tensor] = {}
        for name, slot in slots.items():
            value = binding.values[a.slots.get(name) or a.slot_fqn(name, slot)].detach()
            values[name] = resize_shared_axes(value, slot)
        written = method.files.write(op, {n: t for n, t in values.items() if slots[n].saved})
        tensors |= {key: t for n, t in written.items() for key in slot_file_keys(a, n, slots.get(n, Slot(())))}
    others = {k: tensors.get(primary_key(spec, k) or "", t) for k, t in binding.extra_tensors.items()}
    return {**tensors, **others, **binding.idle_tensors}


def embedding_weights(spec: BindingSpec, binding: Binding) -> dict[str, Tensor]:
    """Return the base weights of embeddings and output heads under PEFT's keys.

    The key of an adapted one has ``base_layer`` in it, as inside of PEFT's wrapper.
    """
    wrapped = {a.module for a in spec.attachments if a.id in binding.methods and not a.method.replaces}
    out: dict[str, Tensor] = {}
    for fqn, base in spec.weights.items():
        module, _, param = fqn.rpartition(".")
        if module.rpartition(".")[2] in EMBEDDING_NAMES and param == "weight":
            key = f"{module}.base_layer.weight" if module in wrapped else fqn
            out[key] = binding.changed_base.get(fqn, base).detach()
    return out
