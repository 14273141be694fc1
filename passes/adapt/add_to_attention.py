"""Add to what an attention gives what its queries find in tokens of a method's own.

Before: an opened program whose slots are there, and an attachment of an ``AttentionMethod`` at the projection behind an
attention. After: a tagged region that computes what is added, read by all who read the attention; fake values follow.

Keys and values of the tokens are made by the layer's own weights, those of the base, whatever other adapters make of
them. Behind HF's Conv1D, which GPT-2 has, PEFT adds behind the projection what it adds in front of all others, and so
it is done here: files of GPT-2 mean that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx
from torch.nn import functional as F

from adaptc.errors import PassError, TargetError
from adaptc.passes.adapt.trace_places import code_of
from adaptc.passes.analysis.attention_layers import AttentionLayer, Heads, Projection, layer_behind
from adaptc.passes.ir.attachment import Attachment
from adaptc.passes.ir.attention_method import AttentionMethod
from adaptc.passes.ir.free_fakes import FreeFakes
from adaptc.passes.ir.lifted import Lifted
from adaptc.passes.ir.ops import TABLE, Op, cast
from adaptc.passes.ir.propagate import propagate
from adaptc.passes.ir.regions import site_op
from adaptc.passes.ir.trace import inline

Tag = Callable[[fx.Node, str, fx.Node], Callable[[str], dict[str, Any]]]

#: the kind of the region
REGION = "attention"
_FREE = "free"


def add_to_attention(lifted: Lifted, a: Attachment, latest: dict[tuple[str, ...], fx.Node], tag: Tag) -> None:
    """As ``change_places``. Raises TargetError where the site is not behind an attention that is understood."""
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
    """What a Conv1D gives: its product, seen through the view that gives it back its axes."""
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
    """The region as a graph without values: of the attention's output, the query, weights and biases, and the slots."""
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
    """The size of an axis that heads and batches share."""
    own, batch = str(y.shape[0]), str(query.shape[0])
    return {} if own == batch or y.ndim != 3 else {own: [batch] * int(query.shape[1])}


def _projected(tokens: Tensor, p: Projection, given: Any, heads: int) -> Tensor:
    """Keys or values of tokens (count, width), as each head of queries reads them: (heads, count, width)."""
    weight, bias = next(given), next(given) if p.bias is not None else None
    if TABLE[p.node.target][0] == "addmm":
        weight = weight.t()
    made = _heads_of(F.linear(cast(tokens, weight.dtype), weight, bias), p.heads)
    return made.repeat_interleave(heads // p.heads.count, 0) if heads > p.heads.count else made


def _heads_of(t: Tensor, h: Heads) -> Tensor:
    used = t.narrow(-1, h.start, (h.count - 1) * h.step + h.width)
    return used.unfold(-1, h.width, h.step).transpose(0, 1)
