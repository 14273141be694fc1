"""Run a program on its own tensors: by its graph, or by torch's module of it.

The graph is ready to run. torch's module takes half a second for a model of 30 layers, since torch makes a second graph
and writes it as Python code. The module checks torch's guards on sizes, which the graph does not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import compress
from typing import Any

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from adaptc.passes.graph.pytree import pytree


def run_graph(program: ExportedProgram, *args: Any, **kwargs: Any) -> Any:
    """Run the graph of ``program`` on these inputs, and return its outputs in their containers.

    Keyword arguments may come in any order. Guards on sizes are not checked. Tensors of the program or of the caller
    are written to only where the graph itself writes in place.
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
    """Return torch's module of ``program``, which refuses sizes that its guards exclude.

    Where torch cannot make one, the function that is returned runs the graph, without guards.
    """
    try:
        return program.module()
    except SyntaxError:  # torch's generated code for a path such as "in.q", which is no Python expression
        return partial(run_graph, program)
