"""Read what decides how an engine takes an adapter: its config, and the names, shapes and dtypes of its tensors.

The tensors' values are not read, and torch is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptc.adapter_files.format import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, bare_key
from adaptc.adapter_files.locate import describe_directory, locate_adapter, open_config, parse_adapter_config
from adaptc.adapter_files.stable_read import OpenedFile, retry_while_changing
from adaptc.engines.safetensors_header import read_header
from adaptc.errors import CheckpointError, short_repr
from adaptc.patterns import limit_pattern_time, pattern_value

#: the names of LoRA's two factors: of a layer, and of an embedding
FACTOR_NAMES = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


@dataclass(frozen=True)
class TensorFacts:
    """The shape of a tensor, and its dtype as safetensors calls it."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class LoraPair:
    """The two factors of LoRA at ``module``, and whether they are those of an embedding."""

    module: str
    down: TensorFacts
    up: TensorFacts
    is_embedding: bool

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter without the values of its tensors.

    ``config`` is the content of its ``adapter_config.json``. ``tensors`` has the bare keys of PEFT. ``is_directory``
    says that an engine finds it as a PEFT directory.
    """

    source: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorFacts]
    is_directory: bool

    @property
    def method(self) -> str:
        return str(self.config["peft_type"])

    def pairs(self) -> dict[str, LoraPair]:
        """Return the pairs of factors by module. Raises CheckpointError where one of two is missing or no matrix."""
        found: dict[str, LoraPair] = {}
        for key in self.tensors:
            for a, b in FACTOR_NAMES:
                if not key.endswith((f".{a}", f".{b}")):
                    continue
                module = key.removesuffix(f".{a}").removesuffix(f".{b}")
                down, up = self.tensors.get(f"{module}.{a}"), self.tensors.get(f"{module}.{b}")
                if down is None or up is None:
                    lacking = a if down is None else b
                    raise CheckpointError(f"{self.source} has {key!r} and no '{module}.{lacking}' beside it")
                if min(len(down.shape), len(up.shape)) < 2:
                    raise CheckpointError(
                        f"{self.source}: {key!r} is no matrix; its factors have shapes {down.shape} and {up.shape}"
                    )
                found[module] = LoraPair(module, down, up, a == FACTOR_NAMES[1][0])
        return found

    def rank_of(self, module: str) -> int:
        """Return the rank that the config gives to a module, by PEFT's rule."""
        return self._number(pattern_value(self.config.get("rank_pattern"), module, self.config.get("r")), "r")

    def scale_of(self, module: str) -> float:
        """Return the scale that PEFT gives to B A at a module."""
        rank = self.rank_of(module)
        alpha = pattern_value(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha"))
        return self._number(alpha, "lora_alpha") / (rank**0.5 if self.config.get("use_rslora") else rank)

    def default_scale(self) -> float:
        """Return lora_alpha / r of the config, whatever its other options say."""
        return self.alpha() / self._number(self.config.get("r"), "r")

    def alpha(self) -> float:
        return self._number(self.config.get("lora_alpha"), "lora_alpha")

    def _number(self, value: Any, option: str) -> Any:
        kinds = (int,) if option == "r" else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or (option == "r" and value < 1):
            expected = "an integer above 0" if option == "r" else "a number"
            raise CheckpointError(f"{self.source}: {option} must be {expected}, found {short_repr(value)}")
        return value

    def check(self) -> None:
        """Raise CheckpointError where config and tensors do not fit together, and ConfigError for bad patterns."""
        for option in ("rank_pattern", "alpha_pattern"):
            if not isinstance(self.config.get(option) or {}, Mapping):
                raise CheckpointError(f"{self.source}: {option} must be an object of numbers by module name")
        # There the rows of A are those of all experts, and Arrow's own file has no factors of one rank.
        if any(self.config.get(option) for option in ("target_parameters", "arrow_config")):
            return
        with limit_pattern_time():
            for module, pair in self.pairs().items():
                self.scale_of(module)
                if pair.rank != self.rank_of(module):
                    raise CheckpointError(
                        f"{self.source}: {module!r} has rank {self.rank_of(module)} by the config, and the tensors "
                        f"{pair.down.shape} and {pair.up.shape} have rank {pair.rank}"
                    )


def read_facts(path: str | os.PathLike[str]) -> AdapterFacts:
    """Return the facts of a PEFT directory with safetensors.

    Raises CheckpointError where there is none, or it is damaged.
    """
    facts = retry_while_changing(lambda: _read_once(path))
    if facts.method == "LORA":
        facts.check()
    return facts


def _read_once(path: str | os.PathLike[str]) -> AdapterFacts:
    directory = locate_adapter(path, None, None)
    file = directory / SAFETENSORS_WEIGHTS_NAME
    with open_config(directory) as config_file:
        config = parse_adapter_config(config_file)
        if not file.is_file():
            raise CheckpointError(_why_no_file(directory))
        with OpenedFile(file) as opened:
            tensors = {k: TensorFacts(*found) for k, found in read_header(file).items()}
            opened.check_unchanged()
        config_file.check_unchanged()
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors at all")
    bare = {bare_key(key, config["peft_type"]) or key: t for key, t in tensors.items()}
    return AdapterFacts(os.fspath(path), config, bare, is_directory=True)


def _why_no_file(directory: Path) -> str:
    if (directory / WEIGHTS_NAME).is_file():
        return (
            f"{directory / WEIGHTS_NAME} is a pickle, whose shapes are known when it is loaded alone: write the "
            "adapter as safetensors first, adaptc.load_adapter(path).write(other_path)"
        )
    return f"{directory} has no {SAFETENSORS_WEIGHTS_NAME}. {describe_directory(directory)}"
