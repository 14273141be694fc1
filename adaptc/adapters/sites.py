"""An adapter taken apart without a model: which of its tensors are at which site, and which are something else.

Before: a config, and tensors by their bare keys. After: for each site the adapter's method there with its own options,
and its tensors by their names; what is left are tensors that were trained whole, or belong to the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from adaptc.errors import CheckpointError, ConfigError
from adaptc.methods import AdapterConfig, TargetedConfig
from adaptc.passes.ir.low_rank import LowRank
from adaptc.passes.ir.method import Method

#: PEFT's wrapper around an adapted module, which is in the keys of what it has inside
_WRAPPER = ".base_layer"


class AdapterLike(Protocol):
    """A config and tensors by bare keys; ``source`` says in messages what it is."""

    @property
    def config(self) -> AdapterConfig: ...
    @property
    def tensors(self) -> Mapping[str, Tensor]: ...
    @property
    def source(self) -> str: ...


@dataclass(frozen=True, eq=False)
class Site:
    """``key`` is what the keys of its tensors begin with, ``name`` the module that patterns of the config are for."""

    key: str
    method: Method
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return module_of(self.key)

    def low_rank(self, source: str) -> LowRank | None:
        """What it adds to the weight, as a product. Raises CheckpointError that names the site."""
        try:
            return self.method.low_rank(self.tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {self.key!r}: {error}") from None


#: the way out of what tensors alone do not tell
AS_LORA = (
    "give model=, the model they are for, and a method that ends in svd: their changes of its weights are then "
    "combined, into an adapter of LoRA. adaptc.convert_to_lora(adapter, model, rank=...) makes LoRA of one of them"
)


def sites_of(adapter: AdapterLike, device: torch.device) -> tuple[dict[str, Site], dict[str, Tensor]]:
    """The sites by key, and the other tensors, on a device. Floating tensors are in float32, or float64 where they
    were. Raises CheckpointError and ConfigError."""
    config, source = adapter.config, adapter.source
    if not isinstance(config, TargetedConfig):
        raise ConfigError(f"{source}: a {type(config).__name__} chooses no layers, so there is nothing to combine")
    if config.unit == "matrices" and not config.method("", "linear").file_names:
        raise ConfigError(
            f"{source}: what {config.peft_type} adapters do together does not follow from their tensors alone; "
            f"{AS_LORA}"
        )
    sites: dict[str, Site] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in adapter.tensors.items():
        value = in_full(key, tensor, source).to(device)
        found = _part(key, config)
        if found is None:
            others[key] = value
            continue
        path, name = found
        if path not in sites:
            if _WRAPPER in path and any(config.pattern_entries().values()):
                raise ConfigError(
                    f"{source}: {path!r} is a parameter or a part of a module, and whether it is meant by a pattern of "
                    f"the config ({', '.join(config.pattern_entries())}) is known with the model alone: give model="
                )
            sites[path] = Site(path, config.method(module_of(path), "linear"))
        sites[path].tensors[name] = value
    if not sites and not others:
        raise CheckpointError(f"{source} has no tensors, so there is nothing to combine")
    return sites, others


def module_of(key: str) -> str:
    """The module of a site, as PEFT calls it before it is wrapped."""
    return key.partition(_WRAPPER)[0]


def in_full(key: str, tensor: Tensor, source: str) -> Tensor:
    """A tensor in the precision that sums are computed in."""
    if tensor.is_complex():
        raise CheckpointError(f"{source}: {key!r} is {tensor.dtype}; complex adapters are not combined")
    if not tensor.is_floating_point():
        return tensor.detach()
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def _part(key: str, config: TargetedConfig) -> tuple[str, str] | None:
    """(site, name) of a key; None where it is not of the adapter's method."""
    for name in config.method("", "linear").file_names:
        if key == name or key.endswith(f".{name}"):
            return key.removesuffix(name).removesuffix("."), name
    return None
