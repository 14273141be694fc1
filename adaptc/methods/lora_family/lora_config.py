"""Define ``LoraConfig``: the options of LoRA and its variants, under PEFT's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from adaptc.errors import ConfigError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.method_parts import AdapterContent
from adaptc.methods._shared.name_patterns import default_and_pattern, pattern_value
from adaptc.methods._shared.option_checks import (
    check_bias,
    check_integers,
    check_probability,
    check_ranks,
    warn_unused,
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
from adaptc.methods.lora_family.qalora import QaLora

NOT_IMPLEMENTED = "this LoRA variant is not implemented"

#: the options of first values that are made of data
DATA_OPTIONS: tuple[type[DataOptions], ...] = (CordaConfig, EvaConfig, LoraGAConfig)

#: fields that each choose a variant of LoRA; at most one may be set
VARIANT_FIELDS = (
    "use_dora",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "kasa_config",
)


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
        lora_bias: whether B has a bias.
        arrow_config: the routing of Arrow, an :class:`adaptc.ArrowConfig`.
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
        {"arrow_config": {"task_adapter_names": ["task_0", "task_1"]}},
    )
    dropout_field: ClassVar[str] = "lora_dropout"
    writes_unset_fields: ClassVar[bool] = True
    alpha_field: ClassVar[str] = "lora_alpha"
    unsupported_fields: ClassVar[Mapping[str, str]] = {
        "megatron_config": "programs are captured from plain modules, not from Megatron's parallel layers",
        "velora_config": NOT_IMPLEMENTED,
        "monteclora_config": NOT_IMPLEMENTED,
        "use_bdlora": NOT_IMPLEMENTED,
        "kasa_config": NOT_IMPLEMENTED,
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
    velora_config: dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict[str, Any] | None = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: dict[str, Any] | None = None
    lora_bias: bool = False
    use_bdlora: dict[str, Any] | None = None
    arrow_config: ArrowConfig | dict[str, Any] | None = None
    kasa_config: dict[str, Any] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks(self)
        self.check_common()
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise ConfigError(f"lora_bias=True needs init_lora_weights True or False, got {self.init_lora_weights!r}")
        if self.lora_bias and self.use_dora:
            raise ConfigError(
                "lora_bias=True has no meaning for DoRA, which scales weights alone; unset one of the two"
            )
        for option in ("use_dora", "lora_bias"):
            if self.ensure_weight_tying and getattr(self, option):
                raise ConfigError(
                    f"ensure_weight_tying=True has no meaning with {option}=True, which tied layers have apart"
                )
        # A dict, as in PEFT, which files and copies hold as it is.
        given: Any = self.loftq_config
        has_loftq_options = given is not None and not (isinstance(given, Mapping) and len(given) == 0)
        self.loftq_config = asdict(LoftQConfig.from_value(self.loftq_config)) if has_loftq_options else {}
        if self._is_loftq and not has_loftq_options:
            raise ConfigError(
                "init_lora_weights='loftq' needs its options: loftq_config={'loftq_bits': 4, 'loftq_iter': 1}"
            )
        if has_loftq_options and not self._is_loftq:
            warn_unused(self, ("loftq_config",), "without init_lora_weights='loftq'")
            self.loftq_config = {}
        self._check_data_options()
        self._check_invocation()
        self._check_pooling()
        self._check_arrow()
        variants = [name for name in VARIANT_FIELDS if getattr(self, name)]
        if isinstance(self.init_lora_weights, str) and self.init_lora_weights.lower() == "mica":
            if self.ensure_weight_tying:
                raise ConfigError(
                    "ensure_weight_tying=True has no meaning with init_lora_weights='mica', which freezes B: a tied "
                    "layer has the factors of its embedding in the other order, and would train that one"
                )
            variants.append("init_lora_weights='mica'")
        if len(variants) > 1:
            raise ConfigError(f"{' and '.join(variants)} are variants of LoRA that do not combine; keep one of them")

    @property
    def _is_loftq(self) -> bool:
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights.lower() == "loftq"

    def data_options(self) -> DataOptions | None:
        """Return the options of the first values that are made of data; None for a scheme that takes none."""
        return next((v for c in DATA_OPTIONS if (v := getattr(self, c.option)) is not None), None)

    def for_changed_base(self) -> LoraConfig:
        none = {options.option: None for options in DATA_OPTIONS}
        return self if self.data_options() is None else self.replace(init_lora_weights=True, **none)

    def _check_data_options(self) -> None:
        scheme = self.init_lora_weights.lower() if isinstance(self.init_lora_weights, str) else None
        for options in DATA_OPTIONS:
            value = getattr(self, options.option)
            if options.scheme == scheme:
                setattr(self, options.option, options() if value is None else options.from_value(value))
            elif value is not None:
                options.from_value(value)
                warn_unused(self, (options.option,), f"without init_lora_weights={options.scheme!r}")
                setattr(self, options.option, None)
        if self.ensure_weight_tying and self.data_options() is not None:
            raise ConfigError(
                f"ensure_weight_tying=True has no meaning with init_lora_weights={scheme!r}, which embeddings have not"
            )

    def _check_invocation(self) -> None:
        tokens, scheme = self.alora_invocation_tokens, self.init_lora_weights
        if tokens is None:
            return
        if not tokens:
            raise ConfigError("alora_invocation_tokens is empty: name the ids of at least one token, or leave it None")
        check_integers(self, {f"alora_invocation_tokens[{i}]": t for i, t in enumerate(tokens)}, minimum=0)
        if self.ensure_weight_tying:
            raise ConfigError("ensure_weight_tying=True has no meaning for aLoRA, which embeddings do not have")
        if isinstance(scheme, str) and scheme.lower().startswith(("pissa", "olora", "loftq", "corda", "lora_ga")):
            raise ConfigError(
                f"init_lora_weights={scheme!r} changes the base weight, and before the tokens that invoke aLoRA the "
                "model is to be the base; use True, 'gaussian' or 'orthogonal'"
            )

    def _check_pooling(self) -> None:
        if not self.use_qalora:
            return
        check_integers(self, {"qalora_group_size": self.qalora_group_size})
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ConfigError(
                f"init_lora_weights={self.init_lora_weights!r} has no meaning for QA-LoRA, whose A reads groups of "
                "features; use True, False or 'gaussian'"
            )
        for option in ("lora_bias", "ensure_weight_tying"):
            if getattr(self, option):
                raise ConfigError(
                    f"{option}=True has no meaning with use_qalora=True: PEFT's QA-LoRA has no bias, and none at "
                    "embeddings; unset one of the two"
                )

    def _check_arrow(self) -> None:
        if self.arrow_config is None:
            return
        self.arrow_config = ArrowConfig.from_value(self.arrow_config)
        for option in ("lora_dropout", "lora_bias", "ensure_weight_tying"):
            if getattr(self, option):
                raise ConfigError(
                    f"{option}={getattr(self, option)!r} has no meaning with arrow_config, which routes between "
                    "adapters that are trained already"
                )

    def check_common(self) -> None:
        """Raise ConfigError for illegal values of the fields that AdaLoRA's config has, too."""
        check_probability(self, "lora_dropout")
        check_bias(self, "lora_only")

    @classmethod
    def options_from_tensors(
        cls, modules: Sequence[Mapping[str, Tensor]], shapes: Sequence[Sequence[int]]
    ) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for option, slot in (("use_dora", MAGNITUDE), ("lora_bias", "lora_B.bias")):
            have = sum(slot in m for m in modules)
            if have and have != len(modules):
                raise ConfigError(
                    f"{have} of {len(modules)} modules have {slot!r}, and one adapter has it at all or none"
                )
            out |= {option: True} if have else {}
        return out

    def to_dict(self) -> dict[str, Any]:
        out = super().to_dict()
        if self.arrow_config is not None:
            out["arrow_config"] = asdict(ArrowConfig.from_value(self.arrow_config))
        options = self.data_options()
        return out if options is None else out | {options.option: asdict(options)}

    def adapters_to_write(self, tensors: Mapping[str, Tensor], directory: str) -> Mapping[str, AdapterContent]:
        if self.arrow_config is None:
            return super().adapters_to_write(tensors, directory)
        return {name: (config.to_dict(), own) for name, (config, own) in split_arrow_adapter(self, tensors).items()}

    def pattern_entries(self) -> dict[str, Mapping[str, Any]]:
        return {"rank_pattern": self.rank_pattern or {}, "alpha_pattern": self.alpha_pattern or {}}

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
            lora_bias=bias,
            init_lora_weights=True,
            loftq_config={},
            **{options.option: None for options in DATA_OPTIONS},
            ensure_weight_tying=False,
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
        if self._is_loftq:
            options |= asdict(LoftQConfig.from_value(self.loftq_config))
        if self.alora_invocation_tokens is not None:
            return Alora(**options, tokens=tuple(self.alora_invocation_tokens))
        if self.use_qalora:
            return QaLora(**options, group_size=self.qalora_group_size)
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
