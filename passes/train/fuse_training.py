"""The module that trains: steps of a model's graph that autograd would take one operator at a time, taken as one.

Before: the module that ``torch.export`` makes of a program. After: the same module, parameters and modes, with equal
outputs and gradients up to the order of sums, from fewer operators, and less kept from forward to backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from adaptc.errors import AdaptcError
from adaptc.passes.ir.effects import is_metadata_assert
from adaptc.passes.ir.modes import AUTOCAST_DEVICES
from adaptc.passes.ir.pass_infra import GraphPass, PassManager, PassResult
from adaptc.passes.optimize.canonicalize import Canonicalize
from adaptc.passes.train.gates import TrainGates
from adaptc.passes.train.layers import TrainLayers
from adaptc.passes.train.loss import TrainLoss


def fuse_training(module: fx.GraphModule) -> PassResult[fx.Graph]:
    """Rewrite ``module`` in place; the result's trail says how often, by pass."""
    graph = module.graph
    inputs = [n.name for n in graph.find_nodes(op="placeholder")]
    checks = sum(map(is_metadata_assert, graph.nodes))
    passes = [Canonicalize(inputs, differentiable=True), TrainLayers(), TrainLoss(), TrainGates(), KeepChecks(checks)]
    result = PassManager(passes)(graph)
    module.recompile()
    return result


@dataclass(frozen=True)
class KeepChecks(GraphPass):
    """Where ``checks`` that a graph made of its types were removed, since they always hold, one is left that says so
    where they would not: under autocast."""

    name: ClassVar[str] = "keep_checks"

    checks: int

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        gone = self.checks - sum(map(is_metadata_assert, subject.nodes))
        if gone:
            first = next(n for n in subject.nodes if n.op not in ("placeholder", "get_attr"))
            with subject.inserting_before(first):
                subject.call_function(refuse_autocast)
        return PassResult(subject, int(gone > 0))


def refuse_autocast() -> None:
    """Stands where a module's own checks of its types were removed: they hold for the types it was captured with.

    Raises AdaptcError if the caller has autocast on.
    """
    if any(map(torch.is_autocast_enabled, AUTOCAST_DEVICES)):
        raise AdaptcError(
            "the model casts tensors itself, and was captured with these casts, so autocast has no meaning for it: "
            "train outside of torch.autocast, with model.to(torch.bfloat16) before adaptc.compile for half precision"
        )
