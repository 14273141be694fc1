"""Define ``LoraConfig``: the options of LoRA and its variants, under PEFT's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from adaptc.errors import ConfigError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.method_parts import AdapterContent
from adaptc.methods._shared.name_patterns import default_and_pattern
from adaptc.methods._shared.option_checks import (
    check_bias,
    check_probability,
    check_ranks,
)
from adaptc.methods.lora_family.alora import Alora
from adaptc.methods.lora_family.arrow import Arrow, ArrowConfig
from adaptc.methods.lora_family.arrow_experts import split_arrow_adapter
from adaptc.methods.lora_family.dora import MAGNITUDE, Dora
from adaptc.methods.lora_family.from_data.corda import CordaConfig
from adaptc.methods.lora_family.from_data.data_options import DataOptions
from adaptc.methods.lora_family.from_data.eva import EvaConfig
from adaptc.methods.lora_family.from_data.lora_ga import LoraGAConfig
from adaptc.methods.lora_family.loftq import LoftQConfig
from adaptc.methods.lora_family.lora import Lora
from adaptc.methods.lora_family.lora_checks import DATA_OPTIONS, check_lora_options
from adaptc.methods.lora_family.qalora import QaLora
from adaptc.methods.lora_family.variants.bdlora import BdLora, BdLoraConfig
from adaptc.methods.lora_family.variants.kasa import DIAGONAL, Kasa, KasaConfig
from adaptc.methods.lora_family.variants.monteclora import Monteclora, MontecloraConfig
from adaptc.methods.lora_family.variants.velora import Velora, VeloraConfig
from adaptc.patterns import pattern_value


@dataclass
class LoraConfig(TargetedConfig):
    """PEFT's ``LoraConfig``: same names, same defaults. Unsupported fields raise ConfigError when set.

    Attributes:
        lora_alpha: the numerator of the scale alpha / r.
        lora_dropout: the dropout probability of the adapter's input.
        use_rslora: whether the scale is alpha / sqrt(r).
        init_lora_weights: True starts with B zero, "gaussian" also draws A from a normal distribution. "pissa", "olora"
            and "orthogonal" are schemes of their own, and False draws both factors. "loftq" quantises the weight and
            starts with its error. "mica" makes B of the smallest singular vectors and trains A alone. "corda", "eva"
            and "lora_ga" take data: :func:`adaptc.methods.initialize_from_data`.
        eva_config: the options of "eva", an :class:`adaptc.EvaConfig` or a dict of its fields.
        corda_config: the options of "corda", an :class:`adaptc.CordaConfig` or a dict of its fields.
        lora_ga_config: the options of "lora_ga", an :class:`adaptc.LoraGAConfig` or a dict of its fields.
        loftq_config: the options of "loftq", an :class:`adaptc.LoftQConfig` or a dict of its fields.
        trainable_token_indices: rows of embeddings that are trained, or name -> rows.
        use_dora: whether the weight is split into magnitude and direction (DoRA).
        alora_invocation_tokens: the tokens from which on the adapter acts (aLoRA).
        use_qalora: whether the adapter's input is pooled over groups of features (QA-LoRA).
        qalora_group_size: the number of features in a group, which divides those of every layer.
        layer_replication: ranges of blocks that are repeated, each with adapters of its own.
        velora_config: the options of VeLoRA, whose gradient of A is made of compressed activations, an
            :class:`adaptc.VeloraConfig`.
        monteclora_config: the options of MonteCLoRA, which samples A around its value in training, an
            :class:`adaptc.MontecloraConfig`.
        lora_bias: whether B has a bias.
        use_bdlora: an :class:`adaptc.BdLoraConfig` for BD-LoRA, whose A or B is block-diagonal.
        arrow_config: the routing of Arrow, an :class:`adaptc.ArrowConfig`.
        kasa_config: an :class:`adaptc.KasaConfig` for KaSA: the weight loses its smallest singular terms, and the
            adapter has singular values of its own.
        ensure_weight_tying: whether layers tied to the input embedding change with it, whichever of them is named. PEFT
            has two parameters on one memory for that; here it is one parameter, whose gradient is the sum.

    Example:
        >>> config = adaptc.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "LORA"
    samples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {},
        {"use_dora": True},
        {"alora_invocation_tokens": [1]},
        {"use_qalora": True},
        {"use_bdlora": {"target_modules_bd_a": ["layer"], "nblocks": 2}},
        {"kasa_config": {}},
        {"velora_config": {}},
        {"monteclora_config": {}},
        {"arrow_config": {"task_adapter_names": ["task_0", "task_1"]}},
    )
    dropout_field: ClassVar[str] = "lora_dropout"
    writes_unset_fields: ClassVar[bool] = True
    alpha_field: ClassVar[str] = "lora_alpha"
    unsupported_fields: ClassVar[Mapping[str, str]] = {
        "megatron_config": "programs are captured from plain modules, not from Megatron's parallel layers",
        "runtime_config": "there is no ephemeral offload: frozen weights stay where the program has them",
    }

    r: int = 8
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] | None = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: LoftQConfig | dict[str, Any] | None = field(default_factory=dict)
    eva_config: EvaConfig | dict[str, Any] | None = None
    corda_config: CordaConfig | dict[str, Any] | None = None
    lora_ga_config: LoraGAConfig | dict[str, Any] | None = None
    use_dora: bool = False
    velora_config: VeloraConfig | dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: MontecloraConfig | dict[str, Any] | None = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: dict[str, Any] | None = None
    lora_bias: bool = False
    use_bdlora: BdLoraConfig | dict[str, Any] | None = None
    arrow_config: ArrowConfig | dict[str, Any] | None = None
    kasa_config: KasaConfig | dict[str, Any] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks(self)
        self.check_common()
        check_lora_options(self)

    @property
    def scheme_name(self) -> str:
        """Return the scheme of first values in lower case, as a string; '' for True and False."""
        return self.init_lora_weights.lower() if isinstance(self.init_lora_weights, str) else ""

    def data_options(self) -> DataOptions | None:
        """Return the options of the first values that are made of data; None for a scheme that takes none."""
        return next((v for c in DATA_OPTIONS if (v := getattr(self, c.option)) is not None), None)

    def data_scheme(self) -> str | None:
        options = self.data_options()
        return None if options is None else options.scheme

    def for_changed_base(self) -> LoraConfig:
        none = {options.option: None for options in DATA_OPTIONS}
        return self if self.data_options() is None else self.replace(init_lora_weights=True, **none)

    def check_common(self) -> None:
        """Raise ConfigError for illegal values of the fields that AdaLoRA's config has, too."""
        check_probability(self, "lora_dropout")
        check_bias(self, "lora_only")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        if data.get("enable_lora"):
            raise ConfigError(
                f"enable_lora={data['enable_lora']} is of PEFT 0.2 or older, which stored layers of several blocks in "
                "another way. Load the adapter with that release, and merge it there"
            )
        # Their other fields say nothing where no layer has blocks.
        return super().from_dict({k: v for k, v in data.items() if k not in ("enable_lora", "merge_weights")})

    @classmethod
    def options_from_tensors(
        cls, modules: Sequence[Mapping[str, Tensor]], shapes: Sequence[Sequence[int]]
    ) -> dict[str, Any]:
        out: dict[str, Any] = {}
        signs = (("use_dora", MAGNITUDE, True), ("lora_bias", "lora_B.bias", True), ("kasa_config", DIAGONAL, {}))
        for option, slot, value in signs:
            have = sum(slot in m for m in modules)
            if have and have != len(modules):
                raise ConfigError(
                    f"{have} of {len(modules)} modules have {slot!r}, and one adapter has it at all or none"
                )
            out |= {option: value} if have else {}
        return out

    def to_dict(self) -> dict[str, Any]:
        out = super().to_dict()
        return {k: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for k, v in out.items()}

    def adapters_to_write(self, tensors: Mapping[str, Tensor], directory: str) -> Mapping[str, AdapterContent]:
        if self.arrow_config is None:
            return super().adapters_to_write(tensors, directory)
        return {name: (config.to_dict(), own) for name, (config, own) in split_arrow_adapter(self, tensors).items()}

    def pattern_entries(self) -> dict[str, Mapping[str, Any]]:
        return {"rank_pattern": self.rank_pattern or {}, "alpha_pattern": self.alpha_pattern or {}}

    def check_layer(self, name: str) -> None:
        if self.use_bdlora is not None:
            BdLoraConfig.from_value(self.use_bdlora).check_layer(name)

    def as_plain_lora(self, ranks: Mapping[str, int], bias: bool) -> LoraConfig:
        """Return this config for plain LoRA with a scale of one and these ranks (module name -> rank).

        ``bias``: whether the adapter has ``lora_B.bias``.
        """
        r, others = default_and_pattern(ranks)
        return self.replace(
            r=r,
            lora_alpha=r,
            rank_pattern=others,
            alpha_pattern=dict(others),
            use_rslora=False,
            use_dora=False,
            use_qalora=False,
            use_bdlora=None,
            kasa_config=None,
            lora_bias=bias,
            init_lora_weights=True,
            loftq_config={},
            **{options.option: None for options in DATA_OPTIONS},
            ensure_weight_tying=False,
            velora_config=None,
            monteclora_config=None,
        )

    def method(self, name: str, kind: str) -> Lora | Arrow:
        if self.arrow_config is not None:
            return self._arrow_method(pattern_value(self.rank_pattern, name, self.r))
        options: dict[str, Any] = {
            "r": pattern_value(self.rank_pattern, name, self.r),
            "alpha": pattern_value(self.alpha_pattern, name, self.lora_alpha),
            "rslora": self.use_rslora,
            "dropout": self.lora_dropout,
            "with_bias": self.lora_bias,
            "scheme": self.init_lora_weights,
        }
        if self.scheme_name == "loftq":
            options |= asdict(LoftQConfig.from_value(self.loftq_config))
        if self.alora_invocation_tokens is not None:
            return Alora(**options, tokens=tuple(self.alora_invocation_tokens))
        if self.use_qalora:
            return QaLora(**options, group_size=self.qalora_group_size)
        if self.kasa_config is not None:
            return Kasa(**options)
        if self.use_bdlora is not None:
            blocks = BdLoraConfig.from_value(self.use_bdlora)
            factor = blocks.factor_at(name)
            return Lora(**options) if factor is None else BdLora(**options, blocks=blocks.nblocks, factor=factor)
        if self.velora_config is not None:
            velora = VeloraConfig.from_value(self.velora_config)
            return Velora(
                **options, num_groups=velora.num_groups, gradient_scale=velora.scale, init_type=velora.init_type
            )
        if self.monteclora_config is not None:
            monteclora = MontecloraConfig.from_value(self.monteclora_config)
            return Monteclora(**options, num_samples=monteclora.num_samples, sample_scaler=monteclora.sample_scaler)
        return (Dora if self.use_dora else Lora)(**options)

    def _arrow_method(self, rank: int) -> Arrow:
        arrow = ArrowConfig.from_value(self.arrow_config)
        if not arrow.task_adapter_names:
            raise ConfigError(
                "arrow_config does not say which adapters it routes between: adaptc.methods.create_arrow_model(model, "
                "task_adapter_paths, arrow_config) makes a program of them, and adaptc.methods.arrow_adapter an "
                "adapter to swap to"
            )
        return Arrow(rank, len(arrow.task_adapter_names), arrow.top_k, arrow.router_temperature)
