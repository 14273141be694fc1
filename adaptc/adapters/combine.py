"""Combine several adapters into one (``combine``), from their tensors alone or by their changes of a model's
weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from adaptc.adapters.adapter import Adapter
from adaptc.adapters.combining.combine_options import CombineOptions, parse_weight
from adaptc.adapters.combining.combine_tensors import combine_tensors
from adaptc.adapters.from_program import as_adapter_object
from adaptc.adapters.to_lora import combine_deltas
from adaptc.errors import ConfigError, short_repr
from adaptc.value_types import validates_options

_EXPECTED = 'expected {"directory": 0.5, ...}, or a list of (adapter, weight) pairs'


@validates_options(
    "method",
    "density",
    "majority_sign_method",
    "svd_rank",
    "svd_clamp",
    "svd_full_matrices",
    "svd_driver",
    "generator",
    "key_mapping",
)
def combine(
    adapters: Mapping[Any, float] | Sequence[tuple[Any, float]],
    *,
    method: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = False,
    svd_driver: str | None = None,
    generator: torch.Generator | None = None,
    config: Any = None,
    key_mapping: Mapping[str, str] | None = None,
    model: Any = None,
    example_inputs: Any = None,
) -> Adapter:
    """Return one adapter made of several, each with a weight.

    Ranks, alphas, layers and patterns may differ. Each layer is made of the adapters that have it. ``method`` is one of
    PEFT's combination types, with PEFT's numbers:

    - "cat" is the exact sum, whose ranks add up.
    - "svd", the default for LoRA, is the sum cut to ``svd_rank``.
    - "linear", "ties", "dare_linear", "dare_ties" and "magnitude_prune" act on each of the two factors, which is an
      approximation. All but "linear" may end in "_svd": they then act on the changes of the weights, cut as "svd" cuts
      them.

    Methods whose change is linear in one tensor (IA3, C3A, FourierFT, WaveFT, MiSS, BEFT) have only the weighted sum,
    "linear". All is computed in float32, or in float64 where an adapter has it. rsLoRA's scale and ``lora_bias`` are
    accounted for. Tensors that are trained whole are averaged, if the weights of the adapters that have them sum to
    one.

    Args:
        adapters: PEFT directory -> weight, or a list of (adapter, weight) pairs. In pairs, adapters may also be state
            dicts (with ``config``), :class:`Adapter` objects, programs, and results of ``bind``. Weights may be
            negative.
        method: the combination type; None for the default of the adapters' method.
        density: the part of the entries that is kept.
        majority_sign_method: "total" elects signs by sums, "frequency" by counts.
        svd_rank: the rank of the result; None for the largest of the adapters.
        svd_clamp: the quantile of the factors' entries to which larger ones are clamped.
        svd_full_matrices: torch's option, which changes only how the result is computed.
        svd_driver: torch's option on a GPU, which changes only how the result is computed.
        generator: the source of the random choices of dare; None for torch's global generator.
        config: the config of state dicts.
        key_mapping: regular expression -> replacement, applied to the keys as :func:`swap` does.
        model: a model as for :func:`compile`, or a program. With it, the adapters' changes of its weights are combined
            into LoRA. Adapters of any methods (DoRA, LoHa, PiSSA, ...) can then be combined, by the methods that end in
            svd.
        example_inputs: the inputs of ``model``, as for :func:`compile`.

    Returns:
        an adapter with scale 1 (alpha = r), which ``swap``, ``bind``, ``compile`` and ``save_adapter`` take.

    Raises:
        ConfigError: options or adapters do not go together.
        CheckpointError: files or shapes do not fit, or values are not finite.

    Example:
        >>> one, other = (adaptc.Adapter(*lora_weights(seed)) for seed in (0, 1))
        >>> adaptc.combine([(one, 0.7), (other, 0.3)], method="cat").config.r
        4
    """
    pairs = _check_pairs(adapters)
    options = CombineOptions(
        method, density, majority_sign_method, svd_rank, svd_clamp, svd_full_matrices, svd_driver, generator
    )
    if model is None and example_inputs is not None:
        raise ConfigError("example_inputs go with model=, and no model is given: leave them out")
    source = " + ".join(f"{w:g} * {_describe_adapter(a)}" for a, w in pairs)
    weights = [w for _, w in pairs]
    if model is not None:
        # With a model, files may be of any format, since the model tells what their keys mean.
        given = [a if isinstance(a, (str, os.PathLike)) else as_adapter_object(a, config=config) for a, _ in pairs]
        return combine_deltas(given, weights, options, model, example_inputs, key_mapping, source)
    objects = [as_adapter_object(a, config=config, key_mapping=key_mapping) for a, _ in pairs]
    return Adapter(*combine_tensors(objects, weights, options), source)


def _check_pairs(adapters: Any) -> list[tuple[Any, float]]:
    if isinstance(adapters, Mapping):
        pairs = list(adapters.items())
    elif isinstance(adapters, (list, tuple)):
        pairs = list(adapters)
    else:
        raise ConfigError(f"{_EXPECTED}; got a {type(adapters).__name__}")
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ConfigError(f"{_EXPECTED}; got {short_repr(pair)} in the list")
    if not pairs:
        raise ConfigError(f"there are no adapters to combine; {_EXPECTED}")
    return [(a, parse_weight(w, _describe_adapter(a))) for a, w in pairs]


def _describe_adapter(adapter: Any) -> str:
    if isinstance(adapter, Mapping):
        return "state dict"
    found = getattr(adapter, "source", None) or getattr(getattr(adapter, "binding", None), "source", None)
    if isinstance(found, str):
        return found
    return str(adapter) if isinstance(adapter, (str, os.PathLike)) else f"a {type(adapter).__name__}"
