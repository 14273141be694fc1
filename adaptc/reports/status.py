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
from adaptc.passes.graph.graph_lock import exclusive
from adaptc.passes.protocol.attachment import Attachment
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.wrapper import of_programs
from adaptc.reports.coverage import base_parameters
from adaptc.state.overrides import view_of
from adaptc.tables import Column, Table, collapse, times

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


class LayerStatuses(list[LayerStatus]):
    """A list of :class:`LayerStatus` that prints as a table; layers that differ in their number alone share a row."""

    def __repr__(self) -> str:
        groups: dict[tuple[str, ...], list[str]] = {}
        for s in self:
            how = (s.module_type, _names(s.available_adapters), _names(s.active_adapters), _by_name(s.requires_grad))
            groups.setdefault((*how, _by_name(s.devices), _by_name(s.scales)), []).append(s.name)
        rows = [(times(text, n), *how) for how, members in groups.items() for text, n in collapse(members)]
        on = "" if all(s.enabled for s in self) else "\n(disabled in this block)"
        columns = ["layer", Column("type", keep=True), "adapters", "active", "requires grad", "devices", "scales"]
        return Table(columns, rows).text() + on


@dataclass(frozen=True, repr=False)
class ModelStatus:
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
        rows = [(f.name, _text(getattr(self, f.name))) for f in fields(self)]
        return Table([Column("status", keep=True), "value"], rows).text()


@of_programs
@exclusive
def get_layer_status(program: AdaptedProgram) -> LayerStatuses:
    """Return the status of each adapted module, with the fields of ``peft.get_layer_status``; it prints as a table.

    Names are those of the model's modules, without what PEFT's wrapper puts in front of them. Raises AdaptcError where
    the program has no adapter.
    """
    enabled, still = not view_of(program).off, program.snapshot()
    binding, types = _binding(still), all_module_types(still)
    layers: dict[str, list[Attachment]] = {}
    for a in still.adaptation.attachments:
        part = binding.named.get(a.adapter)
        if part is not None and a.id in (part.idle or part).methods:
            layers.setdefault(a.module, []).append(a)
    active = [n for n, part in binding.named.items() if part.idle is None]
    out = LayerStatuses()
    for name, here in layers.items():
        by_name: dict[str, list[Attachment]] = {}
        for a in here:
            by_name.setdefault(a.adapter, []).append(a)
        kind = types.get(name, "").rpartition(".")[2] or here[0].kind
        out.append(
            LayerStatus(
                name=name,
                module_type=f"{binding.named[here[0].adapter].config.peft_type.lower()}.{kind}",
                enabled=enabled,
                active_adapters=list(active),
                merged_adapters=[],
                requires_grad={n: _trains(still, binding, n, group) for n, group in by_name.items()},
                available_adapters=sorted(by_name),
                devices={n: _devices(binding, n, group) for n, group in by_name.items()},
                scales={n: _scale(binding, n, group) for n, group in by_name.items()},
            )
        )
    return out


@of_programs
@exclusive
def get_model_status(program: AdaptedProgram) -> ModelStatus:
    """Return the status of a program's adapters, with the fields of ``peft.get_model_status``; it prints as a table.

    Raises AdaptcError where the program has no adapter.
    """
    layers, still = get_layer_status(program), program.snapshot()
    binding = _binding(still)
    names = list(binding.named)
    kinds = dict.fromkeys(type(p.config).__name__.removesuffix("Config") for p in binding.named.values())
    trained = _own(still, {n: p for n, p in binding.named.items() if p.idle is None})
    added = _own(still, {n: p.idle or p for n, p in binding.named.items()}, in_place=False)
    return ModelStatus(
        base_model_type=_base_type(still),
        adapter_model_type=" + ".join(f"{k}Model" for k in kinds),
        peft_types={n: p.config.peft_type for n, p in binding.named.items()},
        trainable_params=sum(t.numel() for t in trained if t.requires_grad),
        total_params=sum(t.numel() for t in added) + base_parameters(still, binding.values),
        num_adapter_layers=len(layers),
        enabled=all(s.enabled for s in layers),
        active_adapters=[n for n in names if binding.named[n].idle is None],
        merged_adapters=[],
        requires_grad={n: _agreed(s.requires_grad[n] for s in layers if n in s.requires_grad) for n in names},
        available_adapters=sorted(names),
        devices={n: sorted({d for s in layers for d in s.devices.get(n, ())}) for n in names},
        scales={n: _agreed(s.scales[n] for s in layers if n in s.scales) for n in names},
    )


def _binding(program: AdaptedProgram) -> Binding:
    if program.current is None:
        raise AdaptcError("the program has no adapter layers: it was merged or unloaded, and is as a plain model is")
    return program.current


def _base_type(program: AdaptedProgram) -> str:
    if program.adaptation.source is not None:
        return program.adaptation.source.kind.__name__
    return str((program.binding.config.auto_mapping or {}).get("base_model_class", "other"))


def _tensors(binding: Binding, name: str, group: Iterable[Attachment]) -> dict[str, Tensor]:
    part = binding.named[name]
    values = (part.idle or part).values
    return {fqn: values[fqn] for a in group for fqn in a.slots.values()}


def _trains(program: AdaptedProgram, binding: Binding, name: str, group: list[Attachment]) -> bool | Irregular:
    part = binding.named[name]
    if part.idle is not None:
        return False
    trainable = {a.slots[n] for a in group for n, s in a.method.slots(program.ops[a.id]).items() if s.trainable}
    found = [t.requires_grad for fqn, t in _tensors(binding, name, group).items() if fqn in trainable]
    return _agreed(found) if found else False


def _devices(binding: Binding, name: str, group: list[Attachment]) -> list[str]:
    return sorted({t.device.type for t in _tensors(binding, name, group).values()})


def _scale(binding: Binding, name: str, group: list[Attachment]) -> float | Irregular:
    part = binding.named[name]
    return _agreed((part.idle or part).factors.get(a.id, 1.0) for a in group)


def _own(program: AdaptedProgram, parts: Mapping[str, Binding], in_place: bool = True) -> list[Tensor]:
    """Return the trainable tensors of the adapters in ``parts``, each once. Without ``in_place``, return only those
    that PEFT adds to the model, and not those that stand for a tensor of the model."""
    out: dict[int, Tensor] = {}  # several slots may be one tensor
    for a in program.adaptation.attachments:
        part = parts.get(a.adapter)
        method: Any = None if part is None else part.methods.get(a.id)
        if part is not None and method is not None and (in_place or not method.in_place()):
            specs = method.slots(program.ops[a.id])
            found = (part.values[a.slots[n]] for n, s in specs.items() if s.trainable)
            out |= {id(t): t for t in found}
    return list(out.values())


def _agreed(values: Iterable[Any]) -> Any:
    """Return the value that all ``values`` are; ``"irregular"`` where they differ."""
    found = list(dict.fromkeys(values))
    return found[0] if len(found) == 1 else "irregular"


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _by_name(values: Mapping[str, Any]) -> str:
    """Return one text where all names have the same value, else one for each name."""
    texts = {n: _names(v) if isinstance(v, list) else f"{v}" for n, v in values.items()}
    return (
        next(iter(texts.values()))
        if len(set(texts.values())) == 1
        else ", ".join(f"{n}: {t}" for n, t in texts.items())
    )


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return _by_name(value) if value else "-"
    if isinstance(value, list):
        return _names(value)
    return f"{value:,d}" if type(value) is int else str(value)
