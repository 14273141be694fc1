"""Read target entries for the layers of single experts in models that stack all experts in one parameter.

transformers 5 keeps the experts of a mixture in two 3-D parameters, ``experts.gate_up_proj`` and
``experts.down_proj``. Until then each expert had linear layers ``w1``, ``w3``, ``w2`` (Mixtral) or ``gate_proj``,
``up_proj``, ``down_proj``, and the router was a linear layer ``gate``. For many model types PEFT takes these names, and
"all-linear", to mean the stacked parameters and the router's weight. They mean the same here, so that files go both
ways. For other model types such names are refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from adaptc.errors import AdaptcWarning, ConfigError, TargetError, listing
from adaptc.methods import ModelFacts
from adaptc.patterns import compile_pattern
from adaptc.targets.name_rules import ALL_LINEAR, LINEAR_CLASS, dotted_suffixes

#: layer of one expert -> its part of a stacked parameter
EXPERT_LAYER_PARTS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
#: stacked parameter -> its parts, in the order of its rows; the order is also that in which modules register them
STACKED_PARAMETERS: dict[str, tuple[str, ...]] = {
    "experts.gate_up_proj": ("gate", "up"),
    "experts.down_proj": ("down",),
}

#: old layer -> parameter that holds it now
_MIXTRAL = {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
_QWEN_MOE = {
    "gate": "gate.weight",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "down_proj": "down_proj",
}
#: model type -> its old layers, for the types whose targets PEFT converts
OLD_LAYERS: dict[str, Mapping[str, str]] = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _MIXTRAL),
    **dict.fromkeys(
        (
            *("afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe"),
            *("exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe"),
            *("longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe"),
            *("qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "sarvam_mla", "solar_open"),
        ),
        _QWEN_MOE,
    ),
}


@dataclass(frozen=True)
class _OldLayers:
    """The meaning of ``target_modules`` in a model that stacks its experts.

    ``names`` are the old layers that the targets name, and ``parameters`` what holds them now. ``modules`` are the
    other targets. ``lost`` are linear layers that have the name of an old layer, and no target of their own.
    """

    names: frozenset[str]
    parameters: list[str]
    modules: list[str] | str
    lost: list[str]


def with_stacked_experts(config: Any, facts: ModelFacts, weights: Collection[str]) -> Any:
    """Return ``config`` with target parameters for its targets that mean experts and routers.

    It is the same object where the config has no such target or is no LoRA's, and where PEFT does not convert the model
    type. As in PEFT, parameters that hold two projections get twice the rank and twice the alpha.

    ``weights``: the FQNs of the parameters that the model reads.

    Raises ConfigError for the gate projection without the up projection, or the other way round. Warns about linear
    layers with the name of an expert's layer, such as those of a shared expert, which PEFT does not adapt then.
    """
    layers = OLD_LAYERS.get(facts.model_type or "")
    if layers is None or config.peft_type != "LORA" or not config.target_modules:
        return config
    found = _read_targets(config.target_modules, layers, facts, weights)
    if not found.parameters:
        return config
    fused = {old for old, new in layers.items() if new == "gate_up_proj"}
    if found.names & fused and not fused <= found.names:
        raise ConfigError(
            f"target_modules: {listing(sorted(found.names & fused))} without {listing(sorted(fused - found.names))}: a "
            f"model of type {facts.model_type!r} holds both in one parameter, gate_up_proj. Name both, or neither."
        )
    if found.lost:
        warnings.warn(
            f"target_modules: in a model of type {facts.model_type!r}, {listing(sorted(found.names))} mean the stacked "
            f"experts and the router, as in PEFT. {len(found.lost)} linear layers of these names are not adapted: "
            f"{listing(found.lost, 4)}. In a list, longer names such as {found.lost[0]!r} adapt them, too; PEFT does "
            "not read such files.",
            AdaptcWarning,
            stacklevel=2,
        )
    changes: dict[str, Any] = {
        "target_modules": found.modules,
        "target_parameters": list(dict.fromkeys((*(config.target_parameters or ()), *found.parameters))),
    }
    if found.names & fused:
        pattern = r".*\.gate_up_proj"
        # The first pattern that matches counts, so the user's own come first.
        changes["rank_pattern"] = {**(config.rank_pattern or {}), pattern: 2 * config.r}
        changes["alpha_pattern"] = {**(config.alpha_pattern or {}), pattern: 2 * config.lora_alpha}
    return config.replace(**changes)


def _read_targets(targets: Any, layers: Mapping[str, str], facts: ModelFacts, weights: Collection[str]) -> _OldLayers:
    linear = [
        name
        for name, class_name in facts.module_types.items()
        if (name in facts.linear_modules or LINEAR_CLASS.search(class_name)) and name != facts.output_embedding
    ]
    held = {old for old, new in layers.items() if any(w.endswith(f".{new}") for w in weights)}
    if not isinstance(targets, str):
        linear_suffixes = {s for name in linear for s in dotted_suffixes(name)}
        meant = {t for t in targets if t.rpartition(".")[2] in held and not ("." in t and t in linear_suffixes)}
        names = frozenset(t.rpartition(".")[2] for t in meant)
        modules = [t for t in targets if t not in meant]
        lost = [n for n in _with_last_name(linear, names) if not set(modules).intersection(dotted_suffixes(n))]
    elif targets.lower() == ALL_LINEAR:
        names = frozenset(held)
        # A name whose layers the model never calls would match nothing that can be adapted.
        modules = sorted({n.rpartition(".")[2] for n in linear if f"{n}.weight" in weights} - layers.keys())
        lost = _with_last_name(linear, layers)
    else:
        # An expression says which layers it means, so the parameters are named in full.
        matches = compile_pattern("target_modules", targets).fullmatch
        holders = {
            w.removesuffix(layers[old]) + old: w
            for old in sorted(held)
            for w in weights
            if w.endswith(f".{layers[old]}")
        }
        meant_holders = {old: w for old, w in holders.items() if old not in facts.module_types and matches(old)}
        names = frozenset(old.rpartition(".")[2] for old in meant_holders)
        return _OldLayers(names, list(dict.fromkeys(meant_holders.values())), targets, [])
    return _OldLayers(names, list(dict.fromkeys(layers[n] for n in layers if n in names)), modules, lost)


def _with_last_name(modules: Iterable[str], names: Collection[str]) -> list[str]:
    return [m for m in modules if m.rpartition(".")[2] in names]


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
