"""Make the first values of LoRA-GA: run the base forward and backward on batches, and decompose mean gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcError, ConfigError
from adaptc.methods.lora_family.from_data.lora_ga import LoraGAConfig, lora_ga_factors
from adaptc.progress import Stage
from adaptc.training.from_data.base_runs import BaseRuns, counted
from adaptc.training.from_data.data_sites import DataSite, SiteValues
from adaptc.training.from_data.statistics_files import has_statistics, read_statistics, write_statistics

#: computes a scalar from the outputs of the model
Loss = Callable[[Any], Tensor]


def lora_ga_values(
    make_runs: Callable[[], BaseRuns],
    sites: Sequence[DataSite],
    batches: Iterable[Any],
    options: LoraGAConfig,
    running: Stage,
    loss: Loss | None = None,
    cache_file: str | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, SiteValues]:
    """Return the values of each site by attachment id. Raises AdaptcError that names a site."""
    keys = {s.name: f"{s.name}._peft_loraga_grad" for s in sites}
    if cache_file is not None and has_statistics(cache_file):
        found = read_statistics(cache_file, {keys[s.name]: tuple(s.op.stored(s.weight).shape) for s in sites})
        gradients = {name: found[key] for name, key in keys.items()}
    else:
        gradients = _mean_gradients(make_runs(), sites, batches, running, loss)
        if cache_file is not None:
            write_statistics(cache_file, {keys[name]: g for name, g in gradients.items()})
    made: dict[str, SiteValues] = {}
    for s in sites:
        gradient = s.op.canonical(gradients[s.name].to(s.weight.device))
        scale = s.method.scale(s.op)
        A, B = lora_ga_factors(s.weight, gradient, s.method.r, scale, options, generator)
        made[s.attachment.id] = SiteValues(s.method, A, B)
    return made


def _mean_gradients(
    runs: BaseRuns, sites: Sequence[DataSite], batches: Iterable[Any], running: Stage, loss: Loss | None
) -> dict[str, Tensor]:
    """Return the gradient of each site's weight in the stored layout, by name: the mean over all calls of its layer."""
    if made_in_inference_mode := [s.name for s in sites if s.weight.is_inference()]:
        raise AdaptcError(
            f"{made_in_inference_mode[0]!r}: its weight was made in torch.inference_mode, where no gradient can be "
            "taken; load the model outside of it"
        )
    count = 0
    leaves = {s.name: s.op.stored(s.weight).detach().requires_grad_() for s in sites}
    weights = {s.attachment.fqn: leaves[s.name] for s in sites}
    with torch.enable_grad():
        for batch in counted(batches, running):
            value = _loss_of(runs.run(batch, {}, weights), loss)
            value.backward()
            count += 1
    for s in sites:
        gradient = leaves[s.name].grad
        if gradient is None or not bool(gradient.any()):
            raise AdaptcError(
                f"{s.name!r}: the loss does not depend on its weight, so it has no gradient; leave it out with "
                "exclude_modules, or give a loss= that reaches it"
            )
        if not bool(gradient.isfinite().all()):
            raise AdaptcError(f"{s.name!r}: the gradient of its weight has NaN or infinite values")
    return {s.name: _gradient(leaves[s.name]) / (count * len(s.attachment.consumers)) for s in sites}


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _loss_of(outputs: Any, loss: Loss | None) -> Tensor:
    if loss is not None:
        value: Any = loss(outputs)
    elif isinstance(outputs, Mapping):
        value = outputs.get("loss")
    else:
        value = getattr(outputs, "loss", None)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise ConfigError(
            "'lora_ga' takes the gradients of a loss, and the outputs have none: give batches with labels to a program "
            "captured with labels, or loss=, a function of the outputs that returns a scalar"
        )
    return value
