"""Pass inputs that adapters add to a step, with a value for each row, such as ``task_ids``.

A missing or wrong value raises AdaptcError before a cache is written to. In ``generate`` these inputs are arguments
like the model's own, so transformers repeats them for beams and samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptc.bank.selection import Assignment
from adaptc.errors import AdaptcError
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.passes.protocol.program_method import ProgramMethod
from adaptc.state.bound import Keeping, program_of
from adaptc.state.core import ProgramCore

#: name of a program's input -> name of the caller's argument
Names = Mapping[str, str]


def given_names(runs: Any) -> Names:
    """Return the inputs that adapters at layers added and that ``runs`` uses; empty where it keeps the base."""
    return {} if isinstance(runs, Keeping) and not runs.adapted else _added(runs)


def _added(runs: Any, everywhere: bool = False) -> Names:
    """Return the inputs that adapters at layers added to the program's code, whichever adapter it runs with.

    ``everywhere`` adds the inputs of methods that are not at layers.
    """
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
    """Return the inputs that calls of ``runs`` take, by name."""
    program = program_of(runs)
    if isinstance(program, PackagedProgram):
        return dict(program.inputs.expected)
    if isinstance(runs, Assignment):
        runs = program if runs.adapted else program.base  # rows without any adapter run on the base
    executor = runs.ready().executor
    return {} if executor is None else dict(executor.inputs.expected)


def taken_from(runs: Any, others: dict[str, Any], rows: int) -> dict[str, Tensor]:
    """Remove the adapters' inputs from ``others`` and return them as a step of ``rows`` rows takes them: (rows,),
    int64.

    Inputs that ``runs`` does not use are zeros. Raises AdaptcError for a missing value, or one that is not a whole
    number for each row.
    """
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
    """Add zeros (the first task) for the adapters' inputs to the drawn ``inputs`` of verify's ``options``."""
    names = _added(runs, everywhere=True)
    if not names:
        return options
    expected = _expected(runs)
    for inputs in options["inputs"]:
        sizes = {s: t.shape[i] for n, t in inputs.items() for i, s in enumerate(expected[n].shape) if n in expected}
        for name in names.keys() - inputs.keys():
            inputs[name] = torch.zeros(sizes[expected[name].shape[0]], dtype=torch.int64, device=runs.device)
    return options
