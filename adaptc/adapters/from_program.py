"""Make adapter objects of programs, of their bindings, and of other forms of adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptc.adapter_files.adapter_data import STATE_DICT_KEYS
from adaptc.adapter_files.load import has_tensors, load
from adaptc.adapters.adapter import Adapter, adapter_of_data
from adaptc.binding.bind import file_tensors
from adaptc.binding.bind_adapter import Bindable
from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError, ConfigError
from adaptc.program.wrapper import unwrap
from adaptc.state.adapter_output import prepare_for_file
from adaptc.state.core import ProgramCore
from adaptc.state.graph_engine import graph_runner
from adaptc.state.runner import Runner


def as_adapter_object(adapter: Any, *, config: Any = None, key_mapping: Mapping[str, str] | None = None) -> Adapter:
    """Return the adapter object for an adapter in any form. ``config`` is for state dicts.

    Raises ConfigError for a state dict without it, and AdaptcError for anything that is no adapter.
    """
    if isinstance(adapter, Adapter):
        return adapter
    if has_tensors(adapter):
        data = load(adapter, key_mapping=key_mapping)
        return adapter_of_data(data, config if data.format == STATE_DICT_KEYS else None)
    adapter = unwrap(adapter)
    if isinstance(adapter, ProgramCore) or graph_runner(adapter) is not None:
        return adapter_of_program(*program_and_binding(adapter))
    if isinstance(adapter, Binding):
        raise AdaptcError(
            "a Binding alone does not know its program; give what prog.bind(...) returned, or the program"
        )
    raise AdaptcError(
        f"an adapter is a directory, a state dict (with config=), an adaptc.Adapter, a program, or what prog.bind "
        f"returned; got {type(adapter).__name__}"
    )


def program_and_binding(adapter: ProgramCore | Runner) -> tuple[ProgramCore, Binding]:
    """Return the program and the binding of ``adapter``. Raises ConfigError where that has no adapter, or several."""
    program = adapter if isinstance(adapter, ProgramCore) else adapter.program
    binding = adapter.binding
    if not binding.values:
        raise ConfigError("this is the base, which has no adapter")
    if binding.joint_adapters:
        raise ConfigError(
            f"several adapters act together here, {list(binding.joint_adapters)}; write the ones that are meant with "
            "adaptc.save_adapter(prog, path, adapter_name=...)"
        )
    return program, binding


def adapter_of_program(program: Bindable, binding: Binding) -> Adapter:
    """Return the binding's adapter with the scale that it was made with, whatever its scale is now.

    The tensors are the program's own.
    """
    binding = prepare_for_file(binding)
    return Adapter(binding.config, file_tensors(program.spec(), binding), binding.source or "the program's adapter")
