"""Find the sites of a program whose first values are made of data, and hold what is made for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from adaptc.binding.binding import Binding, BindingSpec
from adaptc.errors import AdaptcError, ConfigError
from adaptc.methods.lora_family.from_data.data_options import DataOptions
from adaptc.methods.lora_family.lora import Lora
from adaptc.methods.lora_family.lora_config import LoraConfig
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.state.core import ProgramCore
from adaptc.training.from_data.base_runs import BaseRuns


@dataclass(frozen=True)
class DataSite:
    """A site, with its method as the config gives it and its original weight (out, in), as methods see it."""

    attachment: Attachment
    method: Lora
    op: Op
    weight: Tensor

    @property
    def name(self) -> str:
        """Return the module's name, which PEFT's files of statistics have, too."""
        return self.attachment.name or self.attachment.module


@dataclass(frozen=True)
class SiteValues:
    """The values of a site: A, B and the method with their rank and alpha; None for a site that gets no rank.

    ``rows``: how many rows of input it was made of, 0 where a file had the statistics. ``explained``: the part of the
    variance of the input that the rank explains; None where it is not known.
    """

    method: Lora | None
    A: Tensor
    B: Tensor
    rows: int = 0
    explained: float | None = None


def data_config(program: ProgramCore) -> tuple[Binding, LoraConfig, DataOptions]:
    """Return the binding of a program, its config, and the options of its scheme. Raises ConfigError where its first
    values take no data."""
    binding = program.binding
    config = binding.config
    if binding.joint_adapters:
        raise ConfigError(
            f"the program has the adapters {sorted(binding.joint_adapters)}: compile one for the adapter alone, whose "
            "first values are made of data"
        )
    options = config.data_options() if isinstance(config, LoraConfig) else None
    if not isinstance(config, LoraConfig) or options is None:
        raise ConfigError(
            f"the first values of the program's adapter take no data: compile the model with LoraConfig("
            f"init_lora_weights='corda', 'eva' or 'lora_ga'), found {config.peft_type} with "
            f"{getattr(config, 'init_lora_weights', None)!r}"
        )
    return binding, config, options


def find_data_sites(program: ProgramCore, spec: BindingSpec, binding: Binding, config: LoraConfig) -> list[DataSite]:
    """Return the sites of the current adapter, with the ranks of ``config``.

    Raises ConfigError where first values cannot change the weight of one.
    """
    found: list[DataSite] = []
    for a in spec.attachments:
        bound = binding.methods.get(a.id)
        if not isinstance(bound, Lora) or bound.data_scheme() is None:
            continue
        method = bound.rebind(config, a)
        assert isinstance(method, Lora)
        if method.changes_base_at_init():
            option = f"init_lora_weights={method.scheme!r} changes the base weight {a.fqn!r}"
            if a.fqn in spec.residual:
                raise ConfigError(f"{option}, of which the program's file has no original: compile the model again")
            if a.tied:
                raise ConfigError(f"{option}, which other layers read too: leave it out, or use 'eva'")
            if isinstance(spec.weights[a.fqn], QuantizedTensor):
                raise ConfigError(f"{option}, which is quantised: take the float model, or use 'eva'")
            if method.scale(spec.ops[a.id]) <= 0:
                raise ConfigError(f"{option} by its scale, which lora_alpha makes zero: lora_alpha must be positive")
        found.append(DataSite(a, method, spec.ops[a.id], spec.canonical_weight(a)))
    names = [s.name for s in found]
    if double := next((n for n in names if names.count(n) > 1), None):
        raise ConfigError(f"several parameters of {double!r} are adapted, and data goes to layers: leave them out")
    if not found:
        raise AdaptcError("the program's adapter has no site with LoRA whose first values are made of data")
    return found


def inputs_by_site(runs: BaseRuns, sites: Sequence[DataSite]) -> Mapping[str, tuple[fx.Node, ...]]:
    """Return name of each site -> the nodes that its layer reads. Raises AdaptcError for a site that is no layer with
    an input."""
    found = {s.name: runs.input_nodes(s.attachment) for s in sites}
    if odd := next((name for name, nodes in found.items() if not nodes), None):
        raise AdaptcError(
            f"no data reaches {odd!r}: its weight is not read by a layer with an input of its own; leave it out with "
            "exclude_modules"
        )
    return found
