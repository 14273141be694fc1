"""Inputs that adapters add to steps, with a value for each row: which task a prompt is of.

Before: what runs a step program, and the arguments of a call of it. After: what each step is given by name; or an error
that says what is missing, and no cache was written to. In ``generate`` they are arguments like the model's own, so
transformers repeats them for beams and samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.packages.run import PackagedProgram
from adaptc.passes.ir.program_method import ProgramMethod
from adaptc.program.assigned import Assignment
from adaptc.program.bound import Keeping, program_of
from adaptc.program.core import ProgramCore

#: name of an input -> what callers know it by
Names = Mapping[str, str]


def given_names(runs: Any) -> Names:
    """The inputs that adapters at layers added to a program, of those that ``runs`` takes; none where it is the base,
    which has no use for them."""
    return {} if isinstance(runs, Keeping) and not runs.adapted else _added(runs)


def _added(runs: Any, everywhere: bool = False) -> Names:
    """All of them that the code takes, whichever adapter it runs with; ``everywhere``: those of what is not at layers,
    too."""
    program = program_of(runs)
    if not isinstance(program, (ProgramCore, PackagedProgram)):
        return {}
    found: dict[str, str] = {}
    for a in program.adaptation.attachments:
        if everywhere or not isinstance(a.method, ProgramMethod):
            found |= {a.reads.get(n, n): n for n in a.method.extras()}
    if not found:
        return {}
    expected = _expected(runs)
    return {m: n for m, n in found.items() if m in expected}


def _expected(runs: Any) -> Mapping[str, Any]:
    """The inputs that calls take, by name."""
    program = program_of(runs)
    if isinstance(program, PackagedProgram):
        return dict(program.inputs.expected)
    if isinstance(runs, Assignment):
        runs = program if runs.adapted else program.base  # what is run where no row has an adapter
    executor = runs.ready().executor
    return {} if executor is None else dict(executor.inputs.expected)


def taken_from(runs: Any, others: dict[str, Any], rows: int) -> dict[str, Tensor]:
    """What a step of so many rows is given, taken out of the other arguments of a call. Raises AdaptcError for what is
    missing, and for what is no value for each row."""
    out: dict[str, Tensor] = {}
    names = given_names(runs)
    values = {n: others.pop(n, None) for n in dict.fromkeys(names.values())}
    for called, name in names.items():
        value = values[name]
        if value is None:
            raise AdaptcError(f"{name} is missing: give a tensor of {rows} whole numbers, one for each row")
        if not isinstance(value, Tensor) or value.ndim != 1 or len(value) != rows or value.is_floating_point():
            found = (
                f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            )
            raise AdaptcError(f"{name} must be a tensor of {rows} whole numbers, one for each row; got {found}")
        out[called] = value.to(runs.device, torch.int64).contiguous()
    for called in _added(runs).keys() - names.keys():
        out[called] = torch.zeros(rows, dtype=torch.int64, device=runs.device)
    return out


def with_given(runs: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Options of verify with such inputs among the drawn ones, of the first task."""
    names = _added(runs, everywhere=True)
    if not names:
        return options
    expected = _expected(runs)
    for inputs in options["inputs"]:
        sizes = {s: t.shape[i] for n, t in inputs.items() for i, s in enumerate(expected[n].shape) if n in expected}
        for name in names.keys() - inputs.keys():
            inputs[name] = torch.zeros(sizes[expected[name].shape[0]], dtype=torch.int64, device=runs.device)
    return options
