"""Report the status of a program's adapters, layer by layer and as a whole, under the names that PEFT has for it.

The dataclasses show the state of the moment. A value that differs between layers is "irregular". ``merged_adapters`` is
always empty: a merged program is another one, without adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import Tensor

from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError
from adaptc.passes.analysis.program_facts import all_module_types
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.protocol.attachment import Attachment
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.wrapper import needs_graph
from adaptc.reports.coverage import count_base_parameters
from adaptc.state.overrides import override_of
from adaptc.tables import Column, Report, Table, collapse_paths, with_count

Irregular = Literal["irregular"]


@dataclass(frozen=True)
class LayerStatus:
    """The status of one adapted module.

    ``name``: its path in the model. ``module_type``: method and class, such as ``lora.Linear``. ``active_adapters``:
    the adapters of the program that act. ``available_adapters``: the adapters that have this layer. ``enabled``: False
    inside of ``program.disabled()``. ``requires_grad`` and ``devices``: by adapter, for the adapters of this layer.
    ``scales``: the factor of each adapter on the scale it was made with, which PEFT does not tell.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None
    scales: dict[str, float | Irregular] = field(default_factory=dict)


class LayerStatuses(list[LayerStatus], Report):
    """A list of :class:`LayerStatus` that prints as a table; layers that differ in their number alone share a row."""

    ROWS = ("layers",)

    def __repr__(self) -> str:
        return self.render()

    def values(self) -> dict[str, Any]:
        """Return ``layers``, one dict of the fields of each :class:`LayerStatus`."""
        return {"layers": [vars(s) for s in self]}

    def sections(self) -> list[str | Table]:
        groups: dict[tuple[str, ...], list[str]] = {}
        for s in self:
            cells = (
                s.module_type,
                _join_names(s.available_adapters),
                _join_names(s.active_adapters),
                _join_by_name(s.requires_grad),
            )
            groups.setdefault((*cells, _join_by_name(s.devices), _join_by_name(s.scales)), []).append(s.name)
        rows = [(with_count(text, n), *how) for how, members in groups.items() for text, n in collapse_paths(members)]
        suffix = "" if all(s.enabled for s in self) else "(disabled in this block)"
        columns = ["layer", Column("type", no_wrap=True), "adapters", "active", "requires grad", "devices", "scales"]
        return [Table(columns, rows), suffix]


@dataclass(frozen=True, repr=False)
class ModelStatus(Report):
    """The status of a whole program.

    ``base_model_type``: the class of a transformers model, "other" where it is not known. ``trainable_params`` and
    ``total_params``: counted as in PEFT; those of adapters that are off are in the total alone. The other fields are
    what the layers agree in.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None
    scales: dict[str, float | Irregular] = field(default_factory=dict)

    def __repr__(self) -> str:
        return self.render()

    def values(self) -> dict[str, Any]:
        """Return the fields, by their names."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def sections(self) -> list[Table]:
        rows = [(f.name, _format_value(getattr(self, f.name))) for f in fields(self)]
        return [Table([Column("status", no_wrap=True), "value"], rows)]


@needs_graph
@with_graph_lock
def get_layer_status(program: AdaptedProgram) -> LayerStatuses:
    """Return the status of each adapted module, with the fields of ``peft.get_layer_status``; it prints as a table.

    Names are those of the model's modules, without what PEFT's wrapper puts in front of them.

    Args:
        program: a program or a generator.

    Returns:
        a list of the statuses.

    Raises:
        AdaptcError: the program has no adapter.

    Example:
        >>> [status.name for status in adaptc.debug.get_layer_status(prog)]
        ['0']
    """
    enabled, snapshot = not override_of(program).is_disabled, program.snapshot()
    binding, module_types = _require_binding(snapshot), all_module_types(snapshot)
    layers: dict[str, list[Attachment]] = {}
    for a in snapshot.adaptation.attachments:
        part = binding.adapters_by_name.get(a.adapter)
        if part is not None and a.id in (part.active_form or part).methods:
            layers.setdefault(a.module, []).append(a)
    active = [n for n, part in binding.adapters_by_name.items() if part.active_form is None]
    statuses = LayerStatuses()
    for name, attachments in layers.items():
        by_name: dict[str, list[Attachment]] = {}
        for a in attachments:
            by_name.setdefault(a.adapter, []).append(a)
        kind = module_types.get(name, "").rpartition(".")[2] or attachments[0].kind
        statuses.append(
            LayerStatus(
                name=name,
                module_type=f"{binding.adapters_by_name[attachments[0].adapter].config.peft_type.lower()}.{kind}",
                enabled=enabled,
                active_adapters=list(active),
                merged_adapters=[],
                requires_grad={n: _requires_grad(snapshot, binding, n, group) for n, group in by_name.items()},
                available_adapters=sorted(by_name),
                devices={n: _devices(binding, n, group) for n, group in by_name.items()},
                scales={n: _scale(binding, n, group) for n, group in by_name.items()},
            )
        )
    return statuses


@needs_graph
@with_graph_lock
def get_model_status(program: AdaptedProgram) -> ModelStatus:
    """Return the status of a program's adapters, with the fields of ``peft.get_model_status``; it prints as a table.

    Args:
        program: a program or a generator.

    Returns:
        the status.

    Raises:
        AdaptcError: the program has no adapter.

    Example:
        >>> adaptc.debug.get_model_status(prog).trainable_params
        24
    """
    layers, snapshot = get_layer_status(program), program.snapshot()
    binding = _require_binding(snapshot)
    names = list(binding.adapters_by_name)
    kinds = dict.fromkeys(type(p.config).__name__.removesuffix("Config") for p in binding.adapters_by_name.values())
    trained_tensors = _trainable_tensors(
        snapshot, {n: p for n, p in binding.adapters_by_name.items() if p.active_form is None}
    )
    added_tensors = _trainable_tensors(
        snapshot, {n: p.active_form or p for n, p in binding.adapters_by_name.items()}, in_place=False
    )
    return ModelStatus(
        base_model_type=_base_model_type(snapshot),
        adapter_model_type=" + ".join(f"{k}Model" for k in kinds),
        peft_types={n: p.config.peft_type for n, p in binding.adapters_by_name.items()},
        trainable_params=sum(t.numel() for t in trained_tensors if t.requires_grad),
        total_params=sum(t.numel() for t in added_tensors) + count_base_parameters(snapshot, binding.values),
        num_adapter_layers=len(layers),
        enabled=all(s.enabled for s in layers),
        active_adapters=[n for n in names if binding.adapters_by_name[n].active_form is None],
        merged_adapters=[],
        requires_grad={n: _common_value(s.requires_grad[n] for s in layers if n in s.requires_grad) for n in names},
        available_adapters=sorted(names),
        devices={n: sorted({d for s in layers for d in s.devices.get(n, ())}) for n in names},
        scales={n: _common_value(s.scales[n] for s in layers if n in s.scales) for n in names},
    )


def _require_binding(program: AdaptedProgram) -> Binding:
    if program.current is None:
        raise AdaptcError("the program has no adapter layers: it was merged or unloaded, and is as a plain model is")
    return program.current


def _base_model_type(program: AdaptedProgram) -> str:
    if program.adaptation.source is not None:
        return program.adaptation.source.model_class.__name__
    return str((program.binding.config.auto_mapping or {}).get("base_model_class", "other"))


def _slot_tensors(binding: Binding, name: str, group: Iterable[Attachment]) -> dict[str, Tensor]:
    part = binding.adapters_by_name[name]
    values = (part.active_form or part).values
    return {fqn: values[fqn] for a in group for fqn in a.slots.values()}


def _requires_grad(program: AdaptedProgram, binding: Binding, name: str, group: list[Attachment]) -> bool | Irregular:
    part = binding.adapters_by_name[name]
    if part.active_form is not None:
        return False
    trainable = {a.slots[n] for a in group for n, s in a.method.slots(program.ops[a.id]).items() if s.trainable}
    found = [t.requires_grad for fqn, t in _slot_tensors(binding, name, group).items() if fqn in trainable]
    return _common_value(found) if found else False


def _devices(binding: Binding, name: str, group: list[Attachment]) -> list[str]:
    return sorted({t.device.type for t in _slot_tensors(binding, name, group).values()})


def _scale(binding: Binding, name: str, group: list[Attachment]) -> float | Irregular:
    part = binding.adapters_by_name[name]
    return _common_value((part.active_form or part).scale_factors.get(a.id, 1.0) for a in group)


def _trainable_tensors(program: AdaptedProgram, bindings: Mapping[str, Binding], in_place: bool = True) -> list[Tensor]:
    """Return the trainable tensors of the adapters in ``bindings``, each once. Without ``in_place``, return only those
    that PEFT adds to the model, and not those that stand for a tensor of the model."""
    out: dict[int, Tensor] = {}  # several slots may be one tensor
    for a in program.adaptation.attachments:
        part = bindings.get(a.adapter)
        method: Any = None if part is None else part.methods.get(a.id)
        if part is not None and method is not None and (in_place or not method.files.in_place()):
            specs = method.slots(program.ops[a.id])
            found = (part.values[a.slots[n]] for n, s in specs.items() if s.trainable)
            out |= {id(t): t for t in found}
    return list(out.values())


def _common_value(values: Iterable[Any]) -> Any:
    """Return the value that all ``values`` are; ``"irregular"`` where they differ."""
    found = list(dict.fromkeys(values))
    return found[0] if len(found) == 1 else "irregular"


def _join_names(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _join_by_name(values: Mapping[str, Any]) -> str:
    """Return one text where all names have the same value, else one for each name."""
    texts = {n: _join_names(v) if isinstance(v, list) else f"{v}" for n, v in values.items()}
    return (
        next(iter(texts.values()))
        if len(set(texts.values())) == 1
        else ", ".join(f"{n}: {t}" for n, t in texts.items())
    )


def _format_value(value: Any) -> str:
    if isinstance(value, dict):
        return _join_by_name(value) if value else "-"
    if isinstance(value, list):
        return _join_names(value)
    return f"{value:,d}" if type(value) is int else str(value)
