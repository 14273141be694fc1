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
class Computed:
    """A module's ``weight`` that is computed from the tensors ``parts``.

    ``undo``: the call, behind ``torch.nn.utils.``, that makes it a parameter again.
    """

    module: str
    weight: str
    parts: tuple[str, ...]
    undo: str

    def refusal(self) -> TargetError:
        return TargetError(
            f"site {f'{self.module}.{self.weight}'.removeprefix('.')!r} is computed of {' and '.join(self.parts)}, and "
            "an adapter changes a weight that is a parameter. Make it one first, with "
            f"torch.nn.utils.{self.undo}, or leave the module out of the targets."
        )


def computed_weights(tensors: Mapping[str, object]) -> dict[str, Computed]:
    """Return the computed weights of a model, by module path, found by the names that torch gives their parts.

    ``tensors``: the model's tensors by FQN.
    """
    found: dict[str, Computed] = {}
    for fqn, tensor in tensors.items():
        module, _, name = fqn.rpartition(".")
        path = f"{module}." if module else ""
        inner = _PARAMETRIZED.fullmatch(fqn)
        if inner is not None:
            owner, weight = inner[1] or "", inner[2]
            undo = f"parametrize.remove_parametrizations(module, {weight!r})"
            before = found.get(owner)
            parts = (*before.parts, name) if before is not None and before.weight == weight else (name,)
            if before is None or before.weight == weight or weight == "weight":
                found[owner] = Computed(owner, weight, parts, undo)
        elif name.endswith("_g") and _same_axes(tensor, tensors.get(f"{path}{name[:-2]}_v")):
            weight = name[:-2]
            undo = f"remove_weight_norm(module, {weight!r})"
            found.setdefault(module, Computed(module, weight, (name, f"{weight}_v"), undo))
        elif name.endswith("_orig"):
            weight = name.removesuffix("_orig")
            pruned = f"{path}{weight}_mask" in tensors
            undo = f"prune.remove(module, {weight!r})" if pruned else f"remove_spectral_norm(module, {weight!r})"
            other = f"{weight}_mask" if pruned else f"{weight}_u"
            if f"{path}{other}" in tensors:
                found.setdefault(module, Computed(module, weight, (name, other), undo))
    return found


def _same_axes(g: object, v: object) -> bool:
    return isinstance(g, Tensor) and isinstance(v, Tensor) and g.ndim == v.ndim
