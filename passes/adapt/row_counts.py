"""Find out whether code for per-row adapters is the same for every number of adapters.

Each region that ``inject_rows`` would inject is traced for two adapters and for three, and the graphs are compared.
They differ where adapters are computed one after the other. They are equal where adapters lie side by side in matmuls,
as long as no op has their number among its arguments.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from adaptc.passes.adapt.inject_rows import Axes, around, read_at
from adaptc.passes.graph.lifted import Lifted
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.bank_method import BankSite, RowAxis, output_of
from adaptc.passes.protocol.trace import behind_inputs, signature_of, trace


def any_number(
    lifted: Lifted,
    attachments: Sequence[Attachment],
    ops: Mapping[str, Op],
    axes: Axes,
    rows: Any,
    grouped: Collection[str] = (),
) -> bool:
    """Return whether the regions for ``attachments`` are the same for any number of adapters.

    ``rows`` is the number of batch rows in the graph. ``ops`` has the op of each attachment by its id. ``axes`` and
    ``grouped`` are as for ``InjectRows``.
    """
    known: dict[Any, bool] = {}
    for a in attachments:
        if a.method.coefficients() or a.method.extras():
            return False
        for node, _ in read_at(lifted, a):
            op = ops[a.id].at(node)
            if not around(a, ops[a.id]) or a.method.has_input(op):
                return False
            if a.id in grouped:  # kernels read from a table where each adapter is, for any number of them
                continue
            where, fakes = axes[node.name], [n.meta["val"] for n in behind_inputs(node, node)[1]]
            key = (a.method, op, where, signature_of(fakes))
            if key not in known:
                known[key] = all(_same(lifted, a, op, where, fakes, rows, at_once) for at_once in (False, True))
            if not known[key]:
                return False
    return True


def _same(
    lifted: Lifted, a: Attachment, op: Op, where: RowAxis, fakes: Sequence[Tensor], rows: Any, at_once: bool
) -> bool:
    two, three = (_region(lifted, a, op, where, fakes, rows, at_once, count) for count in (2, 3))
    return str(two) == str(three)


def _region(
    lifted: Lifted,
    a: Attachment,
    op: Op,
    where: RowAxis,
    fakes: Sequence[Tensor],
    rows: Any,
    at_once: bool,
    count: int,
) -> fx.Graph:
    site = BankSite(a.method, op, tuple(a.input_names), a.scale_slot is not None, count, at_once)
    biased = len(fakes) > 3
    with nullcontext() if lifted.fake_mode is None else lifted.fake_mode:
        own = list(_slots(a, op, count, fakes[0].device))
        c = torch.empty([rows, count], device=fakes[0].device)
    return trace(partial(output_of, site, where, biased)(), [*fakes, c, *own])


def _slots(a: Attachment, op: Op, count: int, device: torch.device) -> Iterator[Tensor]:
    specs = a.method.slots(op)
    for name in a.input_names:
        yield torch.empty([count, *specs[name].shape], dtype=specs[name].dtype or torch.float32, device=device)
    if a.scale_slot is not None:
        yield torch.empty([count], device=device)
