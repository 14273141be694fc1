"""Check which options of ``LoraConfig`` go together, and read those that one field groups.

The tables say what each variant of LoRA leaves without a meaning, and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from adaptc.errors import ConfigError
from adaptc.methods._shared.option_checks import OptionGroup, check_integers, warn_unused
from adaptc.methods.lora_family.arrow import ArrowConfig
from adaptc.methods.lora_family.from_data.corda import CordaConfig
from adaptc.methods.lora_family.from_data.data_options import DataOptions
from adaptc.methods.lora_family.from_data.eva import EvaConfig
from adaptc.methods.lora_family.from_data.lora_ga import LoraGAConfig
from adaptc.methods.lora_family.loftq import LoftQConfig
from adaptc.methods.lora_family.variants.bdlora import BdLoraConfig
from adaptc.methods.lora_family.variants.kasa import KasaConfig
from adaptc.methods.lora_family.variants.monteclora import MontecloraConfig
from adaptc.methods.lora_family.variants.velora import VeloraConfig

#: the options of first values that are made of data
DATA_OPTIONS: tuple[type[DataOptions], ...] = (CordaConfig, EvaConfig, LoraGAConfig)
#: the options of variants
VARIANT_OPTIONS: tuple[type[OptionGroup], ...] = (
    BdLoraConfig,
    VeloraConfig,
    MontecloraConfig,
    ArrowConfig,
    KasaConfig,
)
#: fields that each choose a variant of LoRA; at most one may be set
VARIANT_FIELDS = ("use_dora", "alora_invocation_tokens", "use_qalora", *(c.option for c in VARIANT_OPTIONS))

_TIED_APART = "which tied layers have apart"
_NOT_AT_EMBEDDINGS = "which embeddings do not have"
_TRAINED = "with arrow_config, which routes between adapters that are trained already"
_QALORA = "with use_qalora=True: PEFT's QA-LoRA has no bias, and none at embeddings; unset one of the two"
#: option -> why ``ensure_weight_tying`` has no meaning where it is set
_NO_TYING = {
    "use_dora": f"with use_dora=True, {_TIED_APART}",
    "lora_bias": f"with lora_bias=True, {_TIED_APART}",
    "alora_invocation_tokens": f"for aLoRA, {_NOT_AT_EMBEDDINGS}",
    "use_qalora": _QALORA,
    "arrow_config": _TRAINED,
    "kasa_config": "with kasa_config: PEFT has no KaSA at embeddings; unset one of the two",
    "use_bdlora": f"with use_bdlora, whose blocks {_NOT_AT_EMBEDDINGS.removeprefix('which ')}; unset one of the two",
    "velora_config": f"with velora_config, {_NOT_AT_EMBEDDINGS}",
    "monteclora_config": f"with monteclora_config, {_NOT_AT_EMBEDDINGS}",
}
#: option -> why a bias of B has no meaning where it is set
_NO_BIAS = {
    "use_dora": "for DoRA, which scales weights alone; unset one of the two",
    "use_qalora": _QALORA,
    "arrow_config": _TRAINED,
}
#: option -> why A and B begin with plain values where it is set
_PLAIN_INIT = {
    "use_qalora": "for QA-LoRA, whose A reads groups of features",
    "kasa_config": "for KaSA, which puts random singular values between A and B",
    "use_bdlora": "for BD-LoRA, whose factors have blocks",
}


def check_lora_options(config: Any) -> None:
    """Read the groups of options of a ``LoraConfig``, and raise ConfigError for options that do not go together."""
    for group in VARIANT_OPTIONS:
        if (value := getattr(config, group.option)) is not None:
            setattr(config, group.option, group.from_value(value))
    _read_loftq_options(config)
    _read_data_options(config)
    chosen = [name for name in VARIANT_FIELDS if getattr(config, name)]
    for option in [*chosen, "lora_bias"]:
        if not getattr(config, option):
            continue
        if config.ensure_weight_tying and option in _NO_TYING:
            raise ConfigError(f"ensure_weight_tying=True has no meaning {_NO_TYING[option]}")
        if config.lora_bias and option in _NO_BIAS:
            raise ConfigError(f"lora_bias=True has no meaning {_NO_BIAS[option]}")
        if option in _PLAIN_INIT and config.init_lora_weights not in (True, False, "gaussian"):
            raise ConfigError(
                f"init_lora_weights={config.init_lora_weights!r} has no meaning {_PLAIN_INIT[option]}; use True, False "
                "or 'gaussian'"
            )
    _check_single_variants(config)
    if config.lora_bias and not isinstance(config.init_lora_weights, bool):
        raise ConfigError(f"lora_bias=True needs init_lora_weights True or False, got {config.init_lora_weights!r}")
    if config.scheme_name == "mica":
        if config.ensure_weight_tying:
            raise ConfigError(
                "ensure_weight_tying=True has no meaning with init_lora_weights='mica', which freezes B: a tied "
                "layer has the factors of its embedding in the other order, and would train that one"
            )
        chosen.append("init_lora_weights='mica'")
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} are variants of LoRA that do not combine; keep one of them")


def _check_single_variants(config: Any) -> None:
    """Raise ConfigError for what one variant alone refuses."""
    if config.alora_invocation_tokens is not None:
        _check_invocation(config)
    if config.use_qalora:
        check_integers(config, {"qalora_group_size": config.qalora_group_size})
    if config.arrow_config is not None and config.lora_dropout:
        raise ConfigError(f"lora_dropout={config.lora_dropout!r} has no meaning {_TRAINED}")
    blocks = config.use_bdlora
    if config.lora_bias and isinstance(blocks, BdLoraConfig) and blocks.target_modules_bd_b:
        raise ConfigError(
            "lora_bias=True has no meaning with target_modules_bd_b of use_bdlora: PEFT's block-diagonal B has no "
            "bias; unset one of the two"
        )


def _check_invocation(config: Any) -> None:
    tokens = config.alora_invocation_tokens
    if not tokens:
        raise ConfigError("alora_invocation_tokens is empty: name the ids of at least one token, or leave it None")
    check_integers(config, {f"alora_invocation_tokens[{i}]": t for i, t in enumerate(tokens)}, minimum=0)
    if config.scheme_name.startswith(("pissa", "olora", "loftq", "corda", "lora_ga")):
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base weight, and before the tokens that "
            "invoke aLoRA the model is to be the base; use True, 'gaussian' or 'orthogonal'"
        )


def _read_loftq_options(config: Any) -> None:
    """Make ``loftq_config`` a dict, as in PEFT, which files and copies hold as it is."""
    given = config.loftq_config
    has_options = given is not None and not (isinstance(given, Mapping) and len(given) == 0)
    config.loftq_config = asdict(LoftQConfig.from_value(given)) if has_options else {}
    if config.scheme_name == "loftq" and not has_options:
        raise ConfigError(
            "init_lora_weights='loftq' needs its options: loftq_config={'loftq_bits': 4, 'loftq_iter': 1}"
        )
    if has_options and config.scheme_name != "loftq":
        warn_unused(config, ("loftq_config",), "without init_lora_weights='loftq'")
        config.loftq_config = {}


def _read_data_options(config: Any) -> None:
    for options in DATA_OPTIONS:
        value = getattr(config, options.option)
        if options.scheme == config.scheme_name:
            setattr(config, options.option, options() if value is None else options.from_value(value))
        elif value is not None:
            options.from_value(value)
            warn_unused(config, (options.option,), f"without init_lora_weights={options.scheme!r}")
            setattr(config, options.option, None)
    if config.ensure_weight_tying and config.data_options() is not None:
        raise ConfigError(
            f"ensure_weight_tying=True has no meaning with init_lora_weights={config.scheme_name!r}, "
            f"{_NOT_AT_EMBEDDINGS}"
        )
