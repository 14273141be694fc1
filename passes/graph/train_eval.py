"""Training and inference in a graph: the one table of ops that a module's ``train()`` and ``eval()`` change.

``torch.export`` bakes the mode into arguments of these ops. All code uses this table that asks for a program's mode,
changes it, or has to know whether an op draws random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaptc.passes.graph.ops import argument, custom_meta

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
#: the position of the dropout probability among attention's arguments
SDPA_DROPOUT = 4
#: custom meta of a node whose dropout is off: the probability it had
DROPOUT_META = "adaptc_dropout_p"
#: the buffer in which batch norm counts its training batches
BATCH_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class ModeFlag:
    """The positions of the arguments that hold an op's mode.

    ``position`` is the flag itself. The flag has no effect if the argument at ``probability`` is 0, or that at
    ``statistics`` (running statistics) is None.
    """

    position: int
    probability: int | None = None
    statistics: int | None = None


#: the flag of dropout layers
DROPOUT = ModeFlag(2, probability=1)
_NORM = ModeFlag(5, statistics=3)
_RNNS = (aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)

MODE_FLAGS: dict[Any, ModeFlag] = {
    aten.dropout.default: DROPOUT,
    aten.dropout_.default: DROPOUT,
    aten.native_dropout.default: DROPOUT,
    aten.feature_dropout.default: DROPOUT,
    aten.feature_dropout_.default: DROPOUT,
    aten.alpha_dropout.default: DROPOUT,
    aten.alpha_dropout_.default: DROPOUT,
    aten.feature_alpha_dropout.default: DROPOUT,
    aten.feature_alpha_dropout_.default: DROPOUT,
    aten.batch_norm.default: _NORM,
    aten.instance_norm.default: _NORM,
    aten.native_batch_norm.default: _NORM,
    aten._native_batch_norm_legit.default: _NORM,
    aten._native_batch_norm_legit_functional.default: _NORM,
    aten.rrelu.default: ModeFlag(3),
    aten.rrelu_.default: ModeFlag(3),
    aten.rrelu_with_noise.default: ModeFlag(4),
    aten.rrelu_with_noise_.default: ModeFlag(4),
    aten.rrelu_with_noise_functional.default: ModeFlag(4),
    **{rnn.input: ModeFlag(6, probability=5) for rnn in _RNNS},
    # for packed sequences
    **{rnn.data: ModeFlag(7, probability=6) for rnn in _RNNS},
}
#: ops that write running statistics in training without saying so in their schemas
_WRITES_SILENTLY = (aten.batch_norm.default, aten.instance_norm.default, aten.native_batch_norm.default)
STATISTICS_ARGUMENTS: dict[Any, tuple[int, int]] = dict.fromkeys(_WRITES_SILENTLY, (3, 4))


def add_mode_flag(op: Any, flag: ModeFlag) -> None:
    """Enter an op of adaptc in the table; called where the op is defined."""
    MODE_FLAGS[op] = flag


def training_mode_of(node: fx.Node) -> bool | None:
    """Return whether the node is set to training; None where it computes the same in either mode."""
    if node.target is SDPA:
        kept = custom_meta(node).get(DROPOUT_META)
        return True if argument(node, SDPA_DROPOUT) else False if kept else None
    flag = MODE_FLAGS.get(node.target)
    if flag is None:
        return None
    if flag.probability is not None and not argument(node, flag.probability):
        return None
    if flag.statistics is not None and argument(node, flag.statistics) is None:
        return None
    return bool(argument(node, flag.position))


def has_dropout(region: fx.Graph) -> bool:
    """Return whether a region has dropout or draws noise, so that no other form of the adapter can replace it."""
    return any(node.target in (aten.dropout.default, aten.randn_like.default) for node in region.nodes)
