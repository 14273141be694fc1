"""Find layers of a list that run the same code on tensors of the same kinds.

For each ``ModuleList`` or ``Sequential`` of a model, this gives groups of children that are equal. Only their tensors'
values and their layer numbers may differ. Layers with an attribute that cannot be compared count as unequal.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.capture.repeated_layers.replicate_layers import LAYER_INDEX_NAMES

#: the smallest group of equal layers for which the comparison pays
MIN_GROUP = 4
#: types whose values are immutable and are compared by ``==``
IMMUTABLE_TYPES = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def equal_layers(model: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """Yield groups of (path, layer), each of at least :data:`MIN_GROUP` different modules, in the order of their
    list."""
    use_counts: dict[int, int] = {}
    for module in model.modules():
        for child in module.children():
            use_counts[id(child)] = use_counts.get(id(child), 0) + 1
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < MIN_GROUP:
            continue
        groups: list[list[tuple[str, nn.Module]]] = []
        for name, child in module.named_children():
            if use_counts[id(child)] > 1 or not any(True for _ in child.parameters()) or "forward" in vars(child):
                continue
            entry = (f"{path}.{name}" if path else name, child)
            group = next((g for g in groups if _are_equal(g[0][1], child, outermost=True)), None)
            if group is None:
                groups.append([entry])
            else:
                group.append(entry)
        yield from (g for g in groups if len(g) >= MIN_GROUP)


def index_attributes(layers: list[nn.Module]) -> list[tuple[str, str]]:
    """Return each (module path within a layer, attribute) whose value differs among ``layers``, such as
    ``layer_idx``."""
    named = [dict(layer.named_modules()) for layer in layers]
    return [
        (path, name)
        for path, module in named[0].items()
        for name in LAYER_INDEX_NAMES & vars(module).keys()
        if len({vars(m[path])[name] for m in named}) > 1
    ]


def _are_equal(a: nn.Module, b: nn.Module, *, outermost: bool = False) -> bool:
    if type(a) is not type(b) or not _runs_class_code(a, outermost) or not _runs_class_code(b, outermost):
        return False
    attributes, other_attributes = vars(a), vars(b)
    if any(not _have_same_signatures(attributes[name], other_attributes[name]) for name in ("_parameters", "_buffers")):
        return False
    if (
        attributes.keys() != other_attributes.keys()
        or attributes["_modules"].keys() != other_attributes["_modules"].keys()
    ):
        return False
    for name, value in attributes.items():
        if name in ("_parameters", "_buffers", "_modules") or (name.startswith("_") and "_hook" in name):
            continue
        both_numbers = type(value) is int and type(other_attributes[name]) is int
        if not (name in LAYER_INDEX_NAMES and both_numbers) and not are_equal_values(value, other_attributes[name]):
            return False
    pairs = zip(attributes["_modules"].values(), other_attributes["_modules"].values(), strict=True)
    return all(x is y is None or (x is not None and y is not None and _are_equal(x, y)) for x, y in pairs)


def _runs_class_code(module: nn.Module, outermost: bool) -> bool:
    """Return whether a call of ``module`` runs the code of its class alone.

    Hooks of the outermost layer do not count, since they run outside of its ``forward``.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return False
    hooks = () if outermost else _HOOKS
    return "forward" not in vars(module) and not any(vars(module).get(name) for name in hooks)


def _have_same_signatures(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> bool:
    return a.keys() == b.keys() and all(tensor_signature(a[name]) == tensor_signature(b[name]) for name in a)


def tensor_signature(t: Any) -> Any:
    """Return all that tracing knows of a tensor, with sizes as text; for any other value return its type."""
    if not isinstance(t, Tensor):
        return type(t)
    sizes = [str(s) for s in t.shape]
    strides = [str(s) for s in t.stride()] if t.layout == torch.strided else None
    return type(t), sizes, strides, t.dtype, t.device, t.layout, t.requires_grad


def are_equal_values(a: Any, b: Any) -> bool:
    """Return whether two values of attributes or arguments are the same object, or equal and immutable.

    Tuples, lists, sets and dicts are compared by their contents, and modules without tensors by their classes and
    attributes: a layer may hold such a module in a dict.
    """
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a == b or (a != a and b != b)
    if isinstance(a, IMMUTABLE_TYPES):
        return a == b
    if type(a) in (tuple, list, torch.Size):
        return len(a) == len(b) and all(map(are_equal_values, a, b))
    if type(a) in (set, frozenset):
        return a == b and all(isinstance(v, IMMUTABLE_TYPES) for v in a)
    if type(a) is dict:
        return list(a) == list(b) and all(are_equal_values(a[k], b[k]) for k in a)
    if isinstance(a, nn.Module):
        has_tensors = any(True for m in (a, b) for _ in (*m.parameters(), *m.buffers()))
        return not has_tensors and _are_equal(a, b)
    return False
