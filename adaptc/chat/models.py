"""Open the model of a chat: a transformers directory, a GGUF file, or a saved program or package that generates.

Only local files are read. No code in them runs, except for a package, which is machine code. An error says what is
missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adaptc.api.quantize import check_scheme_name, quantize_read_model
from adaptc.api.save_and_load import load, load_package
from adaptc.capture.model_files import is_gguf, read_gguf, read_model, tokenizer_failure
from adaptc.errors import AdaptcError, CheckpointError, ConfigError, short_repr
from adaptc.generation.compile_generation import compile_for_generation
from adaptc.generation.generator import Generator
from adaptc.methods.lora_family.lora_config import LoraConfig
from adaptc.packages.manifest import is_package
from adaptc.runtime.options import RunOptions

#: the config that a model is captured with when no adapter is named: most adapters fit it, with any rank
_DEFAULT_CONFIG = LoraConfig(r=8, target_modules="all-linear")


@dataclass(frozen=True)
class ModelOptions:
    """The options with which a chat's model is opened; None leaves an option to the model."""

    max_length: int | None = None
    backend: str = "eager"
    device: str | None = None
    dtype: str | None = None
    tokenizer: Path | None = None
    quantize: str | None = None

    def __post_init__(self) -> None:
        RunOptions(self.backend, None, True)  # raises for a wrong backend before a model is read
        if self.dtype is not None and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ConfigError(f"dtype={short_repr(self.dtype)} is no dtype of torch: give float32, bfloat16 or float16")
        if self.quantize is not None:
            check_scheme_name(self.quantize)


@dataclass(frozen=True, eq=False)
class OpenedModel:
    """The opened model of a chat.

    ``generators`` has the programs that exist already, and ``bundled_adapters`` the adapters that came with them, by
    name. ``capture(adapter)`` makes a further program of the same weights, for an adapter that no existing program
    takes. ``capture(None)`` makes one that most adapters fit. ``capture`` is None where there is no model to capture.
    """

    tokenizer: Any
    capture: Callable[[Any], Generator] | None
    generators: tuple[Generator, ...] = ()
    bundled_adapters: Mapping[str, Any] = field(default_factory=dict)


def open_model(path: Path, options: ModelOptions) -> OpenedModel:
    """Open what is at ``path``; see the module docstring. Raises CheckpointError, and ConfigError for options that do
    not fit."""
    if path.is_dir() or is_gguf(path):
        return _open_model_files(path, options)
    if not path.is_file():
        raise CheckpointError(
            f"there is no model at {path}: give a transformers model directory, a GGUF file, or a program (.pt2) of "
            "adaptc.compile_for_generation"
        )
    return _open_saved(path, options)


def read_model_and_tokenizer(path: Path, options: ModelOptions) -> tuple[Any, Any]:
    """Return the model in a transformers directory or a GGUF file, on its device, and its tokenizer.

    Raises CheckpointError, and ConfigError for options that do not fit.
    """
    if not path.is_dir() and not is_gguf(path):
        raise CheckpointError(f"there is no model at {path}: give a transformers model directory, or a GGUF file")
    tokenizer = _load_tokenizer(options.tokenizer or path)  # the quicker one first
    model = read_gguf(path, options.dtype) if is_gguf(path) else read_model(path, options.dtype)
    _check_decoder_only(path, model.config)
    if options.quantize is not None:
        model = quantize_read_model(model, options.quantize, path)
    if options.device is not None:
        model.to(_usable_device(options.device))
    return model, tokenizer


def _open_model_files(path: Path, options: ModelOptions) -> OpenedModel:
    model, tokenizer = read_model_and_tokenizer(path, options)

    def capture(adapter: Any) -> Generator:
        return compile_for_generation(
            model,
            _DEFAULT_CONFIG if adapter is None else adapter,
            max_batch=1,
            max_length=options.max_length,
            backend=options.backend,
        )

    return OpenedModel(tokenizer, capture)


def _open_saved(path: Path, options: ModelOptions) -> OpenedModel:
    generator, tokenizer = read_saved_and_tokenizer(path, options, _check_generates)
    binding = generator.program.binding
    own = {"own": binding} if (binding.methods if is_package(path) else binding) else {}
    return OpenedModel(tokenizer, None, (generator,), own)


def read_saved_and_tokenizer(path: Path, options: ModelOptions, check: Callable[[Path, Any], None]) -> tuple[Any, Any]:
    """Return what a program file or a package holds, and its tokenizer: its own, or that of the directory it is in.

    ``check`` raises for what the caller does not take. Raises CheckpointError, and ConfigError for options that are
    settled when a program is made.
    """
    fixed, own = ["max_length", "dtype", "quantize"], None
    if is_package(path):
        _refuse_fixed_options(options, *fixed, "device", "backend")
        found: Any = load_package(path)
        check(path, found)
        own = found.tokenizer if options.tokenizer is None else None
    else:
        _refuse_fixed_options(options, *fixed)
        device = None if options.device is None else _usable_device(options.device)
        found = load(path, backend=options.backend, device=device)
        check(path, found)
    return found, own or _load_tokenizer(options.tokenizer or path.parent)


def _refuse_fixed_options(options: ModelOptions, *names: str) -> None:
    """Raise ConfigError for options that are settled when a program is made."""
    for name in names:
        if getattr(options, name) != getattr(ModelOptions(), name):
            raise ConfigError(f"{name} is part of a saved program: leave it out, or give the model it was made of")


def _check_generates(path: Path, generator: Any) -> None:
    if not isinstance(generator, Generator):
        raise CheckpointError(
            f"{path} holds a program that does not generate: give the model's directory, or save one of "
            "adaptc.compile_for_generation"
        )
    _check_decoder_only(path, generator.config)


def _check_decoder_only(path: Path, config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{path} holds a model with an encoder ({config.model_type}), which answers one text at a time: use "
            "gen.generate of adaptc.load or adaptc.load_package; a chat goes on with what was said"
        )


def _usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={short_repr(name)} cannot be used here: {short_repr(str(error))}") from None
    return device


def _load_tokenizer(path: Path) -> Any:
    """Return the tokenizer in a directory or inside a GGUF file. Raises CheckpointError where there is none that
    loads."""
    from transformers import AutoTokenizer

    inside = is_gguf(path)
    folder, more = (path.parent, {"gguf_file": path.name}) if inside else (path, {})
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **more)
    except AdaptcError:
        raise
    except Exception as error:  # tokenizers, sentencepiece and json raise types of their own
        raise CheckpointError(
            f"there is no tokenizer in {path} that transformers can load: write one there "
            f"(tokenizer.save_pretrained(...)), or name its directory with --tokenizer "
            f"({tokenizer_failure(path, error)})"
        ) from error
