"""Fuse the module that trains: layers with adapters, gates and the loss become one autograd step each.

Takes the module that ``torch.export`` makes of a program. Parameters and modes stay. Outputs and gradients are equal up
to the order of sums. There are fewer ops, and less is kept from forward to backward.
"""

from __future__ import annotations

from torch import fx

from adaptc.errors import ConfigError
from adaptc.passes.graph.pass_infra import GraphPass, PassManager, PassResult
from adaptc.passes.optimize.canonicalize import Canonicalize
from adaptc.passes.train.autocast import FollowAutocast
from adaptc.passes.train.choose_base_products import ChooseBaseMatmuls, ChooseMatmul
from adaptc.passes.train.fused_cross_entropy import FuseCrossEntropy
from adaptc.passes.train.fused_gated_activation import FuseGatedActivations
from adaptc.passes.train.fused_lora_linear import FuseLoraLayers

#: the choices of which rows of the head are computed
LOGITS = ("all", "labelled")


def fuse_training(
    module: fx.GraphModule,
    *,
    fuse: bool = True,
    logits: str = "all",
    choose: tuple[ChooseMatmul, ChooseMatmul] | None = None,
) -> PassResult[fx.Graph]:
    """Rewrite ``module`` in place; the result's trail has the count of each pass, and its data the choices of matmuls.

    ``fuse=False`` only lets it run under autocast. ``logits="labelled"`` leaves rows without a label out of the head.
    These rows are zero in the logits that are returned. ``choose`` has the two functions that choose matmuls of the
    base, for the forward and for the gradient of the input (see :class:`ChooseBaseMatmuls`); None keeps torch's own.

    Raises ConfigError for an unknown ``logits``, and where no loss allows it.
    """
    if logits not in LOGITS:
        raise ConfigError(f"logits must be one of {', '.join(map(repr, LOGITS))}, and is {logits!r}")
    if logits == "labelled" and not fuse:
        raise ConfigError("logits='labelled' needs a program with something to train, and fuse=True; or logits='all'")
    graph = module.graph
    inputs = [n.name for n in graph.find_nodes(op="placeholder")]
    loss = FuseCrossEntropy(logits == "labelled")
    passes: list[GraphPass] = [FollowAutocast(inputs)]
    if fuse:
        passes += [Canonicalize(inputs, True, autocast=True), FuseLoraLayers(), loss, FuseGatedActivations()]
    if fuse and choose is not None:
        passes.append(ChooseBaseMatmuls(*choose))
    result = PassManager(passes)(graph)
    if loss.labelled_only and not dict(result.trail)[loss.name]:
        raise ConfigError(
            "logits='labelled' needs a cross entropy (mean or sum, no weights, no smoothing) right behind a linear "
            "head whose logits nothing but the caller reads, and the program has none; use logits='all'"
        )
    module.recompile()
    return result
