"""Store the weights of a model, or of a program, in few bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from adaptc.errors import ConfigError
from adaptc.generation.generator import Generator
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.quantize_weights_of import QuantizeOptions, quantize_module, quantize_program
from adaptc.program.wrapper import ProgramWrapper, accepts_wrappers
from adaptc.reports.results import QuantizeReport
from adaptc.value_types import validates_options

M = TypeVar("M", AdaptedProgram, Generator, nn.Module)


@validates_options("scheme", "group_size", "target_modules", "exclude", "progress")
def quantize(
    model: M,
    scheme: str,
    *,
    group_size: int | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
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
        target_modules: which layers, as in configs. "all-linear" leaves out the output layer; embeddings are quantised
            where they are named.
        exclude: layers to leave out, as ``exclude_modules`` in configs.
        progress: whether to show a bar on a terminal from the start.

    Returns:
        the model itself, or a new program.

    Raises:
        ConfigError: the scheme is unknown, cannot store a weight, or a weight is quantised already.
        TargetError: an entry of the targets matches nothing.

    Example:
        >>> small = adaptc.quantize(adaptc.compile(lm, LoraConfig(r=2, target_modules=["q_proj"])), "int8")
        >>> small.quantize_report.bytes_after < small.quantize_report.bytes_before
        True
    """
    options = QuantizeOptions(scheme, group_size, target_modules, exclude)
    if isinstance(model, ProgramWrapper | AdaptedProgram):
        return _quantize_program(model, options, progress)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"quantize takes an nn.Module, a program or a generator, not a {type(model).__name__}")
    report = QuantizeReport(quantize_module(model, options, progress))
    object.__setattr__(model, "quantize_report", report)
    return model


@accepts_wrappers
def _quantize_program(program: Any, options: QuantizeOptions, progress: bool) -> Any:
    new, rows = quantize_program(program, options, progress)
    new.quantize_report = QuantizeReport(rows)
    return new
