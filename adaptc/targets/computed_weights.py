"""Find layers whose weight is no parameter but computed from parameters, so that they can be refused.

That is so with weight norm, spectral norm, parametrizations and pruning. PEFT adapts the computed weight. A program has
no parameter with that value; an adapter of the parameters behind it would mean something else under the same names in
files. So these layers are refused, with the call that makes their weight a parameter again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from adaptc.errors import TargetError

_PARAMETRIZED = re.compile(r"(?:(.*)\.)?parametrizations\.([^.]+)\.original\d*")


@dataclass(frozen=True)
class ComputedWeight:
    """A module's ``weight`` that is computed from the tensors ``parts``.

    ``undo_call``: the call, behind ``torch.nn.utils.``, that makes it a parameter again.
    """

    module: str
    weight: str
    source_tensors: tuple[str, ...]
    undo_call: str

    def make_error(self) -> TargetError:
        return TargetError(
            f"site {f'{self.module}.{self.weight}'.removeprefix('.')!r} is computed of "
            f"{' and '.join(self.source_tensors)}, and an adapter changes a weight that is a parameter. Make it one "
            f"first, with torch.nn.utils.{self.undo_call}, or leave the module out of the targets."
        )


def find_computed_weights(tensors: Mapping[str, object]) -> dict[str, ComputedWeight]:
    """Return the computed weights of a model, by module path, found by the names that torch gives their parts.

    ``tensors``: the model's tensors by FQN.
    """
    found: dict[str, ComputedWeight] = {}
    for fqn, tensor in tensors.items():
        module, _, name = fqn.rpartition(".")
        path = f"{module}." if module else ""
        inner = _PARAMETRIZED.fullmatch(fqn)
        if inner is not None:
            owner, weight = inner[1] or "", inner[2]
            undo_call = f"parametrize.remove_parametrizations(module, {weight!r})"
            before = found.get(owner)
            parts = (*before.source_tensors, name) if before is not None and before.weight == weight else (name,)
            if before is None or before.weight == weight or weight == "weight":
                found[owner] = ComputedWeight(owner, weight, parts, undo_call)
        elif name.endswith("_g") and _has_same_ndim(tensor, tensors.get(f"{path}{name[:-2]}_v")):
            weight = name[:-2]
            undo_call = f"remove_weight_norm(module, {weight!r})"
            found.setdefault(module, ComputedWeight(module, weight, (name, f"{weight}_v"), undo_call))
        elif name.endswith("_orig"):
            weight = name.removesuffix("_orig")
            pruned = f"{path}{weight}_mask" in tensors
            undo_call = f"prune.remove(module, {weight!r})" if pruned else f"remove_spectral_norm(module, {weight!r})"
            other = f"{weight}_mask" if pruned else f"{weight}_u"
            if f"{path}{other}" in tensors:
                found.setdefault(module, ComputedWeight(module, weight, (name, other), undo_call))
    return found


def _has_same_ndim(g: object, v: object) -> bool:
    return isinstance(g, Tensor) and isinstance(v, Tensor) and g.ndim == v.ndim
