"""The table of methods: PEFT's type name -> where its config and method live. Classes are imported when first used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from adaptc.errors import ConfigError
from adaptc.methods._base import AdapterConfig
from adaptc.passes._method import Method

#: peft_type -> "module:ConfigClass"
CONFIGS: dict[str, str] = {
    "LORA": "adaptc.methods.lora:LoraConfig",
    "ADALORA": "adaptc.methods.adalora:AdaLoraConfig",
    "OFT": "adaptc.methods.oft:OFTConfig",
    "BOFT": "adaptc.methods.boft:BOFTConfig",
    "HRA": "adaptc.methods.hra:HRAConfig",
    "VERA": "adaptc.methods.vera:VeraConfig",
    "RANDLORA": "adaptc.methods.randlora:RandLoraConfig",
    "VBLORA": "adaptc.methods.vblora:VBLoRAConfig",
    "LOHA": "adaptc.methods.loha:LoHaConfig",
    "LOKR": "adaptc.methods.lokr:LoKrConfig",
    "IA3": "adaptc.methods.ia3:IA3Config",
    "ROAD": "adaptc.methods.road:RoadConfig",
    "MISS": "adaptc.methods.miss:MissConfig",
    "FOURIERFT": "adaptc.methods.fourierft:FourierFTConfig",
    "WAVEFT": "adaptc.methods.waveft:WaveFTConfig",
    "C3A": "adaptc.methods.c3a:C3AConfig",
    "SHIRA": "adaptc.methods.shira:ShiraConfig",
    "LN_TUNING": "adaptc.methods.ln_tuning:LNTuningConfig",
    "TRAINABLE_TOKENS": "adaptc.methods.trainable_tokens:TrainableTokensConfig",
    # An older name of the same method, which new files do not have.
    "BONE": "adaptc.methods.miss:MissConfig",
}

#: method name in region tags -> "module:Class"
METHODS: dict[str, str] = {
    "lora": "adaptc.methods.lora:Lora",
    "dora": "adaptc.methods.dora:Dora",
    "adalora": "adaptc.methods.adalora:AdaLora",
    "oft": "adaptc.methods.oft:Oft",
    "boft": "adaptc.methods.boft:Boft",
    "hra": "adaptc.methods.hra:Hra",
    "vera": "adaptc.methods.vera:Vera",
    "randlora": "adaptc.methods.randlora:RandLora",
    "vblora": "adaptc.methods.vblora:VBLoRA",
    "loha": "adaptc.methods.loha:LoHa",
    "lokr": "adaptc.methods.lokr:LoKr",
    "ia3": "adaptc.methods.ia3:IA3",
    "road": "adaptc.methods.road:Road",
    "miss": "adaptc.methods.miss:Miss",
    "fourierft": "adaptc.methods.fourierft:FourierFT",
    "waveft": "adaptc.methods.waveft:WaveFT",
    "c3a": "adaptc.methods.c3a:C3A",
    "shira": "adaptc.methods.shira:Shira",
    "stacked": "adaptc.methods.stacked:Stacked",
    "whole": "adaptc.methods.whole:Whole",
    "trainable_tokens": "adaptc.methods.whole:TokenRows",
}


def register_method(config: type[AdapterConfig], method: type[Method]) -> None:
    """Make a method of your own known to ``compile``, ``load`` and adapter files, under ``config.peft_type``.

    ``config`` is a dataclass derived from ``TargetedConfig`` whose ``method(name, kind)`` returns instances of
    ``method``, a frozen dataclass derived from ``Method`` with a ``name`` of its own. Registering a pair twice
    is fine. Raises ConfigError for a name that is taken or missing.
    """
    kind, name = config.peft_type, method.name
    if not kind or kind != kind.upper() or not name:
        raise ConfigError(
            f"{config.__name__}.peft_type must be a name in capitals and {method.__name__}.name must not be empty; "
            f"found {kind!r} and {name!r}"
        )
    for table, key, cls in ((CONFIGS, kind, config), (METHODS, name, method)):
        if key in table and _load(table[key]) is not cls:
            raise ConfigError(f"{key!r} is the name of {table[key]!r} already; choose another")
    for table, key, cls in ((CONFIGS, kind, config), (METHODS, name, method)):
        table[key] = f"{cls.__module__}:{cls.__qualname__}"
        _CLASSES[table[key]] = cls


#: registered classes, which need not be importable by name (they may be local to a script)
_CLASSES: dict[str, Any] = {}


def _load(path: str) -> Any:
    if path in _CLASSES:
        return _CLASSES[path]
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def config_class(peft_type: str) -> type[AdapterConfig]:
    """The config class for a ``peft_type`` as files have it."""
    kind = peft_type.rpartition(".")[2].upper()
    if kind not in CONFIGS:
        raise ConfigError(f"peft_type {peft_type!r} is not supported; supported are {', '.join(sorted(CONFIGS))}")
    return _load(CONFIGS[kind])


def method_of(tag: Mapping[str, Any]) -> Method:
    """The method of a region, from its tag."""
    if tag["method"] not in METHODS:
        raise ConfigError(f"the program holds regions of an unknown method {tag['method']!r}; known: {sorted(METHODS)}")
    return _load(METHODS[tag["method"]]).from_options(tag["options"])
