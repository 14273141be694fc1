"""Write the adapter of a program, of a training module, or of an adapter object (``adaptc.save_adapter``)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptc.adapters.adapter import Adapter
from adaptc.errors import AdaptcError, ConfigError
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.state.adapter_output import write_adapter
from adaptc.state.overrides import check_no_override
from adaptc.training.module_files import check_not_stale, write_module_adapter
from adaptc.training.program_module import ProgramModule


def write_adapter_of(program: Any, path: str | os.PathLike[str], options: Mapping[str, Any]) -> Path:
    """Write the adapter of ``program`` to ``path``, and return the path that was written.

    ``options`` are those of ``adaptc.save_adapter``. Raises ConfigError for options that need a model where there is
    none, and AdaptcError for anything that has no adapter.
    """
    if isinstance(program, Adapter):
        own = ("adapter_name", "safe_serialization", "base_model")
        said = {n: v not in (None, False, "peft") for n, v in options.items() if n not in own}
        if given := [name for name, value in said.items() if value]:
            raise ConfigError(f"{given[0]} needs the model: bind the adapter to a program of it, and save that")
        return program.write(path, **{n: options[n] for n in own})
    if isinstance(program, ProgramModule):
        return write_module_adapter(program, path, **options)
    if not isinstance(program, AdaptedProgram):
        raise AdaptcError(
            f"save_adapter takes what adaptc.compile or program.module() gives, not a {type(program).__name__}; of "
            "what wraps a module, such as DistributedDataParallel, give what is inside"
        )
    check_no_override(program, "save_adapter")
    check_not_stale(program)
    return write_adapter(program, path, **options)
