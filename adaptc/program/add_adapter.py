"""Add one more adapter by name to a program.

Where a deleted adapter of that name left sites that the new one fits, the program itself gets it, as by a swap. Else,
with ``recompile``, the result is another program with sites for all adapters, on the same base tensors; the old one
stays as it was. Without ``recompile`` nothing is compiled, and SwapError is raised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from adaptc.adapter_files.adapter_data import AdapterData, LoadedAdapter
from adaptc.binding.bind import bind, file_tensors, initial_values
from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.binding_scale import binding_of_parts, turn_off
from adaptc.binding.combine_bindings import adapters_by_name, spec_of_adapter
from adaptc.binding.common_to_sites import settle_shared_slots
from adaptc.binding.sources.configs import as_config
from adaptc.errors import ConfigError, SwapError, listing, short_repr
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.train.set_mode import SetMode
from adaptc.program.compile_program import CompilePlan, compile_model, plan_adapters
from adaptc.state.core import ProgramCore
from adaptc.state.merge_program import unload_program
from adaptc.tables import shorten_paths

P = TypeVar("P", bound=ProgramCore)


def with_added_adapter(program: P, name: str, adapter: Any, recompile: bool) -> P:
    """Return ``program`` with one more adapter, called ``name``; see ``AdaptedProgram.add_adapter``."""
    adapters_by_name({name: None})  # raises ConfigError for a name that is not allowed
    snapshot = program.snapshot()
    if name in (adapters := snapshot.binding.adapters_by_name):
        how = f"{{{name!r}: adapter}}" if snapshot.binding.joint_adapters else "adapter"
        raise ConfigError(
            f"the program has an adapter called {name!r} already, of {listing(map(repr, adapters))}: "
            f"adaptc.swap(program, {how}) exchanges it"
        )
    base: Any = unload_program(snapshot)
    if snapshot.adaptation.training:
        base = SetMode(training=True)(base).output
    options: dict[str, Any] = {"training": snapshot.adaptation.training, "autocast": snapshot.adaptation.autocast}
    plan = plan_adapters(base, {name: adapter}, snapshot.options, **options)
    left = {_weight_and_method(a): a for a in snapshot.adaptation.attachments if a.adapter == name}
    missing = [a for a in plan.spec.attachments if not _can_run(left.get(_weight_and_method(a)), a)]
    if not missing:
        _bind_at_deleted_sites(program, name, plan)
        return program
    if not recompile:
        sites = shorten_paths(dict.fromkeys(a.fqn.removesuffix(".weight") for a in missing))
        kinds = ", ".join(dict.fromkeys(a.method.name for a in missing))
        raise SwapError(
            f"the program has no sites of {kinds} for an adapter called {name!r}, which needs them at {sites}: it was "
            f"compiled for {listing(map(repr, adapters))}. program.add_adapter({short_repr(name)}, ..., "
            "recompile=True) gives another program that has them, on the same base; adaptc.swap exchanges an adapter "
            "for another at its sites"
        )
    old = {n: part.active_form or part for n, part in adapters.items()}
    files = {n: to_adapter_data(snapshot, n, part) for n, part in old.items()}
    made = compile_model(type(program), base, {**files, name: adapter}, snapshot.options, **options)
    adaptation = replace(
        made.adaptation,
        source=snapshot.adaptation.source,
        generate=snapshot.adaptation.generate,
        fills=snapshot.adaptation.fills,
        forward_arg_names=snapshot.adaptation.forward_arg_names,
    )
    binding = _carry_over_adapters(snapshot, made, adapters)
    return type(program)(made, adaptation, binding, made.options, made.originals)


class FirstValues:
    """A maker of the binding that a new adapter begins with at the sites of ``program``, from its config."""

    def __init__(self, program: ProgramCore) -> None:
        self._program = program.snapshot()
        self._base: Any = None

    def __call__(self, config: Any, generator: torch.Generator | None = None) -> Binding:
        """Return the binding of a new adapter of ``config``; sites that it does not choose have identity values.

        Raises SwapError for sites that the program does not have. Raises ConfigError and TargetError as
        ``adaptc.compile`` does.
        """
        program, training = self._program, self._program.adaptation.training
        if self._base is None:
            base: Any = unload_program(program)
            self._base = SetMode(training=True)(base).output if training else base
        options: dict[str, Any] = {"training": training, "autocast": program.adaptation.autocast}
        plan = plan_adapters(self._base, as_config(config), program.options, **options)
        own = {_weight_and_method(a): a for a in program.adaptation.attachments}
        if missing := [a for a in plan.spec.attachments if not _can_run(own.get(_weight_and_method(a)), a)]:
            sites = shorten_paths(dict.fromkeys(a.fqn.removesuffix(".weight") for a in missing))
            there = ", ".join(dict.fromkeys(a.method.name for a in program.adaptation.attachments))
            raise SwapError(
                f"the config wants {missing[0].method.name} at {sites}, and the program has {there} at "
                f"{len(own)} sites without these: compile it for the union of all layers, of one method"
            )
        spec = program.spec(training)
        methods = _planned_methods(spec, plan.spec)
        return initial_values(spec, plan.adapters[0].data.config, generator, methods_by_id=methods)


def to_adapter_data(program: ProgramCore, name: str, adapter: Binding) -> LoadedAdapter:
    """Return what a file of the program's adapter ``name`` would hold."""
    spec = program.spec()
    own = spec_of_adapter(spec, name) if program.binding.joint_adapters else spec
    tensors = file_tensors(own, adapter)
    return AdapterData(adapter.config.to_dict(), tensors, adapter.source or name, origin=adapter.origin)


def _weight_and_method(a: Attachment) -> tuple[str, str]:
    return a.fqn, a.method.name


def _can_run(site: Attachment | None, wanted: Attachment) -> bool:
    """Return whether the code of the attachment ``site`` can run the method of ``wanted``; False where ``site`` is
    None."""
    return site is not None and site.method.structure() == wanted.method.structure()


def _bind_at_deleted_sites(program: ProgramCore, name: str, plan: CompilePlan) -> None:
    """Bind the planned adapter at the sites that a deleted adapter of its name left, and make that binding current."""
    adapter = plan.adapters[0]
    while True:
        current, spec = program.binding, program.spec(program.adaptation.training)
        own = spec_of_adapter(spec, name)
        if adapter.data.tensors:
            new = bind(own, adapter.data)
        else:
            new = initial_values(own, adapter.data.config, methods_by_id=_planned_methods(own, plan.spec))
        order = dict.fromkeys(a.adapter for a in spec.attachments)
        parts = {**current.joint_adapters, name: new}
        made = program.binding_plans.remember_fitting(
            binding_of_parts(spec, {n: parts[n] for n in order if n in parts})
        )
        if program.compare_and_swap(current, made):
            return


def _planned_methods(part_spec: BindingSpec, planned: BindingSpec) -> dict[str, Any]:
    theirs = {_weight_and_method(a): a.method for a in planned.attachments}
    found = {a.id: theirs[_weight_and_method(a)] for a in part_spec.attachments if _weight_and_method(a) in theirs}
    return settle_shared_slots(found, part_spec.ops, part_spec.weights)


def _carry_over_adapters(old: ProgramCore, new: Any, parts: Mapping[str, Binding]) -> Binding:
    """Return the new program's binding, in which the old adapters keep their tensors, factors, and whether they are
    on."""
    spec, binding = new.spec(), new.binding
    bindings = dict(binding.joint_adapters)
    for name, part in parts.items():
        ids = _map_site_ids(old.adaptation.attachments, spec.attachments, name)
        on, fresh = part.active_form or part, bindings[name]
        own = replace(
            on,
            values={fqn: on.values.get(fqn, t) for fqn, t in fresh.values.items()},
            methods={ids[i]: m for i, m in on.methods.items() if i in ids},
            scale_factors={ids[i]: f for i, f in on.scale_factors.items() if i in ids},
        )
        bindings[name] = own if part.active_form is None else turn_off(spec_of_adapter(spec, name), own)
    return binding_of_parts(spec, bindings)


def _map_site_ids(old: Sequence[Attachment], new: Sequence[Attachment], name: str) -> dict[str, str]:
    """Return id in the old program -> id in the new one, for each attachment of the adapter ``name``.

    Where the old program has a single adapter, its attachments may have another name.
    """
    there = {_weight_and_method(a): a.id for a in new if a.adapter == name}
    return {
        a.id: there[_weight_and_method(a)]
        for a in old
        if _weight_and_method(a) in there and (a.adapter == name or _has_one_adapter(old))
    }


def _has_one_adapter(attachments: Sequence[Attachment]) -> bool:
    return len({a.adapter for a in attachments}) == 1
