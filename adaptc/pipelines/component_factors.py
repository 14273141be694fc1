"""Turn the weights of diffusers' ``set_adapters`` into factors: a number for a component, or one for each module.

Weights are a number, None for 1, or a dict by component. In it a UNet's weights may be a dict by block, which
diffusers' own function expands. A module's factor is that of the first entry that its path contains, else that of its
block, and 1 where there is none. diffusers drops entries that mean nothing here; they are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from adaptc.errors import ConfigError, listing, short_repr
from adaptc.pipelines.component_state import Factor
from adaptc.value_types import is_finite_in_float32


def weights_by_adapter(names: str | Sequence[str], weights: Any) -> dict[str, Any]:
    """Return name -> weight, as ``set_adapters`` takes them. Raises ConfigError where they do not go together."""
    found = [names] if isinstance(names, str) else list(names)
    given = weights if isinstance(weights, list) else [weights] * len(found)
    if len(given) != len(found):
        raise ConfigError(
            f"there are {len(found)} adapter names and {len(given)} adapter_weights: give one for each name"
        )
    if len(set(found)) < len(found):
        raise ConfigError(f"an adapter is named twice: {listing(found)}; give each name once, with its weight")
    return dict(zip(found, given, strict=True))


def component_factor(name: str, weight: Any, component: str, owners: Collection[str], known: Collection[str]) -> Any:
    """Return what an adapter's ``weight`` says for one component.

    ``owners`` are the components that have the adapter, and ``known`` all of the pipeline's. Raises ConfigError for an
    entry of a component that is not there, or that does not have the adapter.
    """
    if isinstance(weight, Mapping):
        for key in weight:
            if key not in owners:
                what = "does not have it" if key in known else f"is none of the pipeline's: {listing(known)}"
                raise ConfigError(
                    f"the weights of {name!r} name the component {short_repr(key)}, which {what}; drop the entry"
                )
        weight = weight.get(component)
    return 1.0 if weight is None else weight


def expand_factor(name: str, factor: Any, original: Any, modules: Sequence[str]) -> Factor:
    """Return the factor of one component: a number, or module -> number for the ``modules`` that the adapter has.

    Raises ConfigError for entries that mean no module, and for what is no finite number.
    """
    if not isinstance(factor, Mapping):
        return _number(name, factor)
    blocks = _expand_blocks(name, factor, original)
    for entry in blocks:
        if not isinstance(entry, str) or (blocks is factor and not any(entry in m for m in modules)):
            raise ConfigError(f"the weights of {name!r} name {short_repr(entry)}, which none of its modules contains")
    return {m: _number(name, _factor_of(m, blocks)) for m in modules}


def _expand_blocks(name: str, factor: Mapping[str, Any], original: Any) -> Mapping[str, Any]:
    if type(original).__name__ not in ("UNet2DConditionModel", "UNetMotionModel"):
        return factor
    from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

    try:
        return _maybe_expand_lora_scales(original, [dict(factor)])[0]  # type: ignore[return-value]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"the weights {short_repr(dict(factor))} of {name!r} are for no blocks: {error}") from error


def _factor_of(module: str, blocks: Mapping[str, Any]) -> Any:
    for entry, factor in blocks.items():
        if entry in module:
            return factor
    path = module.split(".")
    block = f"{path[0]}.{path[1]}.attentions.{path[3]}" if len(path) > 3 else ""
    return blocks.get(block, 1.0)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_finite_in_float32(value):
        raise ConfigError(f"the weight of {name!r} is {short_repr(value)}, not a finite number")
    return float(value)
