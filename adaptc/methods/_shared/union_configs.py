"""Make the fields of a config that choose modules, for the sites of several adapters of one method.

The fields choose the modules for which any of the adapters has tensors. They are the union of the configs' own lists
where that chooses these modules, or else a regular expression for just their names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

#: options that narrow the choice of ``target_modules``
NARROWING_FIELDS = ("exclude_modules", "layers_to_transform", "layers_pattern")
_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def union_target_fields(configs: Sequence[Any], names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return the fields, option -> value, that choose the modules of all ``configs``.

    ``names``: for each config its modules. Target parameters, modules to save and biases are united as well.
    """
    out: dict[str, Any] = {}
    for field in ("target_parameters", "modules_to_save"):
        lists = [list(v) for c in configs if (v := getattr(c, field)) is not None]
        out |= {field: list(dict.fromkeys(e for one in lists for e in one))} if lists else {}
    if len(biases := {c.bias for c in configs} - {"none"}) and (len(biases) > 1 or configs[0].bias == "none"):
        out["bias"] = "all" if "all" in biases else biases.pop()
    targets = [c.target_modules for c in configs]
    alike = all(getattr(c, n) == getattr(configs[0], n) for c in configs for n in NARROWING_FIELDS)
    if alike and all(_sorted_targets(t) == _sorted_targets(targets[0]) for t in targets):
        return out
    if alike and all(isinstance(t, (list, tuple, set, frozenset)) for t in targets):
        return out | {"target_modules": sorted({e for t in targets for e in t})}
    modules = list(dict.fromkeys(n for own in names for n in own))
    return out | dict.fromkeys(NARROWING_FIELDS) | {"target_modules": exact_names_regex(modules)}


def exact_names_regex(names: Sequence[str]) -> str:
    """Return a regular expression that matches just these names; '' for no names.

    Names that differ only in the number of the layer share one alternative.
    """
    layers: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys(names):
        number = _LAYER_NUMBER.search(name)
        if number is None:
            layers[name, ""] = []
        else:
            layers.setdefault((name[: number.start()], name[number.end() :]), []).append(number[0])
    parts = []
    for (head, tail), numbers in layers.items():
        middle = f"(?:{'|'.join(numbers)})" if len(numbers) > 1 else "".join(numbers)
        parts.append(re.escape(head) + middle + re.escape(tail))
    return "|".join(parts)


def _sorted_targets(targets: Any) -> Any:
    return sorted(targets) if isinstance(targets, (list, tuple, set, frozenset)) else targets
