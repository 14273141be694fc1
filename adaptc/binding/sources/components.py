"""Choose the component of an adapter file that belongs to a model.

Adapters for pipelines hold tensors of a UNet and of text encoders in one file. A component is the model's where all of
its keys name modules of the model, of the right sizes. The components that are not chosen are reported, with the number
of their tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from adaptc.adapter_files.formats.parts import DIFF, Format, ParsedKey, split_component
from adaptc.binding.sources.module_names import ModuleNames
from adaptc.errors import MAX_LISTED, CheckpointError, and_more, short_repr


@dataclass(frozen=True)
class ChosenComponent:
    """The component of a file that was chosen for a model.

    ``modules_by_key`` pairs each part of ``component`` with the model's module. ``others`` maps each other component to
    its number of tensors.
    """

    component: str
    modules_by_key: Sequence[tuple[ParsedKey, str]]
    other_components: Mapping[str, int]


def choose_component(
    file_format: Format,
    parsed_keys: Sequence[ParsedKey],
    tensors: Mapping[str, Tensor],
    names: ModuleNames,
    component: str | None,
    source: str,
) -> ChosenComponent:
    """Return the component that belongs to a model whose modules are ``names``; ``component`` says which, if the caller
    knows.

    Raises CheckpointError where no component fits, several do, or a key of the chosen one names no module.
    """
    whole = [] if component else [(p, names.find(p, "", source)) for p in parsed_keys if not p.is_flattened]
    if whole and len(whole) == len(parsed_keys) and all(m is not None for _, m in whole):
        # The model's own module names may begin with the name of a component.
        return ChosenComponent("", [(p, m) for p, m in whole if m is not None], {})
    groups: dict[str, list[ParsedKey]] = {}
    for p in parsed_keys:
        groups.setdefault(p.component, []).append(p)
    found = {c: [(p, names.find(p, c, source)) for p in group] for c, group in groups.items()}
    one = (
        _check_component(component, groups, source)
        if component is not None
        else _find_component(found, tensors, names, source)
    )
    if lost := [p for p, m in found[one] if m is None]:
        raise _unknown_keys_error(file_format, lost, found[one], names, source)
    others = {c: len(group) for c, group in groups.items() if c != one}
    return ChosenComponent(one, [(p, m) for p, m in found[one] if m is not None], others)


_ModulesOfComponents = Mapping[str, Sequence[tuple[ParsedKey, str | None]]]


def _check_component(component: str, groups: Mapping[str, Sequence[ParsedKey]], source: str) -> str:
    if component not in groups:
        there = f"it has {', '.join(repr(c) for c in groups)}"
        none = "its keys name none: leave component out"
        raise CheckpointError(f"{source} has no component {component!r}; {none if list(groups) == [''] else there}.")
    return component


def _find_component(
    modules_of: _ModulesOfComponents, tensors: Mapping[str, Tensor], names: ModuleNames, source: str
) -> str:
    if len(modules_of) == 1:
        return next(iter(modules_of))
    known = {c: sum(m is not None for _, m in group) for c, group in modules_of.items()}
    full = [c for c, group in modules_of.items() if known[c] == len(group)]
    sized = [
        c
        for c in full
        if all(m is None or _has_fitting_size(p, tensors[p.key], names.shape(m)) for p, m in modules_of[c])
    ]
    some = sized or full or [c for c, n in known.items() if n]
    if len(some) == 1:
        return some[0]
    counts = ", ".join(
        f"{c or 'no name'!s} ({known[c]} of {len(group)} keys name a module)" for c, group in modules_of.items()
    )
    what = "which of them the model is cannot be told" if some else "the model is none of them"
    raise CheckpointError(
        f"{source} has several components, and {what}: {counts}. Say component= to choose one, or give the model it "
        f"is for."
    )


def _has_fitting_size(parsed_key: ParsedKey, t: Tensor, shape: Sequence[int]) -> bool:
    """Return whether a factor's size is that of its side of the weight, or that of a change the weight's.

    Layers may store the weight transposed.
    """
    if parsed_key.slot == DIFF:
        return t.numel() == prod(shape)
    if len(shape) < 2 or t.ndim < 2:
        return True
    if parsed_key.slot in ("lora_A.weight", "hada_w1_b"):
        return t.shape[1] in shape[:2] or t[0].numel() == prod(shape[1:])
    return parsed_key.slot not in ("lora_B.weight", "hada_w1_a") or t.shape[0] in shape[:2]


def _unknown_keys_error(
    file_format: Format,
    unknown: Sequence[ParsedKey],
    all_keys: Sequence[tuple[ParsedKey, str | None]],
    names: ModuleNames,
    source: str,
) -> CheckpointError:
    few = "; ".join(
        f"{p.key!r}" + (f" (nearest: {', '.join(near)})" if (near := names.nearest_names(p)) else "")
        for p in unknown[:MAX_LISTED]
    )
    name = split_component(unknown[0].module_names[0])[1]
    way = file_format.missing_module_hint(name) or "The adapter is for another model, or its keys need a key_mapping."
    return CheckpointError(
        f"{source} ({file_format.name}): {len(unknown)} of its {len(all_keys)} keys name no module of the model: {few}"
        f"{and_more(unknown)}. {way}{_component_hint(unknown)}"
    )


def _component_hint(unknown: Sequence[ParsedKey]) -> str:
    components = sorted({p.component for p in unknown} - {""})
    return f" They are of the component {short_repr(components[0])}." if components else ""
