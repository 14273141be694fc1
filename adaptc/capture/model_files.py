"""Read models from transformers directories (``config.json`` and weights) and from GGUF files.

A directory gives the model class that its config names, head included. No code from the directory is run, and nothing
is downloaded.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter_files.stable_read import FileChangedError, OpenedFile, read_json_object
from adaptc.archives.refusal import describe_error
from adaptc.errors import CheckpointError, short_repr

#: the key of a config that says how weights are quantised
QUANTIZATION_CONFIG = "quantization_config"
#: names of tokenizer files
_TOKENIZER_FILES = re.compile(r"tokenizer.*|vocab.*|merges\.txt|.*\.(model|spm|bpe|tiktoken)")
_EXPECTED = "expected a transformers model directory (config.json and weights), or a program (.pt2)"


def read_model(path: Path, dtype: str | None = None) -> Any:
    """Return the model in a directory, in the torch dtype called ``dtype``, or None for the dtype of its files.

    Raises CheckpointError where the directory has no model, or transformers cannot load it.
    """
    kind = _model_class(path)
    try:
        return kind.from_pretrained(path, local_files_only=True, dtype=dtype or "auto")
    except Exception as error:  # transformers, safetensors and torch each have their own types for damaged files
        raise CheckpointError(
            f"transformers cannot load {kind.__name__} from {path}: {short_repr(str(error))}"
        ) from error


def make_model_of(path: Path, state: Mapping[str, Tensor]) -> Any:
    """Return the model that a directory's config describes, with the tensors of ``state``, by the names of its files.

    Tensors of the config's dtype become parameters without being copied. What the config says of quantised weights is
    left out. Raises CheckpointError where there is no config, where transformers cannot make the model, and where
    ``state`` lacks a tensor of it.
    """
    kind = _model_class(path)
    try:
        config = kind.config_class.from_pretrained(path, local_files_only=True)
        if hasattr(config, QUANTIZATION_CONFIG):
            delattr(config, QUANTIZATION_CONFIG)
        options: dict[str, Any] = {"state_dict": dict(state), "dtype": "auto", "output_loading_info": True}
        options["ignore_mismatched_sizes"] = True  # they are refused below, by name
        model, found = kind.from_pretrained(None, config=config, **options)
    except Exception as error:  # as above
        raise CheckpointError(
            f"transformers cannot make {kind.__name__} of {path}: {short_repr(str(error))}"
        ) from error
    for name, found_shape, expected_shape in sorted(found["mismatched_keys"]):
        raise CheckpointError(
            f"{path} has {name!r} of shape {tuple(found_shape)}, and {kind.__name__} with its config has one of "
            f"{tuple(expected_shape)}"
        )
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(f"{path} lacks {missing[0]!r}, which {kind.__name__} needs")
    return model


def read_skeleton(path: Path) -> Any:
    """Return the model that a directory's config describes, on the meta device, without its weights.

    Raises CheckpointError where there is no config, or transformers cannot make the model.
    """
    kind = _model_class(path)
    try:
        with torch.device("meta"):
            return kind(kind.config_class.from_pretrained(path, local_files_only=True))
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot make {kind.__name__} of {path}: {short_repr(str(error))}"
        ) from error


def tokenizer_failure(path: Path, error: Exception) -> str:
    """Return one line on why no tokenizer could be read from ``path``, where ``error`` is what transformers raised.

    For a directory without tokenizer files, transformers' message only says what to install.
    """
    if path.is_dir() and not any(_TOKENIZER_FILES.fullmatch(p.name) for p in path.iterdir()):
        return "no file of one is there"
    return describe_error(error)


def is_gguf(path: Path) -> bool:
    """Return whether the file begins with the GGUF magic bytes; False where it cannot be read."""
    try:
        with OpenedFile(path) as opened, open(opened.fd, "rb", closefd=False) as file:
            return file.read(4) == b"GGUF"
    except (CheckpointError, OSError):
        return False


def read_gguf(path: Path, dtype: str | None = None) -> Any:
    """Return the causal language model in a GGUF file, with weights dequantised to ``dtype``, or to float32 where it is
    None.

    Raises CheckpointError where transformers cannot load the file, or where the package gguf is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"{path} is a GGUF file, which transformers reads with the package gguf: install it")
    import transformers

    options: dict[str, Any] = {"gguf_file": path.name, "dtype": dtype or "float32", "local_files_only": True}
    # Versions of transformers that have this class may keep the file's quantised blocks as weights.
    if (kept := getattr(transformers, "GgufConfig", None)) is not None:
        options["quantization_config"] = kept(dequantize=True)
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options)
    except Exception as error:  # transformers, safetensors, torch and gguf each have their own types for damaged files
        raise CheckpointError(f"transformers cannot load the model in {path}: {short_repr(str(error))}") from error


def read_model_config(path: Path) -> dict[str, Any]:
    """Return the content of a directory's ``config.json``. Raises CheckpointError where there is none, or it is
    damaged."""
    try:
        with OpenedFile(path / "config.json") as file:
            return read_json_object(file)
    except FileChangedError:
        raise CheckpointError(f"there is no model in {path}: {_EXPECTED}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path / 'config.json'} cannot be read ({error}): {_EXPECTED}") from error


def _model_class(path: Path) -> Any:
    """Return the transformers class that a directory's config names.

    Raises CheckpointError where there is no readable config, or it does not name exactly one model class.
    """
    config = read_model_config(path)
    names = config.get("architectures")
    kind = find_model_class(names[0]) if isinstance(names, list) and len(names) == 1 else None
    if kind is None:
        import transformers

        raise CheckpointError(
            f"{path / 'config.json'} names the architectures {short_repr(names)}: expected one class of transformers "
            f"{transformers.__version__}. Load the model in Python, and pass it to adaptc.compile"
        )
    return kind


def find_model_class(name: Any) -> Any:
    """Return the model class of transformers called ``name``; None where there is none."""
    import transformers

    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None
