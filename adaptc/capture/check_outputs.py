"""Check a program against its model on the example, where code of the model was replaced while it was traced.

A replacement gives the same where it is used as expected. A model may use it in another way, and that must not pass
unseen. Features of images are one tensor in the program, and one for each image in the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from adaptc.capture.check_size_one import joined_outputs, run_without_effects
from adaptc.capture.dynamic_shapes import error_text
from adaptc.capture.model_state import can_run
from adaptc.capture.replacements.general_branches import OutputComparison
from adaptc.capture.run_graph import guarded_module
from adaptc.errors import CaptureError, listing
from adaptc.passes.graph.pytree import pytree

#: torch's message for an assertion on a value that only data tell
_OF_VALUES = re.compile(r"Runtime assertion failed for expression \D*\b(u|zuf)\d+")
#: where code is that stands in for a model's while it is traced
_REPLACEMENTS = str(Path(__file__).parent / "replacements")
#: a program's graph orders sums otherwise than the model: by how much values may differ, of the largest
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def check_same_outputs(
    model: nn.Module, program: ExportedProgram, args: tuple, kwargs: Mapping[str, Any], training: bool
) -> None:
    """Raise CaptureError where ``program`` computes something else than ``model``.

    In train mode, and for tensors without values, nothing is checked.
    """
    if training or not can_run(model, args, kwargs):
        return
    # A step of generation writes to its cache, and both must start from the same one.
    copies = pytree.tree_map_only(Tensor, Tensor.clone, (args, dict(kwargs)))
    with run_without_effects(model) as restore:
        wanted = joined_outputs(model(*copies[0], **copies[1]))
        restore()
        try:
            found = joined_outputs(guarded_module(program)(*args, **kwargs))
        except Exception as error:  # what a wrong graph raises depends on the graph
            raise CaptureError(_difference_text(model, f"the program fails ({error_text(error)})")) from error
    for name, value in wanted.items():
        if name not in found or not _is_close(value, found[name]):
            raise CaptureError(_difference_text(model, f"the program's {name} would differ from the model's"))


def _difference_text(model: nn.Module, what: str) -> str:
    return (
        f"{type(model).__name__} could not be captured: it uses the grids of images, or masks of its own, in a way "
        f"that adaptc does not know, and {what}. Try: adapt the model without images (example_inputs with text alone), "
        "or its parts one by one"
    )


def name_value_checks(program: ExportedProgram) -> None:
    """Let the assertions in ``program`` on the values of inputs say which line of a model made them, or which inputs.

    torch names a symbol that no user has seen.
    """
    for node in program.graph.nodes:
        if str(node.target) != "aten._assert_scalar.default":
            continue
        condition, message = node.args
        lines = _model_lines(node)
        if _OF_VALUES.match(str(message)) and lines and "torch/fx/passes" not in " ".join(lines[-2:]):
            told = f"Runtime assertion failed: the values of the inputs do not pass the check in `{lines[-1].strip()}`"
            node.args = (condition, told)
        elif _OF_VALUES.match(str(message)):
            above = _names_above(condition)
            read = listing(repr(n) for n in program.graph_signature.user_inputs if n in above)
            told = f"Runtime assertion failed: the program was captured for other values of {read or 'its inputs'}"
            node.args = (condition, told)


def _model_lines(node: fx.Node) -> list[str]:
    """Return the lines of a node's stack trace, without frames of the code that stands in for a model's."""
    frames = re.split(r"^(?=  File )", (node.meta.get("stack_trace") or "").rstrip(), flags=re.MULTILINE)
    return "".join(f for f in frames if _REPLACEMENTS not in f).strip().splitlines()


def _names_above(node: Any) -> set[str]:
    """Return the names of the nodes that a node's value is computed of."""
    found, waiting = set[str](), [node]
    while waiting:
        one = waiting.pop()
        if one.name not in found:
            found.add(one.name)
            waiting += one.all_input_nodes
    return found


def _is_close(wanted: Tensor, found: Tensor) -> bool:
    if wanted.shape != found.shape:
        return False
    if not wanted.numel():
        return True
    difference = (wanted - found).abs().max()
    return bool(difference <= _TOLERANCE.get(wanted.dtype, 0.1) * (wanted.abs().max() + 1e-3)) or (
        torch.equal(wanted.isnan(), found.isnan()) and torch.equal(wanted.nan_to_num(), found.nan_to_num())
    )


#: what two runs of a model are compared by
COMPARISON = OutputComparison(joined_outputs, _is_close)
