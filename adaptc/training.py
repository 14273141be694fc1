"""The module that trains: steps of a model's graph that autograd would take one operator at a time, taken as one.

Before: the module that ``torch.export`` makes of a program. After: the same module, parameters and modes, with equal
outputs and gradients up to the order of sums, from fewer operators, and less kept from forward to backward.
"""

from __future__ import annotations

import torch
from torch import fx

from adaptc.errors import AdaptcError
from adaptc.hoisting import DEVICES
from adaptc.passes._effects import check
from adaptc.passes.canonicalize import canonicalize
from adaptc.passes.train_gates import train_gates
from adaptc.passes.train_layers import train_layers
from adaptc.passes.train_loss import train_loss


def fuse_training(module: fx.GraphModule) -> dict[str, int]:
    """Rewrite ``module`` in place; how often, by pass."""
    graph = module.graph
    inputs = graph.find_nodes(op="placeholder")
    checks = sum(map(check, graph.nodes))
    removed = canonicalize(graph, [n.name for n in inputs], differentiable=True)
    found = {"layers": train_layers(graph), "losses": train_loss(graph), "gates": train_gates(graph)}
    if sum(map(check, graph.nodes)) < checks:
        with graph.inserting_before(next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))):
            graph.call_function(refuse_autocast)
    graph.lint()
    module.recompile()
    return {"operators removed": removed, **found}


def refuse_autocast() -> None:
    """Stands where a module's own checks of its types were removed: they hold for the types it was captured with.

    Raises AdaptcError if the caller has autocast on.
    """
    if any(map(torch.is_autocast_enabled, DEVICES)):
        raise AdaptcError(
            "the model casts tensors itself, and was captured with these casts, so autocast has no meaning for it: "
            "train outside of torch.autocast, with model.to(torch.bfloat16) before adaptc.compile for half precision"
        )
