"""Weaken the intruder dimensions of a trained adapter, so that the model forgets less (arXiv 2410.21228).

An intruder dimension is a singular vector of the adapted weight that is near none of the base weight's. Fine-tuning of
low rank makes such vectors with large singular values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from adaptc.adapters.adapter import Adapter
from adaptc.adapters.deltas.deltas_to_lora import make_lora, parse_rank
from adaptc.adapters.deltas.weight_deltas import AdapterDeltas, WeightDelta
from adaptc.adapters.fit_report import FitReport
from adaptc.adapters.to_lora import deltas_of
from adaptc.errors import ConfigError, short_repr
from adaptc.tables import Table


@dataclass(frozen=True, repr=False)
class IntruderReport(FitReport):
    """A report on the new adapter. ``intruders`` has the number of intruder dimensions of each weight."""

    intruders: Mapping[str, int] = field(default_factory=dict[str, int])

    def sections(self, max_rows: int = 20) -> list[str | Table]:
        """Return the numbers of intruder dimensions, then the sections of a :class:`FitReport`."""
        found = {n: k for n, k in self.intruders.items() if k}
        named = ", ".join(f"{n} ({k})" for n, k in [*found.items()][:max_rows])
        more = f" and {len(found) - max_rows} more weights" if len(found) > max_rows else ""
        head = f"{sum(found.values())} intruder dimensions in {len(found)} of {len(self.intruders)} weights"
        return [f"{head}: {named}{more}" if found else head, *super().sections(max_rows)]

    def values(self) -> dict[str, Any]:
        """Return the dict of a :class:`FitReport`, and ``intruders``: weight -> how many, as in ``weights``."""
        fit = super().values()
        weights = [{**w, "intruders": self.intruders.get(w["weight"], 0)} for w in fit["weights"]]
        return {**fit, "weights": weights, "intruders": self.intruders}


@torch.no_grad()
def reduce_intruder_dimension(
    adapter: Any,
    model: Any = None,
    *,
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    rank: float | None = None,
    example_inputs: Any = None,
    config: Any = None,
    key_mapping: Mapping[str, str] | None = None,
    component: str | None = None,
) -> Adapter:
    """Return a LoRA adapter in which the intruder dimensions of ``adapter`` are weaker.

    It is computed as in PEFT, from the singular vectors of each weight before and after the adapter. Here an adapter of
    any method that changes weights can be given, and convolutions and embeddings as well as linear layers.

    Args:
        adapter: as for :func:`adaptc.convert_to_lora`: a program, or with ``model`` any adapter.
        model: the model that the adapter is for.
        top_k: how many singular vectors of the adapted weight are examined, the largest first.
        threshold_epsilon: the absolute cosine similarity, from 0 to 1, below which a vector is an intruder.
        mitigation_lambda: the part of an intruder that stays, from 0 to 1.
        rank: the rank of the result, as for :func:`adaptc.convert_to_lora`; None for the adapter's largest.
        example_inputs: the inputs of ``model``, as for :func:`adaptc.compile`.
        config: the config of an adapter without one.
        key_mapping: regular expression -> replacement, applied to the keys as :func:`adaptc.swap` does.
        component: the part to take of a file that has several; see :func:`adaptc.compile`.

    Returns:
        an adapter with scale 1 (alpha = r). Its ``report`` has the number of intruders of each weight.

    Raises:
        ConfigError: an option is out of its range, or LoRA has no form for the adapter.
        CheckpointError: the adapter does not fit.

    Example:
        >>> config = adaptc.LoraConfig(r=2, lora_alpha=64, target_modules=["0"], init_lora_weights=False)
        >>> adapted = adaptc.compile(model, config, example_inputs=x)
        >>> mild = adaptc.methods.reduce_intruder_dimension(adapted, mitigation_lambda=0.5)
        >>> report = adaptc.swap(adapted, mild)
    """
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ConfigError(f"top_k={short_repr(top_k)} must be an integer of at least 1")
    for name, value in (("threshold_epsilon", threshold_epsilon), ("mitigation_lambda", mitigation_lambda)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ConfigError(f"{name}={short_repr(value)} must be a number from 0 to 1")
    changes = deltas_of(
        adapter, model, example_inputs=example_inputs, config=config, key_mapping=key_mapping, component=component
    )
    ranks = [r for m in changes.binding.methods.values() if (r := m.sizes.rank()) is not None]
    if rank is None and not ranks:
        raise ConfigError(f"adapters of {changes.config.peft_type} have no rank: say that of the result, rank=")
    truncation = parse_rank(max(ranks) if rank is None else rank)
    intruders: dict[str, int] = {}

    def mitigate(fqn: str) -> WeightDelta:
        delta, intruders[fqn] = _mitigate(changes, fqn, top_k, threshold_epsilon, mitigation_lambda)
        return delta

    source = changes.binding.source or "the program's adapter"
    sites = [(group[0], lambda f=fqn: mitigate(f)) for fqn, group in changes.sites.items()]
    made = make_lora(changes.config, changes.spec, sites, truncation, source, changes.saved_tensors)
    report = IntruderReport(made.report.source, made.report.sites, made.report.saved_modules, intruders)
    return Adapter(made.config, made.tensors, f"{source} with weaker intruder dimensions", report)


def _mitigate(
    changes: AdapterDeltas, fqn: str, top_k: int, threshold: float, part_that_stays: float
) -> tuple[WeightDelta, int]:
    """Return the change of a weight with weaker intruder dimensions, and how many of these it had."""
    delta, weight = changes.delta_of(fqn), changes.weight_of(fqn)
    if not bool(delta.matrix.isfinite().all() and weight.isfinite().all()):
        return delta, 0  # refused by name where the LoRA is made
    base = torch.linalg.svd(weight, full_matrices=False).U
    U, S, Vh = torch.linalg.svd(weight + delta.matrix, full_matrices=False)
    similarity = (U.mT @ base).abs().amax(-1)[:, :top_k]
    is_intruder = similarity < threshold
    count = int(is_intruder.sum())
    if not count:
        return delta, 0
    removed = (U[:, :, :top_k] * (S[:, :top_k] * is_intruder)[:, None]) @ Vh[:, :top_k]
    return replace(delta, matrix=delta.matrix - (1 - part_that_stays) * removed), count
