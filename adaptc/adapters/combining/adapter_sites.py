"""Split an adapter into its sites without a model: tensors at each site, and tensors of another kind.

Input is a config and tensors by bare keys. Each site has the adapter's method with its own options, and tensors by
name. The other tensors were trained whole, or belong to the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from adaptc.errors import CheckpointError, ConfigError
from adaptc.methods import AdapterConfig, TargetedConfig
from adaptc.methods.lora_family.lora_config import LoraConfig
from adaptc.passes.protocol.method import Method
from adaptc.passes.protocol.parts.low_rank import LowRank

#: PEFT's wrapper around an adapted module, whose name is in the keys of the tensors inside
_WRAPPER = ".base_layer"
#: options of LoRA whose change of a weight depends on the model; of QA-LoRA's tensors on the layer's inputs
NEED_MODEL = ("use_dora", "arrow_config", "kasa_config", "use_qalora", "ensure_weight_tying")


class AdapterLike(Protocol):
    """An object with a config and tensors by bare keys; ``source`` names it in messages."""

    @property
    def config(self) -> AdapterConfig: ...
    @property
    def tensors(self) -> Mapping[str, Tensor]: ...
    @property
    def source(self) -> str: ...


@dataclass(frozen=True, eq=False)
class AdapterSite:
    """The tensors of an adapter at one module or parameter.

    ``key`` is the prefix of its tensors' keys. ``target_names`` is the name of the module, or of the parameters that it
    may be; the config has one method for all of them. ``is_module`` says that the site is the module, and not a
    parameter.
    """

    key: str
    method: Method
    target_names: Sequence[str]
    is_module: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def low_rank(self, source: str) -> LowRank | None:
        """Return the change that the site adds to the weight as a low-rank product, or None where the method has no
        such form.

        Raises CheckpointError with the name of the site.
        """
        try:
            return self.method.files.low_rank(self.tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {self.key!r}: {error}") from None


#: the advice in errors for adapters whose tensors alone do not tell their change
CONVERT_HINT = (
    "give model=, the model they are for, and a method that ends in svd: their changes of its weights are then "
    "combined, into an adapter of LoRA. adaptc.convert_to_lora(adapter, model, rank=...) makes LoRA of one of them"
)


def split_sites(adapter: AdapterLike, device: torch.device) -> tuple[dict[str, AdapterSite], dict[str, Tensor]]:
    """Return the sites by key, and the other tensors by key, all on ``device``.

    Floating tensors become float32, or stay float64. Raises CheckpointError and ConfigError.
    """
    config, source = adapter.config, adapter.source
    if not isinstance(config, TargetedConfig):
        raise ConfigError(f"{source}: a {type(config).__name__} chooses no layers, so there is nothing to combine")
    if config.target_unit == "matrices" and not config.method("", "linear").files.names:
        raise ConfigError(
            f"{source}: what {config.peft_type} adapters do together does not follow from their tensors alone; "
            f"{CONVERT_HINT}"
        )
    sites: dict[str, AdapterSite] = {}
    other_tensors: dict[str, Tensor] = {}
    for key, tensor in adapter.tensors.items():
        value = to_sum_precision(key, tensor, source).to(device)
        found = _split_key(key, config)
        if found is None:
            other_tensors[key] = value
            continue
        path, name = found
        if path not in sites:
            sites[path] = _make_site(path, config, source)
        sites[path].tensors[name] = value
    if not sites and not other_tensors:
        raise CheckpointError(f"{source} has no tensors, so there is nothing to combine")
    return sites, other_tensors


def exact_changes(
    adapter: AdapterLike,
) -> tuple[dict[str, AdapterSite], dict[str, LowRank], dict[str, Tensor]] | None:
    """Return the sites, their changes, and the other tensors by key, or None where the tensors do not tell the
    changes."""
    config = adapter.config
    if not isinstance(config, LoraConfig) or any(getattr(config, option) for option in NEED_MODEL):
        return None
    if config.method("", "linear").changes_base_at_init():
        return None
    sites, others = split_sites(adapter, torch.device("cpu"))
    changes = {key: site.low_rank(adapter.source) for key, site in sites.items()}
    exact = {key: change for key, change in changes.items() if change is not None}
    return (sites, exact, others) if len(exact) == len(sites) else None


def _make_site(key: str, config: TargetedConfig, source: str) -> AdapterSite:
    module = key.partition(_WRAPPER)[0]  # the module's name before PEFT wraps it
    ends = [(e, f"{module}.{e.rpartition('.')[2]}".removeprefix(".")) for e in config.target_parameters or ()]
    parameters = [n for e, n in ends if n == e or n.endswith(f".{e}")]
    methods = {n: config.method(n, "linear") for n in parameters or [module]}
    first, *others = methods.values()
    if any(m != first for m in others):
        raise ConfigError(
            f"{source}: {key!r} is one of the parameters {', '.join(methods)}, which have different options by the "
            f"patterns of the config, and which of them is known with the model alone; {CONVERT_HINT}"
        )
    return AdapterSite(key, first, list(methods), not parameters)


def to_sum_precision(key: str, tensor: Tensor, source: str) -> Tensor:
    """Return a tensor without gradient, in the precision of sums: float32, or float64 where it was. Integers stay.

    Raises CheckpointError for complex tensors.
    """
    if tensor.is_complex():
        raise CheckpointError(f"{source}: {key!r} is {tensor.dtype}; complex adapters are not combined")
    if not tensor.is_floating_point():
        return tensor.detach()
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def _split_key(key: str, config: TargetedConfig) -> tuple[str, str] | None:
    """Return (site, tensor name) of a key, or None where it is no tensor of the adapter's method."""
    for name in config.method("", "linear").files.names:
        if key == name or key.endswith(f".{name}"):
            return key.removesuffix(name).removesuffix("."), name
    return None
