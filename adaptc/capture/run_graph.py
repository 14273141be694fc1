"""Run a program with its own tensors: by its graph as it is, or as torch's module of it.

Before: an exported program. After: functions of the program's inputs. Making torch's module takes half a second for a
model of 30 layers, since a second graph is made and written as Python code; the graph itself is ready. The module
checks torch's guards on sizes, which the graph does not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import compress
from typing import Any

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from adaptc.passes.ir.trees import pytree


def run_graph(program: ExportedProgram, *args: Any, **kwargs: Any) -> Any:
    """Run the graph of ``program``, which takes all tensors as inputs, and return its outputs in their containers.

    Keyword arguments may come in any order. Guards on sizes are not checked. Tensors that the program writes to, its
    own and those of the caller, are written to as far as the graph does so itself.
    """
    signature, owned = program.graph_signature, {**program.constants, **program.state_dict}
    keys = program.call_spec.in_spec.children()[1].context  # type: ignore[union-attr]
    flat = iter(pytree.tree_leaves((args, {k: kwargs[k] for k in keys})))
    values = [next(flat) if s.kind == InputKind.USER_INPUT else owned[s.target] for s in signature.input_specs]  # type: ignore[index]
    found = program.graph_module(*values)
    wanted = [s.kind == OutputKind.USER_OUTPUT for s in signature.output_specs]
    tree: Any = program.call_spec.out_spec
    return pytree.tree_unflatten(list(compress(found, wanted)), tree)


def guarded_module(program: ExportedProgram) -> Callable[..., Any]:
    """Return torch's module of ``program``, which refuses sizes that its guards exclude."""
    try:
        return program.module()
    except SyntaxError:  # torch's code of a module in a path such as "in.q", which is no expression of Python
        return partial(run_graph, program)
