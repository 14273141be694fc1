"""Pass inputs that adapters add to a step, with a value for each row, such as ``task_ids``.

A missing or wrong value raises AdaptcError before a cache is written to. In ``generate`` these inputs are arguments
like the model's own, so transformers repeats them for beams and samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.generation.spec import StepRunner
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.passes.protocol.program_method import ProgramMethod
from adaptc.state.core import ProgramCore
from adaptc.state.runner import Runner, program_of

#: name of a program's input -> name of the caller's argument
InputNames = Mapping[str, str]


def used_input_names(runner: StepRunner) -> InputNames:
    """Return the inputs that adapters at layers added and that ``runner`` uses; empty where it keeps the base."""
    return {} if isinstance(runner, Runner) and not runner.has_adapter else _added_inputs(runner)


def _added_inputs(runner: StepRunner, all_methods: bool = False) -> InputNames:
    """Return the inputs that adapters at layers added to the program's code, whichever adapter it runs with.

    ``all_methods`` adds the inputs of methods that are not at layers.
    """
    program = program_of(runner)
    if not isinstance(program, (ProgramCore, PackagedProgram)):
        return {}
    found: dict[str, str] = {}
    for a in program.adaptation.attachments:
        if all_methods or not isinstance(a.method, ProgramMethod):
            found |= {a.reads.get(n, n): n for n in a.method.extra_inputs.extras()}
    if not found:
        return {}
    expected = expected_inputs(runner)
    return {m: n for m, n in found.items() if m in expected}


def expected_inputs(runner: StepRunner) -> Mapping[str, Any]:
    """Return the inputs that calls of ``runner`` take, by name."""
    program = program_of(runner)
    if isinstance(program, PackagedProgram):
        return dict(program.inputs.expected)
    if isinstance(runner, Runner):
        return runner.expected_inputs
    assert isinstance(program, ProgramCore)
    return dict(program.executor().inputs.expected)


def pop_step_inputs(runner: StepRunner, kwargs: dict[str, Any], rows: int) -> dict[str, Tensor]:
    """Remove the adapters' inputs from ``kwargs`` and return them as a step of ``rows`` rows takes them: (rows,),
    int64.

    Inputs that ``runner`` does not use are zeros. Raises AdaptcError for a missing value, or one that is not a whole
    number for each row.
    """
    step_inputs: dict[str, Tensor] = {}
    names = used_input_names(runner)
    values = {n: kwargs.pop(n, None) for n in dict.fromkeys(names.values())}
    for input_name, name in names.items():
        value = values[name]
        if value is None:
            raise AdaptcError(f"{name} is missing: give a tensor of {rows} whole numbers, one for each row")
        if not isinstance(value, Tensor) or value.ndim != 1 or len(value) != rows or value.is_floating_point():
            found = (
                f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            )
            raise AdaptcError(f"{name} must be a tensor of {rows} whole numbers, one for each row; got {found}")
        step_inputs[input_name] = value.to(runner.device, torch.int64).contiguous()
    for input_name in _added_inputs(runner).keys() - names.keys():
        step_inputs[input_name] = torch.zeros(rows, dtype=torch.int64, device=runner.device)
    return step_inputs


def with_zero_inputs(runner: StepRunner, options: dict[str, Any]) -> dict[str, Any]:
    """Add zeros (the first task) for the adapters' inputs to the drawn ``inputs`` of verify's ``options``."""
    names = _added_inputs(runner, all_methods=True)
    if not names:
        return options
    expected = expected_inputs(runner)
    for inputs in options["inputs"]:
        sizes = {s: t.shape[i] for n, t in inputs.items() for i, s in enumerate(expected[n].shape) if n in expected}
        for name in names.keys() - inputs.keys():
            inputs[name] = torch.zeros(sizes[expected[name].shape[0]], dtype=torch.int64, device=runner.device)
    return options
