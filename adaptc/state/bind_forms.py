"""Choose the form in which an adapter is bound to a program, and make the weights of the weight form.

The two forms compute the same up to rounding:

    apply    the program's own code with this adapter's tensors: no memory but theirs
    weight   the base's graph on weights of its own, W' = weight(W) made once: as fast as the base, and as large, over
             the adapted weights

``auto`` takes the weight form where three things hold. The adapter would cost a call more than a twentieth of the
adapted layers' own work (symbolic, at the sizes of the example inputs). The weights fit a memory limit. They are not in
half precision, where rounding W' once is not what the program does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from adaptc.binding.binding import Binding
from adaptc.errors import ConfigError, short_repr
from adaptc.passes.analysis.costs import count_node_operations, evaluate_at_sizes, example_sizes
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.graph.storage import storage_key
from adaptc.passes.optimize.sibling_cost import DISPATCH
from adaptc.passes.protocol.regions import node_tag
from adaptc.passes.quantized.quantized_merge import QuantizedMerge
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.runtime.options import check_byte_limit
from adaptc.state.core import ProgramCore
from adaptc.state.merge_program import merge_program

FORMS = ("apply", "weight", "auto")
#: share of the adapted layers' own work above which an adapter is worth weights of its own
MAX_OVERHEAD_SHARE = 0.05


@with_graph_lock
def make_own_weights(program: ProgramCore, binding: Binding) -> tuple[ProgramCore, tuple[Tensor, ...]]:
    """Return the base's program on the weights that ``binding`` makes, and those weights; all others are shared."""
    made, _ = merge_program(program.with_binding(binding), quantized=QuantizedMerge.DEQUANTIZE)
    base: Mapping[str, Any] = program.base_tensors  # objects that are no tensors, too
    shared = {storage_key(t) for t in base.values() if isinstance(t, Tensor)}
    new = {f: t for f, t in made.state_dict.items() if isinstance(t, Tensor) and storage_key(t) not in shared}
    # Fused siblings move into one buffer. Weights that are shared with the program must stay where they are.
    made.set_options(fuse=frozenset(new))
    return made, tuple({storage_key(t): t for t in new.values()}.values())


def choose_form(program: ProgramCore, binding: Binding, form: str, memory_limit: int | None) -> tuple[str, str]:
    """Return the form for ``binding``, and why.

    Raises ConfigError for a form that does not exist, and for a limit that is no number of bytes.
    """
    given: Any = form  # callers may give anything
    if not isinstance(given, str) or given not in FORMS:
        raise ConfigError(f"form={short_repr(form)} is not one of {', '.join(FORMS)}")
    check_byte_limit(memory_limit, "memory_limit")
    if not program.adaptation.attachments:
        return "apply", "the base has no adapter"
    if form != "auto":
        return form, "asked for"
    adapted = [a for a in program.adaptation.attachments if a.id in binding.methods]
    weights = {a.fqn: program.base_tensors[a.fqn] for a in adapted}
    if any(a.method.check_merge(program.ops[a.id]) for a in adapted):
        return "apply", "a method of the adapter has no form on the weight"
    if any(isinstance(t, QuantizedTensor) for t in weights.values()):
        return "apply", "plain weights would take the memory that quantised ones save"
    if any(t.is_floating_point() and t.itemsize < 4 for t in weights.values()):
        return "apply", "weights in half precision would round the change"
    needed = sum(t.nbytes for t in weights.values())
    if memory_limit is not None and needed > memory_limit:
        return "apply", f"its own weights would take {needed:,} bytes, over the limit of {memory_limit:,}"
    share = region_overhead(program)
    if share <= MAX_OVERHEAD_SHARE:
        return "apply", f"the adapter costs {share:.1%} of the adapted layers' own work"
    return "weight", f"the adapter would cost {share:.1%} of the adapted layers' own work in every call"


@with_graph_lock
@torch.no_grad()
def region_overhead(program: ProgramCore) -> float:
    """Return the work of a program's regions over that of the layers they stand at, for one call at the example sizes.

    It is 0 where the regions stand at no such layer.
    """
    program = program.snapshot()
    graph, sizes = program.graph, example_sizes(program)
    layers = {name for a in program.adaptation.attachments for name in a.consumers}
    regions, base = list[fx.Node](), list[fx.Node]()
    for node in graph.nodes:
        if node.op == "call_function":
            if node_tag(node):
                regions.append(node)
            elif node.name in layers:
                base.append(node)
    work = [
        sum(evaluate_at_sizes(count_node_operations(n), sizes) for n in nodes) + DISPATCH * len(nodes)
        for nodes in (regions, base)
    ]
    return float(work[0] / work[1]) if base else 0.0
