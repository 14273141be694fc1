"""The table of methods: PEFT's type name -> where its config and method live. Classes are imported when first used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from adaptc.errors import ConfigError
from adaptc.methods._base import AdapterConfig
from adaptc.passes._method import Method

#: peft_type -> "module:ConfigClass"
CONFIGS: dict[str, str] = {"LORA": "adaptc.methods.lora:LoraConfig"}

#: method name in region tags -> "module:Class"
METHODS: dict[str, str] = {
    "lora": "adaptc.methods.lora:Lora",
    "whole": "adaptc.methods.whole:Whole",
    "trainable_tokens": "adaptc.methods.whole:TokenRows",
}


def _load(path: str) -> Any:
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
