"""Data options: the base class of the options of first values that are made of data, under PEFT's names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from adaptc.errors import ConfigError, did_you_mean, short_repr
from adaptc.value_types import field_rules, validate_option


@dataclasses.dataclass
class DataOptions:
    """The options of one scheme. ``scheme`` is its ``init_lora_weights``, and ``option`` the field of LoraConfig that
    holds them."""

    scheme: ClassVar[str]
    option: ClassVar[str]

    def __post_init__(self) -> None:
        for name, rule in field_rules(type(self)).items():
            setattr(self, name, validate_option(f"{type(self).__name__}.{name}", rule, getattr(self, name)))

    @classmethod
    def from_value(cls, value: Any) -> Self:
        """Return the options for ``value``: an object of this class or of peft's, or the dict that files have.

        Raises ConfigError for any other value, and for a dict with an unknown field.
        """
        if type(value).__name__ == cls.__name__ and not isinstance(value, type):
            value = {f.name: getattr(value, f.name, f.default) for f in dataclasses.fields(cls)}
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"{cls.option} must be of {cls.__name__}, or a dict of its fields, got {short_repr(value)}"
            )
        known = [f.name for f in dataclasses.fields(cls)]
        if odd := next((n for n in value if n not in known), None):
            raise ConfigError(
                f"{cls.option}: {cls.__name__} has no field {short_repr(odd)}{did_you_mean(str(odd), known)}"
            )
        return cls(**value)
