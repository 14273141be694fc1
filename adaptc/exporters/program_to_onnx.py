"""Export programs to ONNX: with the adapter as inputs, or merged into the weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from adaptc.errors import ConfigError, short_repr
from adaptc.exporters.input_description import describe
from adaptc.exporters.onnx_file import check_onnx_path, write_onnx
from adaptc.exporters.plain_program import plain_program
from adaptc.exporters.session import METADATA_KEY
from adaptc.exporters.slot_program import make_slot_program
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.wrapper import ProgramWrapper
from adaptc.progress import stage
from adaptc.state.merge_program import merge_program
from adaptc.state.overrides import check_no_override
from adaptc.training.module_files import check_not_stale

ADAPTERS = ("inputs", "merged")


def export_onnx(
    program: AdaptedProgram, path: str | os.PathLike[str], *, adapters: Literal["inputs", "merged"] = "inputs"
) -> Path:
    """Write a program as an ONNX file that takes any adapter in each call, or has the current one merged in.

    With "inputs", every tensor of an adapter is an input that may be left out. A session that is fed none of them
    computes the base. It takes any rank, and any subset of the sites. The inputs have the keys of PEFT's files, without
    ``base_model.model.``. :func:`save_onnx_adapter` writes adapters for the file, and :func:`onnx_session` runs it.

    The weights lie beside the graph, in a file with ``.data`` added to the name. Neither needs adaptc. Free sizes of
    the program stay free.

    Args:
        program: a program, for "merged" also one without an adapter.
        path: the file to write, whose name ends in ``.onnx``.
        adapters: "inputs" or "merged".

    Returns:
        the path of the file.

    Raises:
        ConfigError: the program has no adapter, or several that act together; it writes to buffers; or it generates.
        MergeError: with "merged", what :func:`merge` raises.
        BackendError: onnx is not installed, or has no operator for one of the program's.
        CheckpointError: the file cannot be written. What was there before stays, here and above.

    Example:
        >>> path = adaptc.exporters.export_onnx(prog, "model.onnx")
        >>> session = adaptc.exporters.onnx_session(path)
        >>> y = session.run({"input": x.numpy()})["output"]
        >>> torch.allclose(torch.from_numpy(y), adaptc.unload(prog)(x), atol=1e-6)
        True
    """
    path, given, asked = Path(path), _untyped(program), _untyped(adapters)
    if isinstance(given, ProgramWrapper):
        raise ConfigError(
            f"a {type(given).__name__} keeps a cache between calls, which an ONNX file of it would not: export a "
            "program of adaptc.compile"
        )
    if not isinstance(given, AdaptedProgram):
        raise ConfigError(f"export_onnx takes what adaptc.compile or adaptc.load gives, not a {type(given).__name__}")
    if asked == "rows":
        raise ConfigError(
            "adapters='rows' is not supported: an ONNX file takes one adapter for all rows of a call. For per-row "
            "adapters package a bank with adaptc.package, or make a call for the rows of each adapter"
        )
    if asked not in ADAPTERS:
        raise ConfigError(f"adapters={short_repr(asked)} is not one of {', '.join(ADAPTERS)}")
    check_onnx_path(path)
    check_no_override(program, "export")
    check_not_stale(program)
    if adapters == "merged":
        return write_onnx(plain_program(program if program.current is None else _merged(program)), path)
    with stage("making the adapter an input"):
        made = make_slot_program(program)
    return write_onnx(made.program, path, made.inputs, made.size_names, {METADATA_KEY: json.dumps(describe(made))})


def _untyped(value: Any) -> Any:
    """Return an argument of a caller, who may give anything."""
    return value


def _merged(program: AdaptedProgram) -> AdaptedProgram:
    return merge_program(program, safe=True, keep_base=True, progress=False)[0]
