"""Check options and sites as many methods need it, and prepare the input of an adapter around a layer.

Configs are checked for the ranges of integers and probabilities; ``adaptc.value_types`` has checked their types before.
Sites are checked for a weight that is a matrix.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.errors import AdaptcWarning, ConfigError, TargetError, did_you_mean, short_repr
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import Method
from adaptc.value_types import field_rules, validate_option


@dataclass
class OptionGroup:
    """Options that one field of a config holds, as PEFT groups some; ``option`` is the name of that field.

    Raises ConfigError for values of another type than the annotations say.
    """

    option: ClassVar[str]

    def __post_init__(self) -> None:
        for name, rule in field_rules(type(self)).items():
            setattr(self, name, validate_option(f"{type(self).__name__}.{name}", rule, getattr(self, name)))

    @classmethod
    def from_value(cls, value: Any) -> Self:
        """Return the group for ``value``: one of this class, peft's of the same name, or the dict that files have.

        Raises ConfigError for any other value, and for a dict with an unknown field.
        """
        known = {f.name: f for f in fields(cls)}
        if type(value).__name__ == cls.__name__ and is_dataclass(value):
            value = {name: getattr(value, name, _default(f)) for name, f in known.items()}
        if not isinstance(value, Mapping):
            article = "an" if cls.__name__[0] in "AEIO" else "a"
            raise ConfigError(
                f"{cls.option} must be {article} {cls.__name__}, or a dict of its fields, got {short_repr(value)}"
            )
        if odd := next((n for n in value if n not in known), None):
            raise ConfigError(
                f"{cls.option}: {cls.__name__} has no field {short_repr(odd)}{did_you_mean(str(odd), list(known))}"
            )
        return cls._of_fields(dict(value))

    @classmethod
    def _of_fields(cls, values: dict[str, Any]) -> Self:
        return cls(**values)


def _default(f: Field[Any]) -> Any:
    return None if f.default is MISSING else f.default


def check_integers(config: Any, values: Mapping[str, Any], minimum: int = 1) -> None:
    """Raise ConfigError where one of ``values`` (option -> integer) is less than ``minimum``."""
    what = "a positive integer" if minimum == 1 else f"an integer of at least {minimum}"
    for name, value in values.items():
        if value < minimum:
            raise ConfigError(f"{type(config).__name__}.{name} must be {what}, got {value!r}")


def refuse_unless_positive(config: Any, *options: str) -> None:
    """Raise ConfigError where one of ``options`` is zero or negative."""
    for option in options:
        if not getattr(config, option) > 0:
            raise ConfigError(f"{type(config).__name__}.{option} must be positive, got {getattr(config, option)!r}")


def check_ranks(config: Any) -> None:
    """Raise ConfigError where ``r``, or a rank in ``rank_pattern``, is not positive."""
    patterns = {f"rank_pattern[{k!r}]": v for k, v in (config.rank_pattern or {}).items()}
    check_integers(config, {"r": config.r, **patterns})


def check_probability(config: Any, *options: str, allow_one: bool = False) -> None:
    """Raise ConfigError where one of ``options`` is no probability. ``allow_one``: whether it may be 1."""
    for option in options:
        value = getattr(config, option)
        if not 0.0 <= value <= 1.0 or (value == 1.0 and not allow_one):
            raise ConfigError(
                f"{type(config).__name__}.{option} must lie in {'[0, 1]' if allow_one else '[0, 1)'}, got {value!r}"
            )


def warn_unused(config: Any, options: Collection[str], reason: str) -> None:
    """Warn of each of ``options`` that is set and has no effect; ``reason`` ends the message.

    It is no error, since files of PEFT may set these options. The warning names the caller of the config's constructor.
    """
    usual = {f.name: f.default for f in fields(config)}
    said = [f"{n}={short_repr(getattr(config, n))}" for n in options if getattr(config, n) != usual[n]]
    if said:
        warnings.warn(f"{type(config).__name__}: {', '.join(said)} has no effect {reason}", AdaptcWarning, stacklevel=4)


def check_bias(config: Any, own_value: str) -> None:
    """Raise ConfigError where ``bias`` is not one of "none", "all" and ``own_value``."""
    if config.bias not in ("none", "all", own_value):
        raise ConfigError(f"{type(config).__name__}.bias must be 'none', 'all' or {own_value!r}, got {config.bias!r}")


def check_matrix(method: str, op: Op) -> None:
    """Raise TargetError at a weight with fewer than two axes."""
    if len(op.shape) < 2:
        raise TargetError(f"{method} needs a weight with two axes or more, and this one has shape {op.shape}")


def applies_dropout(method: Method, op: Op) -> bool:
    """Return whether ``method`` applies dropout to the input of ``op``. An embedding's input is indices: no dropout."""
    return method.drops_input() and op.kind != "embedding"


def prepare_adapter_input(method: Method, op: Op, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the layer's input in ``dtype``, the adapter's, with the method's dropout in training."""
    x = op.cast_input(x, dtype)
    return F.dropout(x, method.dropout, training=True) if applies_dropout(method, op) else x


def is_in_training(like: Tensor) -> Tensor:
    """Return whether the program is in training now, as a bool (), on the device of ``like``; for code of training.

    Dropout of probability 1 draws nothing: it is 0 in training and 1 in inference. Programs switch it, as they switch
    dropout.
    """
    return F.dropout(torch.ones((), dtype=torch.float32, device=like.device), 1.0, training=True) == 0
