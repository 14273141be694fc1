"""Cut a model at its head, so that it returns the input of the output layer.

Takes the module that ``torch.export`` makes of a program. It keeps its inputs. Its only result is the input of the
output layer, and nothing after that is computed.

Private torch use, with the public route that was tried: ``graph._codegen.pytree_info`` says how results are nested.
Public: ``fx.Graph.set_codegen`` takes a new codegen, but its class is private as well.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from adaptc.passes.graph.module_paths import module_path
from adaptc.passes.graph.mutation import erase_dead_nodes
from adaptc.passes.graph.pytree import pytree


def cut_at_head(module: fx.GraphModule, head: str, module_paths: Collection[str]) -> bool:
    """Rewrite ``module`` in place; returns False, and changes nothing, where the head's input is not one tensor.

    ``head`` is the path of the output layer's module, which must be linear. ``module_paths`` has the paths of all
    modules.
    """
    graph = module.graph
    found = graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    heads = {n.args[0] for n in found if module_path(n, module_paths) == head}
    if len(heads) != 1:
        return False
    (hidden,) = heads
    output = graph.output_node()
    output.args = ((hidden,),)
    info = graph._codegen.pytree_info  # type: ignore[attr-defined]  # the one place that says what a graph returns
    leaf = pytree.tree_structure(0)
    graph._codegen.pytree_info = type(info)(info.orig_args, info.in_spec, leaf)  # type: ignore[attr-defined]
    for node in reversed(graph.nodes):  # sweep() keeps checks, so those of later values are erased here
        if node is hidden:
            break
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)
    erase_dead_nodes(graph)
    module.recompile()
    return True
