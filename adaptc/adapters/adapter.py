"""Define an adapter as an object: its config and tensors, outside of any program, with task arithmetic."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter_files.adapter_data import PEFT_KEYS, STATE_DICT_KEYS, AdapterData, LoadedAdapter
from adaptc.adapter_files.check_state_dict import bare_tensors, check_state_dict
from adaptc.adapter_files.directory import check_finite
from adaptc.adapter_files.foreign_file import has_peft_prefix
from adaptc.adapter_files.load import load
from adaptc.adapters.combining.combine_options import CombineOptions, parse_weight
from adaptc.adapters.combining.combine_tensors import combine_tensors
from adaptc.binding.sources.composite_adapters import join_routed
from adaptc.binding.sources.configs import as_config, loaded_config
from adaptc.binding.sources.write_directory import write_with_experts
from adaptc.errors import AdaptcError, CheckpointError, ConfigError
from adaptc.methods import AdapterConfig


@dataclass(frozen=True, eq=False)
class Adapter:
    """The content of a PEFT directory, as an object.

    ``swap``, ``bind``, ``compile`` and ``combine`` take it like a directory, and ``save_adapter`` writes it. Its
    tensors are shared with its maker, and must not be written to.

    ``a + b``, ``a - b``, ``0.5 * a``, ``-a`` and ``a / 2`` are task arithmetic. The changes of the weights are added
    and scaled exactly, so that ranks add up; ``adaptc.combine`` has other ways. Sums of IA3 adapters are sums of their
    factors, as in PEFT.

    Attributes:
        config: the adapter's config, or a dict of its fields.
        tensors: PEFT's keys -> tensors, with or without ``base_model.model.``.
        source: the adapter's name in messages.
        report: for results of :func:`adaptc.convert_to_lora`, :func:`adaptc.subtract_adapter` and
            :func:`adaptc.methods.reduce_intruder_dimension` how near the adapter is to its original; otherwise None.

    Raises:
        CheckpointError: a value is no tensor or not finite.
        ConfigError: the config is not valid.

    Example:
        >>> one, other = (adaptc.Adapter(*lora_weights(seed)) for seed in (0, 1))
        >>> report = adaptc.swap(prog, 0.5 * one + other)
    """

    config: AdapterConfig
    tensors: Mapping[str, Tensor] = field(repr=False)
    source: str = "an adapter"
    report: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        config = as_config(self.config)
        if not isinstance(self.tensors, Mapping) or not self.tensors:
            raise CheckpointError(f"{self.source} has no tensors; expected a dict of them, by PEFT's keys")
        tensors = bare_tensors(check_state_dict(self.tensors, self.source), self.source, config.peft_type)
        check_finite(tensors, self.source)
        object.__setattr__(self, "config", config)
        object.__setattr__(self, "tensors", MappingProxyType({k: t.detach() for k, t in tensors.items()}))

    def __repr__(self) -> str:
        size = sum(t.numel() for t in self.tensors.values())
        return f"<Adapter: {self.config.peft_type}, {len(self.tensors)} tensors, {size:,d} parameters: {self.source}>"

    def __reduce__(self) -> Any:
        return type(self), (self.config, dict(self.tensors), self.source, self.report)

    def as_file(self) -> LoadedAdapter:
        """Return the adapter as one that was loaded, for code that binds adapters."""
        return AdapterData(self.config.to_dict(), self.tensors, self.source)

    def write(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Write the adapter as a PEFT directory.

        Args:
            path: the directory.
            **options: the options of :func:`adaptc.save_adapter` for PEFT directories.

        Returns:
            the path of the directory.

        Raises:
            CheckpointError: the files cannot be written.
        """
        return write_with_experts(path, self.config, self.tensors, **options)

    def to(self, device: torch.device | str) -> Adapter:
        """Return the adapter with its tensors on ``device``.

        Args:
            device: the device.

        Returns:
            another adapter; this one stays where it is.
        """
        return Adapter(self.config, {k: t.to(device) for k, t in self.tensors.items()}, self.source, self.report)

    def __add__(self, other: Any) -> Adapter:
        return _add_signed(self, other, 1.0, "+") if isinstance(other, Adapter) else NotImplemented

    def __sub__(self, other: Any) -> Adapter:
        return _add_signed(self, other, -1.0, "-") if isinstance(other, Adapter) else NotImplemented

    def __mul__(self, weight: Any) -> Adapter:
        if isinstance(weight, (Adapter, Tensor)):
            return NotImplemented
        number = parse_weight(weight, self.source)
        return _weighted_sum([self], [number], f"{number:g} * {_parenthesize(self)}")

    __rmul__ = __mul__

    def __truediv__(self, weight: Any) -> Adapter:
        number = parse_weight(weight, self.source)
        if not number:
            raise ConfigError(f"{self.source} is divided by zero")
        return self * (1 / number)

    def __neg__(self) -> Adapter:
        return _weighted_sum([self], [-1.0], f"-{_parenthesize(self)}")


def _parenthesize(a: Adapter) -> str:
    return f"({a.source})" if " " in a.source else a.source


def _add_signed(a: Adapter, b: Adapter, sign: float, sign_text: str) -> Adapter:
    return _weighted_sum([a, b], [1.0, sign], f"{a.source} {sign_text} {_parenthesize(b)}")


def _weighted_sum(adapters: list[Adapter], weights: list[float], source: str) -> Adapter:
    """Return the exact weighted sum of the adapters, as their method defines it."""
    return Adapter(*combine_tensors(adapters, weights, CombineOptions(), "cat"), source)


def load_adapter(
    path: str | os.PathLike[str],
    *,
    config: Any = None,
    adapter_name: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
) -> Adapter:
    """Load the adapter of a PEFT directory as an object, in memory of its own.

    Args:
        path: the directory.
        config: the config in place of the file's own. It is needed for weights that have none beside them.
        adapter_name: which of several adapters in the directory to take.
        key_mapping: regular expression -> replacement, applied to the keys as :func:`swap` does.

    Returns:
        the adapter, with the tensors of the file in their shapes and dtypes.

    Raises:
        CheckpointError: the file is missing or damaged, or its format needs the model to tell what its keys mean.
        ConfigError: the config is not valid.
        AdaptcError: ``path`` is no path.

    Example:
        >>> adapter = adaptc.load_adapter(adaptc.save_adapter(prog, "my-adapter"))
        >>> adapter.config.r
        2
    """
    if not isinstance(path, (str, os.PathLike)):
        raise AdaptcError(f"load_adapter takes the path of an adapter, not a {type(path).__name__}")
    return adapter_of_data(load(path, adapter_name=adapter_name, key_mapping=key_mapping), config)


def adapter_of_data(data: LoadedAdapter, config: Any = None) -> Adapter:
    """Return the adapter object of an adapter that was loaded; ``config`` counts instead of its own.

    Raises CheckpointError where its keys are not PEFT's, and ConfigError for a state dict without ``config``.
    """
    if data.format != PEFT_KEYS and config is None:
        if data.format == STATE_DICT_KEYS:
            raise ConfigError("a state dict does not say its alpha and what it adapts: say it with config=")
        if not any(map(has_peft_prefix, data.tensors)):
            raise CheckpointError(
                f"{data.path} is not in PEFT's format, and which modules its keys mean is known with the model alone: "
                "compile the model with it, and take prog.bind(path), or save_adapter it as a PEFT directory"
            )
        if data.config is None:
            raise CheckpointError(f"{data.path} has no adapter_config.json beside it; say the config with config=")
    joined = join_routed(data)
    found = loaded_config(joined.config) if config is None else as_config(config)
    return Adapter(found, joined.tensors, data.source)
