"""Models from transformers' directories (``config.json`` and weights), as ``model.save_pretrained`` writes them.

Before: a directory. After: the model that its config names, with its head, or an error; no code of the directory was
run, and nothing was fetched.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from adaptc.errors import CheckpointError, shown

_EXPECTED = "expected a transformers model directory (config.json and weights), or a program (.pt2)"


def read_model(path: Path) -> Any:
    """The model in a directory. Raises CheckpointError where there is none, or where transformers cannot load it."""
    kind = _class(path)
    try:
        return kind.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers, safetensors and torch each have their own types for damaged files
        raise CheckpointError(f"transformers cannot load {kind.__name__} from {path}: {shown(str(error))}") from error


def read_skeleton(path: Path) -> Any:
    """The same model without its weights (on the device meta), of its config alone."""
    kind = _class(path)
    try:
        with torch.device("meta"):
            return kind(kind.config_class.from_pretrained(path, local_files_only=True))
    except Exception as error:
        raise CheckpointError(f"transformers cannot make {kind.__name__} of {path}: {shown(str(error))}") from error


def _class(path: Path) -> Any:
    """The class of transformers that a directory's config names."""
    try:
        config = json.loads((path / "config.json").read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"there is no model in {path}: {_EXPECTED}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / 'config.json'} cannot be read ({shown(str(error))}): {_EXPECTED}") from error
    names = config.get("architectures") if isinstance(config, dict) else None
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    import transformers

    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{path / 'config.json'} names the architectures {shown(names)}: expected one class of transformers "
            f"{transformers.__version__}. Load the model in Python, and pass it to adaptc.compile"
        )
    return kind
