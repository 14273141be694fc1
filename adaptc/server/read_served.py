"""Read the model that a server serves: a transformers directory, a GGUF file, or a saved program or package.

Only local files are read. No code in them runs, except for a package, which is machine code. An error says what is
missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaptc.api.quantize import check_scheme_name, quantize_read_model
from adaptc.api.save_and_load import load, load_package
from adaptc.archives.archive import is_package
from adaptc.capture.model_files import is_gguf, read_gguf, read_model, tokenizer_failure
from adaptc.errors import AdaptcError, CheckpointError, ConfigError, short_repr
from adaptc.runtime.options import RunOptions


@dataclass(frozen=True)
class ModelOptions:
    """The options with which a served model is opened; None leaves an option to the model."""

    backend: str = "eager"
    device: str | None = None
    dtype: str | None = None
    tokenizer: Path | None = None
    quantize: str | None = None
    autocast_adapter_dtype: bool = True

    def __post_init__(self) -> None:
        RunOptions(self.backend, None, True)  # raises for a wrong backend before a model is read
        if self.dtype is not None and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ConfigError(f"dtype={short_repr(self.dtype)} is no dtype of torch: give float32, bfloat16 or float16")
        if self.quantize is not None:
            check_scheme_name(self.quantize)


def read_model_and_tokenizer(path: Path, options: ModelOptions) -> tuple[Any, Any]:
    """Return the model in a transformers directory or a GGUF file, on its device, and its tokenizer.

    Raises CheckpointError, and ConfigError for options that do not fit.
    """
    check_model_path(path)
    tokenizer = read_tokenizer(options.tokenizer or path)  # the quicker one first
    return read_plain_model(path, options), tokenizer


def read_plain_model(path: Path, options: ModelOptions) -> Any:
    """Return the model in a transformers directory or a GGUF file, on its device. Raises as
    :func:`read_model_and_tokenizer`."""
    check_model_path(path)
    model = read_gguf(path, options.dtype) if is_gguf(path) else read_model(path, options.dtype)
    _check_decoder_only(path, model.config)
    if options.quantize is not None:
        model = quantize_read_model(model, options.quantize, path)
    if options.device is not None:
        model.to(_usable_device(options.device))
    return model


def check_model_path(path: Path) -> None:
    """Raise CheckpointError where neither a directory nor a GGUF file is there."""
    if not path.is_dir() and not is_gguf(path):
        raise CheckpointError(f"there is no model at {path}: give a transformers model directory, or a GGUF file")


def read_saved_and_tokenizer(path: Path, options: ModelOptions, check: Callable[[Path, Any], None]) -> tuple[Any, Any]:
    """Return what a program file or a package holds, and its tokenizer: its own, or that of the directory it is in.

    ``check`` raises for what the caller does not take. Raises CheckpointError, and ConfigError for options that are
    settled when a program is made.
    """
    fixed, own = ["dtype", "quantize", "autocast_adapter_dtype"], None
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
    return found, own or read_tokenizer(options.tokenizer or path.parent)


def _refuse_fixed_options(options: ModelOptions, *names: str) -> None:
    """Raise ConfigError for options that are settled when a program is made."""
    for name in names:
        if getattr(options, name) != getattr(ModelOptions(), name):
            raise ConfigError(f"{name} is part of a saved program: leave it out, or give the model it was made of")


def _check_decoder_only(path: Path, config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{path} holds a model with an encoder ({config.model_type}), which no server takes: use gen.generate of "
            "adaptc.compile_for_generation"
        )


def _usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={short_repr(name)} cannot be used here: {short_repr(str(error))}") from None
    return device


def read_tokenizer(path: Path) -> Any:
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
