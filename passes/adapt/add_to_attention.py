"""Add to an attention's output what its queries find in the virtual tokens of a method (adaption prompts).

Takes an opened program whose slots are there, and an attachment of an ``AttentionMethod`` at an output projection. It
adds a tagged region that computes the sum. Every reader of the attention reads the region instead, with new fake
values.

The layer's base weights make keys and values of the virtual tokens, whatever other adapters change about these weights.
PEFT adds before the output projection. Only for GPT-2, whose projection is HF's Conv1D, does it add after it. The same
is done here, since adapter files of GPT-2 mean that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx
from torch.nn import functional as F

from adaptc.errors import PassError, TargetError
from adaptc.passes.analysis.attention.attention_layers import (
    AttentionLayer,
    HeadColumns,
    KVProjection,
    find_attention_layer,
)
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import LAYER_OPS, Op, cast
from adaptc.passes.graph.propagate import propagate_fakes
from adaptc.passes.graph.symbolic_fakes import FreeSizeFakes
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.attention_method import AttentionMethod
from adaptc.passes.protocol.regions import site_op
from adaptc.passes.protocol.trace import inline
from adaptc.passes.virtual_tokens.trace_program_method import trace_for_all_sizes

Tag = Callable[[fx.Node, str, fx.Node], Callable[[str], dict[str, Any]]]

#: the kind of the region
REGION_KIND = "attention"
_FREE_SIZE = "free"


def add_to_attention(
    lifted: LiftedProgram, a: Attachment, latest_outputs: dict[tuple[str, ...], fx.Node], tag: Tag
) -> None:
    """Inject the attachment ``a`` of an ``AttentionMethod``; ``latest_outputs`` and ``tag`` are as for
    ``inject_program_method``.

    Raises TargetError where the site is not the output projection of an attention that is understood.
    """
    method = a.method
    assert isinstance(method, AttentionMethod)
    if len(a.consumers) != 1:
        raise PassError(f"site {a.id!r}: {a.consumers} must be one projection")
    layer = find_attention_layer(lifted, lifted.nodes[a.consumers[0]])
    is_after_projection = LAYER_OPS[layer.output_projection.target][0] == "addmm"
    base = _conv1d_output(layer.output_projection, latest_outputs) if is_after_projection else layer.core.node
    y = base
    while (y.name,) in latest_outputs:
        y = latest_outputs[(y.name,)]
    slots = [lifted.placeholders[f] for f in a.slots.values()]
    reads = [layer.query, *(n for p in (layer.key, layer.value) for n in (p.weight, p.bias) if n is not None)]
    inputs = [y, *reads, *slots]
    code = _trace_region(
        method, layer, list(a.slots), [n.meta["val"] for n in inputs], site_op(lifted, a), is_after_projection
    )
    users, before = list(y.users), set(lifted.graph.nodes)
    out = inline(lifted.graph, code, inputs, y.next, layer.core.node, tag(base, REGION_KIND, layer.output_projection))
    for user in users:
        user.replace_input_with(y, out)
    latest_outputs[(base.name,)] = out
    new = set(lifted.graph.nodes) - before
    lifted.nodes.update({n.name: n for n in new})
    propagate_fakes(lifted.graph, new, lifted.program.graph_module)


def _conv1d_output(projection: fx.Node, latest_outputs: dict[tuple[str, ...], fx.Node]) -> fx.Node:
    """Return the output of a Conv1D: its matmul, seen through the view that restores (batch, length, width)."""
    node = projection
    while (node.name,) in latest_outputs:
        node = latest_outputs[(node.name,)]
    views = [u for u in node.users if isinstance(u.meta.get("val"), Tensor) and u.meta["val"].ndim == 3]
    if len(views) != 1:
        raise TargetError(f"what {projection.name!r} gives must be read as (batch, length, width) at one place")
    return views[0]


def _trace_region(
    method: AttentionMethod,
    layer: AttentionLayer,
    names: Sequence[str],
    values: Sequence[Tensor],
    op: Op,
    is_after_projection: bool,
) -> fx.Graph:
    """Return the region as a graph without values.

    Its inputs are the attention's output, the queries, weights and biases of key and value, and the slots.
    ``is_after_projection`` says that the output projection's result takes the place of the attention's output.
    """
    heads = int(layer.query.meta["val"].shape[1])
    fakes, specs = FreeSizeFakes(_shared_axes(values[0], layer.query.meta["val"])), method.slots(op)
    count = len(values) - len(names)
    free = [specs[n].free for n in names]
    inputs = [fakes.fake_like(t) for t in values[:count]]
    inputs += [fakes.fake_like(t, axes, _FREE_SIZE) for t, axes in zip(values[count:], free, strict=True)]

    def function(y: Tensor, query: Tensor, *rest: Tensor) -> Tensor:
        own, rest = dict(zip(names, rest[len(rest) - len(names) :], strict=True)), rest[: len(rest) - len(names)]
        tokens, given = method.tokens(own), iter(rest)
        keys, values = (_project_tokens(tokens, p, given, heads) for p in (layer.key, layer.value))
        added = method.attend(query, keys, values, own, layer.to_scores)
        if is_after_projection:
            added = added.transpose(1, 2).flatten(2)
        elif y.ndim == 3:  # heads and batches are one axis
            added = added.flatten(0, 1)
        return cast(y + added, y.dtype)

    return trace_for_all_sizes(function, fakes, inputs, method.name)


def _shared_axes(y: Tensor, query: Tensor) -> dict[str, list[str]]:
    """Return the size of the axis that heads and batch share -> its factors; {} where they have axes of their own."""
    own, batch = str(y.shape[0]), str(query.shape[0])
    return {} if own == batch or y.ndim != 3 else {own: [batch] * int(query.shape[1])}


def _project_tokens(tokens: Tensor, p: KVProjection, parameters: Any, heads: int) -> Tensor:
    """Return keys or values of ``tokens`` (count, width), one for each of the query heads: (heads, count, head width).

    ``given`` is an iterator over weights and biases, from which this projection's own are taken.
    """
    weight, bias = next(parameters), next(parameters) if p.bias is not None else None
    if LAYER_OPS[p.node.target][0] == "addmm":
        weight = weight.t()
    made = _split_heads(F.linear(cast(tokens, weight.dtype), weight, bias), p.heads)
    return made.repeat_interleave(heads // p.heads.count, 0) if heads > p.heads.count else made


def _split_heads(t: Tensor, h: HeadColumns) -> Tensor:
    used = t.narrow(-1, h.start, (h.count - 1) * h.step + h.width)
    return used.unfold(-1, h.width, h.step).transpose(0, 1)
