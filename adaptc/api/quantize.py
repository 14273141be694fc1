"""Store the weights of a model, or of a program, in few bits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from adaptc.capture.model_files import is_gguf
from adaptc.errors import ConfigError, short_repr
from adaptc.generation.generator import Generator
from adaptc.passes.quantized.all_schemes import choose_scheme
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.quantize_weights_of import QuantizeOptions, quantize_module, quantize_program
from adaptc.program.wrapper import ProgramWrapper, accepts_wrappers
from adaptc.reports.results import QuantizeReport
from adaptc.value_types import validates_options

M = TypeVar("M", AdaptedProgram, Generator, nn.Module)


@validates_options("scheme", "group_size", "target_modules", "exclude", "progress")
def quantize(
    model: M,
    scheme: str | None = None,
    *,
    group_size: int | None = None,
    target_modules: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    gguf_file: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> M:
    """Return a model or a program whose chosen weights are stored in few bits.

    Everything goes on working on it: adapters are compiled into it, swapped, trained, merged and saved. A weight has
    the values of its scheme from then on. The ``quantize_report`` of the result has the error and the bytes of each.

    Args:
        model: an ``nn.Module``, whose parameters are replaced in the model itself; or a program or a generator, which
            stays as it is, and of which another one is made.
        scheme: "int8": one scale for each output. "int8_dynamic": the same weights, and inputs that are rounded to int8
            in each call, which is the fastest for long inputs. "int4": a scale and a zero for each group of inputs.
            "nf4" and "fp4": sixteen values, scaled by blocks, with quantised scales (QLoRA).
        group_size: the number of inputs that share a scale. The default is a row for int8, and 64 elements for nf4 and
            fp4. For int4 it is the largest divisor of the layer's inputs up to 32.
        target_modules: which layers, as in configs. The default is "all-linear", which leaves out the output layer;
            embeddings are quantised where they are named. With ``gguf_file``, it is every weight that the file stores
            in blocks.
        exclude: layers to leave out, as ``exclude_modules`` in configs.
        gguf_file: the path of the GGUF file that the model was loaded from. Weights get the file's own blocks, so no
            value changes. It takes the place of ``scheme``.
        progress: whether to show a bar on a terminal from the start.

    Returns:
        the model itself, or a new program.

    Raises:
        ConfigError: the scheme is unknown, cannot store a weight, or a weight is quantised already.
        TargetError: an entry of the targets matches nothing, or a named layer has no blocks in ``gguf_file``.
        CheckpointError: ``gguf_file`` cannot be read, or no weight has values of it.

    Warns:
        AdaptcWarning: the file stores matrices that are no weight of the model, or in blocks that are not read.

    Example:
        >>> small = adaptc.quantize(adaptc.compile(lm, LoraConfig(r=2, target_modules=["q_proj"])), "int8")
        >>> small.quantize_report.bytes_after < small.quantize_report.bytes_before
        True
    """
    if not isinstance(gguf_file, str | os.PathLike | None):
        raise ConfigError(f"gguf_file={short_repr(gguf_file)}: the path of the GGUF file that the model was read from")
    gguf_file = None if gguf_file is None else os.fspath(gguf_file)
    options = QuantizeOptions(scheme, group_size, target_modules, exclude, gguf_file)
    if isinstance(model, ProgramWrapper | AdaptedProgram):
        return _quantize_program(model, options, progress)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"quantize takes an nn.Module, a program or a generator, not a {type(model).__name__}")
    report = QuantizeReport(quantize_module(model, options, progress))
    object.__setattr__(model, "quantize_report", report)
    return model


#: the name, in options of commands, of the blocks of the GGUF file that a model is read from
FILE_BLOCKS = "file"


def check_scheme_name(scheme: str) -> None:
    """Raise ConfigError where ``scheme`` is no option of a command: the name of a scheme, or "file"."""
    if scheme != FILE_BLOCKS:
        choose_scheme(scheme, None, columns=1)


def quantize_read_model(model: M, scheme: str, path: Path) -> M:
    """Return a model or program that was read from ``path`` with its weights stored by ``scheme``.

    ``scheme`` is one of :func:`quantize`, or "file" for the blocks that a GGUF file has. Raises ConfigError for "file"
    with anything else, and what :func:`quantize` raises.
    """
    check_scheme_name(scheme)
    if scheme != FILE_BLOCKS:
        return quantize(model, scheme)
    if not is_gguf(path):
        raise ConfigError(f"{FILE_BLOCKS!r} keeps the blocks of a GGUF file, and {path} is none: name a scheme")
    return quantize(model, gguf_file=path)


@accepts_wrappers
def _quantize_program(program: Any, options: QuantizeOptions, progress: bool) -> Any:
    new, rows = quantize_program(program, options, progress)
    new.quantize_report = QuantizeReport(rows)
    return new
