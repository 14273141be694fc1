"""The module that trains: steps of a model's graph that autograd would take one operator at a time, taken as one.

Before: the module that ``torch.export`` makes of a program. After: the same module, parameters and modes, with equal
outputs and gradients up to the order of sums, from fewer operators, and less kept from forward to backward.
"""

from __future__ import annotations

from torch import fx

from adaptc.passes.canonicalize import canonicalize
from adaptc.passes.train_gates import train_gates
from adaptc.passes.train_layers import train_layers
from adaptc.passes.train_loss import train_loss


def fuse_training(module: fx.GraphModule) -> dict[str, int]:
    """Rewrite ``module`` in place; how often, by pass."""
    graph = module.graph
    inputs = [n.name for n in graph.find_nodes(op="placeholder")]
    removed = canonicalize(graph, inputs, differentiable=True)
    found = {"layers": train_layers(graph), "losses": train_loss(graph), "gates": train_gates(graph)}
    graph.lint()
    module.recompile()
    return {"operators removed": removed, **found}
