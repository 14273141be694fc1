"""Multiply the scales of an adapter that a package holds.

The result shares all tensors with the adapter it was made from, except for the scales. Whatever is refused changes
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from adaptc.binding.binding import BindingSpec
from adaptc.binding.binding_scale import Modules, check_names, chosen_sites, factor_of
from adaptc.binding.check_tensors import finite_scale
from adaptc.packages.constants import Fitted


def scaled(
    spec: BindingSpec, fitted: Fitted, scale: Any, adapter: str | None = None, modules: Modules = None
) -> Fitted:
    """Return ``fitted`` with its original scale multiplied by ``scale``.

    ``scale`` is a factor, or factors by adapter name; a name that a mapping lacks counts as 1. ``adapter`` and
    ``modules``, and the errors, are those of ``AdaptedProgram.set_scale``.
    """
    names = list(scale) if isinstance(scale, Mapping) else [] if adapter is None else [adapter]
    check_names(fitted, names)
    if isinstance(scale, Mapping):
        scale = scale.get(fitted.name, 1.0)
    factor = factor_of(scale)
    chosen = set(chosen_sites(spec, fitted, fitted.name, modules))
    constants, factors = dict(fitted.constants), dict(fitted.factors)
    for a in spec.attachments:
        if a.id not in chosen or a.scale_slot is None:
            continue
        made: Any = fitted.methods[a.id].scale(spec.ops[a.id])
        old = constants[a.scale_slot]
        value = finite_scale(made * factor, a, fitted.config)
        constants[a.scale_slot] = torch.tensor(value, dtype=old.dtype, device=old.device)
        factors[a.id] = factor
    return replace(fitted, constants=constants, factors={i: f for i, f in factors.items() if f != 1})
