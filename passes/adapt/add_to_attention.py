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
from adaptc.passes.analysis.attention.attention_layers import AttentionLayer, Heads, Projection, layer_behind
from adaptc.passes.graph.lifted import Lifted
from adaptc.passes.graph.ops import TABLE, Op, cast
from adaptc.passes.graph.propagate import propagate
from adaptc.passes.graph.symbolic_fakes import FreeFakes
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.attention_method import AttentionMethod
from adaptc.passes.protocol.regions import site_op
from adaptc.passes.protocol.trace import inline
from adaptc.passes.virtual_tokens.trace_program_method import code_of

Tag = Callable[[fx.Node, str, fx.Node], Callable[[str], dict[str, Any]]]

#: the kind of the region
REGION = "attention"
_FREE = "free"


def add_to_attention(lifted: Lifted, a: Attachment, latest: dict[tuple[str, ...], fx.Node], tag: Tag) -> None:
    """Inject the attachment ``a`` of an ``AttentionMethod``; ``latest`` and ``tag`` are as for ``change_places``.

    Raises TargetError where the site is not the output projection of an attention that is understood.
    """
    method = a.method
    assert isinstance(method, AttentionMethod)
    if len(a.consumers) != 1:
        raise PassError(f"site {a.id!r}: {a.consumers} must be one projection")
    layer = layer_behind(lifted, lifted.nodes[a.consumers[0]])
    behind = TABLE[layer.behind.target][0] == "addmm"
    base = _output(layer.behind, latest) if behind else layer.core.node
    y = base
    while (y.name,) in latest:
        y = latest[(y.name,)]
    slots = [lifted.placeholders[f] for f in a.slots.values()]
    reads = [layer.query, *(n for p in (layer.key, layer.value) for n in (p.weight, p.bias) if n is not None)]
    inputs = [y, *reads, *slots]
    code = _traced(method, layer, list(a.slots), [n.meta["val"] for n in inputs], site_op(lifted, a), behind)
    users, before = list(y.users), set(lifted.graph.nodes)
    out = inline(lifted.graph, code, inputs, y.next, layer.core.node, tag(base, REGION, layer.behind))
    for user in users:
        user.replace_input_with(y, out)
    latest[(base.name,)] = out
    new = set(lifted.graph.nodes) - before
    lifted.nodes.update({n.name: n for n in new})
    propagate(lifted.graph, new, lifted.program.graph_module)


def _output(projection: fx.Node, latest: dict[tuple[str, ...], fx.Node]) -> fx.Node:
    """Return the output of a Conv1D: its matmul, seen through the view that restores (batch, length, width)."""
    node = projection
    while (node.name,) in latest:
        node = latest[(node.name,)]
    views = [u for u in node.users if isinstance(u.meta.get("val"), Tensor) and u.meta["val"].ndim == 3]
    if len(views) != 1:
        raise TargetError(f"what {projection.name!r} gives must be read as (batch, length, width) at one place")
    return views[0]


def _traced(
    method: AttentionMethod, layer: AttentionLayer, names: Sequence[str], values: Sequence[Tensor], op: Op, behind: bool
) -> fx.Graph:
    """Return the region as a graph without values.

    Its inputs are the attention's output, the queries, weights and biases of key and value, and the slots. ``behind``
    says that the output projection's result takes the place of the attention's output.
    """
    heads = int(layer.query.meta["val"].shape[1])
    fakes, specs = FreeFakes(_shared_axes(values[0], layer.query.meta["val"])), method.slots(op)
    count = len(values) - len(names)
    free = [specs[n].free for n in names]
    inputs = [fakes.like(t) for t in values[:count]]
    inputs += [fakes.like(t, axes, _FREE) for t, axes in zip(values[count:], free, strict=True)]

    def function(y: Tensor, query: Tensor, *rest: Tensor) -> Tensor:
        own, rest = dict(zip(names, rest[len(rest) - len(names) :], strict=True)), rest[: len(rest) - len(names)]
        tokens, given = method.tokens(own), iter(rest)
        keys, values = (_projected(tokens, p, given, heads) for p in (layer.key, layer.value))
        added = method.attend(query, keys, values, own, layer.scored)
        if behind:
            added = added.transpose(1, 2).flatten(2)
        elif y.ndim == 3:  # heads and batches are one axis
            added = added.flatten(0, 1)
        return cast(y + added, y.dtype)

    return code_of(function, fakes, inputs, method.name)


def _shared_axes(y: Tensor, query: Tensor) -> dict[str, list[str]]:
    """Return the size of the axis that heads and batch share -> its factors; {} where they have axes of their own."""
    own, batch = str(y.shape[0]), str(query.shape[0])
    return {} if own == batch or y.ndim != 3 else {own: [batch] * int(query.shape[1])}


def _projected(tokens: Tensor, p: Projection, given: Any, heads: int) -> Tensor:
    """Return keys or values of ``tokens`` (count, width), one for each of the query heads: (heads, count, head width).

    ``given`` is an iterator over weights and biases, from which this projection's own are taken.
    """
    weight, bias = next(given), next(given) if p.bias is not None else None
    if TABLE[p.node.target][0] == "addmm":
        weight = weight.t()
    made = _heads_of(F.linear(cast(tokens, weight.dtype), weight, bias), p.heads)
    return made.repeat_interleave(heads // p.heads.count, 0) if heads > p.heads.count else made


def _heads_of(t: Tensor, h: Heads) -> Tensor:
    used = t.narrow(-1, h.start, (h.count - 1) * h.step + h.width)
    return used.unfold(-1, h.width, h.step).transpose(0, 1)
