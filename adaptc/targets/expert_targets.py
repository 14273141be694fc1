"""Refuse target entries for the layers of single experts in models that stack all experts in one parameter.

transformers 5 keeps the experts of a mixture in two 3-D parameters, ``experts.gate_up_proj`` and
``experts.down_proj``; until then each expert had linear layers ``w1``, ``w3``, ``w2`` (Mixtral) or ``gate_proj``,
``up_proj``, ``down_proj``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from adaptc.errors import TargetError

#: layer of one expert -> its part of a stacked parameter
EXPERT_LAYER_PARTS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
#: stacked parameter -> its parts, in the order of its rows; the order is also that in which modules register them
STACKED_PARAMETERS: dict[str, tuple[str, ...]] = {
    "experts.gate_up_proj": ("gate", "up"),
    "experts.down_proj": ("down",),
}


def check_no_single_experts(targets: Any, modules: Collection[str], weights: Iterable[str]) -> None:
    """Raise TargetError for ``targets`` that name layers of single experts where the model stacks its experts.

    ``modules``: the names of the model's modules. ``weights``: the FQNs of its tensors.
    """
    if targets is None or isinstance(targets, str):
        return
    lost = [
        t
        for t in targets
        if t.rpartition(".")[2] in EXPERT_LAYER_PARTS and not any(f".{m}".endswith(f".{t}") for m in modules)
    ]
    stacked = [n for n in STACKED_PARAMETERS if any(w.endswith(f".{n}") for w in weights)]
    if lost and stacked:
        raise TargetError(
            f"target_modules: {lost} are layers of single experts, and this model stacks its experts in parameters. "
            f"Name those instead: target_parameters={stacked}."
        )
