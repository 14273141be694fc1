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

from adaptc.passes.adapt.inject_rows import RowAxes, acts_around_layer, site_consumers
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.bank_method import BankSite, RowAxis, make_output_function
from adaptc.passes.protocol.trace import output_region_inputs, trace_function, trace_key


def is_count_independent(
    lifted: LiftedProgram,
    attachments: Sequence[Attachment],
    ops: Mapping[str, Op],
    axes: RowAxes,
    row_count: Any,
    kernel_sites: Collection[str] = (),
) -> bool:
    """Return whether the regions for ``attachments`` are the same for any number of adapters.

    ``row_count`` is the number of batch rows in the graph. ``ops`` has the op of each attachment by its id. ``axes``
    and ``kernel_sites`` are as for ``InjectRows``.
    """
    results: dict[Any, bool] = {}
    for a in attachments:
        if a.method.extra_inputs.coefficients() or a.method.extra_inputs.extras():
            return False
        for node, _ in site_consumers(lifted, a):
            op = ops[a.id].as_called_by(node)
            if not acts_around_layer(a, ops[a.id]) or a.method.has_input(op):
                return False
            if a.id in kernel_sites:  # kernels read from a table where each adapter is, for any number of them
                continue
            where, fakes = axes[node.name], [n.meta["val"] for n in output_region_inputs(node, node)[1]]
            key = (a.method, op, where, trace_key(fakes))
            if key not in results:
                rows = lifted.nodes[where.picked_by].meta["val"].shape[0] if where.picked_by else row_count
                results[key] = all(
                    _has_equal_regions(lifted, a, op, where, fakes, rows, at_once) for at_once in (False, True)
                )
            if not results[key]:
                return False
    return True


def _has_equal_regions(
    lifted: LiftedProgram,
    a: Attachment,
    op: Op,
    row_axis: RowAxis,
    fakes: Sequence[Tensor],
    row_count: Any,
    uses_fused_ops: bool,
) -> bool:
    two, three = (_trace_region(lifted, a, op, row_axis, fakes, row_count, uses_fused_ops, count) for count in (2, 3))
    return str(two) == str(three)


def _trace_region(
    lifted: LiftedProgram,
    a: Attachment,
    op: Op,
    row_axis: RowAxis,
    fakes: Sequence[Tensor],
    row_count: Any,
    uses_fused_ops: bool,
    adapter_count: int,
) -> fx.Graph:
    site = BankSite(a.method, op, tuple(a.input_names), a.scale_slot is not None, adapter_count, uses_fused_ops)
    biased = len(fakes) > 3
    with nullcontext() if lifted.fake_mode is None else lifted.fake_mode:
        own = list(_fake_slots(a, op, adapter_count, fakes[0].device))
        c = torch.empty([row_count, adapter_count], device=fakes[0].device)
    return trace_function(partial(make_output_function, site, row_axis, biased)(), [*fakes, c, *own])


def _fake_slots(a: Attachment, op: Op, count: int, device: torch.device) -> Iterator[Tensor]:
    specs = a.method.slots(op)
    for name in a.input_names:
        yield torch.empty([count, *specs[name].shape], dtype=specs[name].dtype or torch.float32, device=device)
    if a.scale_slot is not None:
        yield torch.empty([count], device=device)
