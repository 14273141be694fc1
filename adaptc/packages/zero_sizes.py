"""Find the sizes of zero that compiled code must not be given, since it would divide by them and end the process.

The results are conditions on the sizes of calls, as ``torch.export`` writes them. They exclude each size of zero at
which the graph itself fails. They exclude attention over no tokens, too: torch's CPU kernel divides by the length.
Nothing is computed to find them.

Private torch use, with the public route that was tried:
- ``FakeTensorMode``: operators on tensors without values. Public: the device ``meta``, on which a graph that makes
  tensors on another device fails.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from adaptc.passes.analysis.costs import example_sizes, size_expression
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.runtime.calls.call_inputs import Inputs, TensorInput
from adaptc.runtime.calls.size_conditions import parse_expression


def nonzero_conditions(program: ExportedProgram, inputs: Inputs) -> list[str]:
    """Return one condition for each free size that must not be zero, such as ``L['x'].size()[0] >= 1``."""
    axis_by_size = inputs.size_locations()
    nonzero_sizes = _attention_lengths(program) & axis_by_size.keys()
    nonzero_sizes |= {
        n
        for n in axis_by_size
        if n not in nonzero_sizes and not _runs_with_sizes(program, inputs, {**example_sizes(program), n: 0})
    }
    return [
        f"L['{inputs.expected[i][0]}'].size()[{axis}] >= 1"
        for i, axis in (axis_by_size[n] for n in sorted(nonzero_sizes))
    ]


def _attention_lengths(program: ExportedProgram) -> set[str]:
    """Return the names of the free sizes in the lengths of attention's queries and keys."""
    found: set[str] = set()
    for node in program.graph.nodes:
        if "scaled_dot_product" in str(node.target):
            for operand in node.args[:2]:
                found |= {str(s) for s in size_expression(operand.meta["val"].shape[-2]).free_symbols}
    return found


def _runs_with_sizes(program: ExportedProgram, inputs: Inputs, sizes: dict[str, int]) -> bool:
    """Return whether the graph runs with these sizes (free size -> value), on fake tensors."""
    lifted, mode = LiftedProgram(program, edit=False), FakeTensorMode()
    user_inputs: list[Any] = []
    for _, expected in inputs.expected:
        if isinstance(expected, TensorInput):
            shape = [n if isinstance(n, int) else _evaluate_size(n, sizes) for n in expected.shape]
            with mode:
                expected = torch.empty(shape, dtype=expected.dtype)
        user_inputs.append(expected)
    lifted_values: list[Any] = [lifted.tensor(fqn) for fqn in lifted.placeholders]
    fakes = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in lifted_values]
    try:
        with mode, torch.no_grad():
            program.graph_module.forward(*fakes, *user_inputs)
    except Exception:  # whatever the operators of a graph say of such sizes
        return False
    return True


def _evaluate_size(text: str, sizes: dict[str, int]) -> int:
    function = parse_expression(text)
    try:
        return 1 if function is None else max(int(function(sizes)), 0)
    except (KeyError, ZeroDivisionError):
        return 1
