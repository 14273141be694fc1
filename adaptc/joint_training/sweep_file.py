"""Read the description of a sweep from a YAML file.

    configs:                      # by name; fields as PEFT has them, and learning_rate
      small: {r: 4}
      dora: {r: 8, use_dora: true, learning_rate: 2e-4}
    defaults:                     # fields of each config that does not have them
      target_modules: [q_proj, v_proj]
    dataset: train.jsonl          # a file beside this one, or a name for the package datasets
    eval_dataset: eval.jsonl
    max_length: 512               # tokens of a row
    steps: 200                    # and the other options of adaptc.training.sweep

A key that means nothing is refused, with the nearest one that does. So is a key that stands twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from adaptc.binding.sources.configs import config_from_fields
from adaptc.errors import CheckpointError, ConfigError, did_you_mean, errors_name, short_repr
from adaptc.joint_training.sweep import SweepOptions
from adaptc.joint_training.text_rows import DatasetSource
from adaptc.torch_typing import is_mapping

_OPTIONS = tuple(f.name for f in fields(SweepOptions))
_KEYS = ("configs", "defaults", "dataset", "eval_dataset", "max_length", *_OPTIONS)
#: numbers as JSON and Python write them; YAML 1.1 takes 1e-4 for a text
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+")


@dataclass(frozen=True)
class SweepPlan:
    """The content of a file: configs by name, its datasets, and the options of :func:`adaptc.training.sweep`.

    ``folder``: the directory of the file. ``max_length``: the most tokens of a row; None for any number.
    """

    folder: Path
    configs: Mapping[str, Any]
    dataset: DatasetSource
    eval_dataset: DatasetSource | None
    max_length: int | None
    options: Mapping[str, Any]


def read_sweep_file(path: Path) -> SweepPlan:
    """Return the sweep that a YAML file describes.

    Raises CheckpointError for a file that cannot be read, ConfigError for a key or a value that means nothing.
    """
    content = _load_yaml(path)
    with errors_name(path.name):
        _check_keys("", content, _KEYS)
        for key in ("configs", "dataset", "steps"):
            if key not in content:
                raise ConfigError(f"{key!r} is missing")
        configs, rates = _read_configs(content)
        options = {k: content[k] for k in _OPTIONS if k in content}
        if rates:
            shared = options.get("learning_rate", SweepOptions(1).learning_rate)
            options["learning_rate"] = {n: rates.get(n, shared) for n in configs}
        length = content.get("max_length")
        if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 2):
            raise ConfigError(f"max_length={short_repr(length)} must be a whole number from 2 upwards")
        checked = SweepOptions(**options)
        for name in configs:
            checked.rate_of(name)
        sources = [_read_source(k, content[k]) for k in ("dataset", "eval_dataset") if content.get(k) is not None]
        if not sources or content["dataset"] is None:
            raise ConfigError("'dataset' is empty: give a file, or a name for the package datasets")
        return SweepPlan(path.parent, configs, sources[0], sources[1] if sources[1:] else None, length, options)


class _Loader(yaml.SafeLoader):
    """A loader of plain data that reads 1e-4 as a number, and refuses a key that stands twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set[Any]()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, [*"-+.0123456789"])


def _load_yaml(path: Path) -> dict[str, Any]:
    """Return the content of a file whose keys are strings."""
    try:
        with path.open("rb") as file:
            content: Any = yaml.load(file, _Loader)
    except OSError as error:
        raise CheckpointError(f"there is no description of a sweep at {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise CheckpointError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not is_mapping(content):
        raise ConfigError(f"{path} is {short_repr(content)}: expected the keys configs, dataset and steps")
    return {**content}


def _check_keys(where: str, found: Any, known: tuple[str, ...]) -> None:
    """Raise ConfigError where ``found`` is no mapping, or has a key that is not among the ``known``."""
    if not is_mapping(found):
        raise ConfigError(f"{where or 'the file'} is {short_repr(found)}: expected fields and their values")
    for key in found:
        if key not in known:
            inside = f" in {where}" if where else ""
            raise ConfigError(f"there is no key {short_repr(key)}{inside}{did_you_mean(str(key), known)}")


def _read_configs(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configs by name, and the learning rates of those that have one of their own."""
    found, defaults = content["configs"], content.get("defaults") or {}
    if not is_mapping(found) or not found:
        raise ConfigError(f"configs is {short_repr(found)}: expected configs by name")
    if not is_mapping(defaults):
        raise ConfigError(f"defaults is {short_repr(defaults)}: expected fields and their values")
    configs, rates = dict[str, Any](), dict[str, Any]()
    for name, own in found.items():
        where = f"configs.{name}"
        if not isinstance(name, str):
            raise ConfigError(
                f"configs has the name {short_repr(name)}, which YAML takes for no text: put it in quotes"
            )
        if own is not None and not is_mapping(own):
            raise ConfigError(f"{where} is {short_repr(own)}: expected fields and their values")
        merged: dict[str, Any] = {**defaults, **(own or {})}
        if "learning_rate" in merged:
            rates[name] = merged.pop("learning_rate")
        with errors_name(where):
            configs[name] = config_from_fields(merged)
    return configs, rates


def _read_source(key: str, value: Any) -> DatasetSource:
    found: Any = {"name": value} if isinstance(value, str) else value
    _check_keys(key, found, tuple(f.name for f in fields(DatasetSource)))
    if not found.get("name") or not all(isinstance(v, str) for v in found.values()):
        raise ConfigError(f"{key} is {short_repr(value)}: expected a name, and texts for config and split")
    return DatasetSource(**found)
