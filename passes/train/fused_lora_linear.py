"""Fuse layers with LoRA that read one tensor into one step of a training graph, with a backward of its own.

Takes the graph of a module to train, whose lifted inputs are ``get_attr`` nodes with fake values. Layers that read the
same x compute y_i = linear(x, W_i, b_i) + s_i linear(linear(low, A_i), B_i). Here ``low`` is x, or x after dropout and
a cast. One call then gives all y_i. Outputs and gradients are equal up to the order of sums. In forward and backward,

    h = low [A_1; A_2; ...]^T                  y_i = x W_i^T + b_i + (s_i h_i) B_i^T
    dh_i = s_i g_i B_i                         dx = sum g_i W_i + dh [A_1; A_2; ...]
    [dA_1; dA_2; ...] = dh^T low               dB_i = g_i^T (s_i h_i)

no output is scaled or added in a pass of its own: matmuls add to the memory of others. The backward needs only low and
h, which has one column per rank. Frozen tensors take no work; those that train after all get their gradients. Under
autocast all matmuls have its dtype, and each tensor is cast once and kept as it was cast. Gradients have the dtypes of
the tensors, so those of adapters are float32.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from adaptc.passes.graph.mutation import sweep, touched
from adaptc.passes.graph.ops import argument
from adaptc.passes.graph.pass_infra import GraphPass, PassResult
from adaptc.passes.train.autocast import autocast_dtype, cast, without_autocast
from adaptc.passes.train.base_products import Told, base_gradient, base_product
from adaptc.passes.train.first_order import first_order, plain_only

aten = torch.ops.aten


@dataclass(frozen=True)
class FusedLayer:
    """A layer with LoRA: ``out`` = linear(x, weight, bias) + scale * linear(linear(low, down), up)."""

    x: fx.Node
    low: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    down: fx.Node
    up: fx.Node
    scale: fx.Node
    out: fx.Node


@dataclass(frozen=True)
class TrainLayers(GraphPass):
    """A pass that fuses layers with LoRA; its count is that of the layers."""

    name: ClassVar[str] = "train_layers"

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        dirty, _ = touched(subject)
        groups: dict[Any, list[FusedLayer]] = {}
        for node in subject.find_nodes(op="call_function", target=aten.linear.default):
            layer = _layer(node)
            if layer is not None and dirty.isdisjoint((layer.x, layer.low, layer.weight, layer.bias, node, layer.out)):
                groups.setdefault((layer.x, layer.low, layer.down.meta["val"].dtype), []).append(layer)
        for layers in groups.values():
            _write(subject, layers)
        sweep(subject)
        return PassResult(subject, sum(map(len, groups.values())))


def _layer(node: Any) -> FusedLayer | None:
    x, weight, bias = (argument(node, i) for i in range(3))
    if not _input(weight) or not (bias is None or _input(bias)) or len(node.users) != 1:
        return None
    if x.meta["val"].ndim < 2:
        return None
    (total,) = node.users
    if total.target is not aten.add.Tensor or argument(total, 2) != 1:
        return None
    scaled = total.args[1] if total.args[0] is node else total.args[0]
    if not _alone(scaled, aten.mul.Tensor):
        return None
    up, scale = scaled.args
    if not _alone(up, aten.linear.default) or not _input(scale, ()):
        return None
    down = up.args[0]
    if not _alone(down, aten.linear.default) or argument(up, 2) is not None or argument(down, 2) is not None:
        return None
    A, B, low = argument(down, 1), argument(up, 1), down.args[0]
    if not _input(A) or not _input(B) or not _same(x, low):
        return None
    out, dtype = total, node.meta["val"].dtype
    if total.meta["val"].dtype != dtype:
        casts = [u for u in total.users if u.target is aten.to.dtype and u.args[1] == dtype]
        if len(total.users) != 1 or not casts:
            return None
        out = casts[0]
    return FusedLayer(x, low, weight, bias, A, B, scale, out)


def _alone(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target and len(node.users) == 1


def _input(node: Any, shape: tuple[int, ...] | None = None) -> bool:
    """Return whether the node is a lifted input of that shape; None stands for any shape."""
    return isinstance(node, fx.Node) and node.op == "get_attr" and shape in (None, tuple(node.meta["val"].shape))


def _same(x: fx.Node, low: Any) -> bool:
    """Return whether ``low`` has the shape of x."""
    return isinstance(low, fx.Node) and str(low.meta["val"].shape) == str(x.meta["val"].shape)


def _write(graph: fx.Graph, layers: Sequence[FusedLayer]) -> None:
    first = layers[0]
    low = None if first.low is first.x else first.low
    lists = [[getattr(layer, n) for layer in layers] for n in ("weight", "bias", "down", "up", "scale")]
    # Before the first result: all inputs of the layers exist there, and nothing has read a result yet.
    with graph.inserting_before(min(layer.out for layer in layers)):
        made = graph.call_function(layers_with_lora, (first.x, low, *lists))
        pieces = [graph.call_function(operator.getitem, (made, i)) for i in range(len(layers))]
    for layer, piece in zip(layers, pieces, strict=True):
        piece.meta = dict(layer.out.meta)
        layer.out.replace_all_uses_with(piece)


def layers_with_lora(
    x: Tensor,
    low: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[Tensor],
    told: Sequence[Told] = (),
) -> Sequence[Tensor]:
    """Return all y_i of the module docstring.

    x is (..., K), and low has its shape, or is None for x itself; W_i (N_i, K), A_i (R_i, K), B_i (N_i, R_i), s_i 0-d.
    All of them get gradients of first order, which cannot be differentiated again. Under autocast y_i have its dtype.

    ``told`` says which kinds of matmul to use with each W_i; empty for torch's own. Plain ops compute all of it in
    transforms of ``torch.func`` and in forward mode.
    """
    if plain_only(x, low, *weights, *biases, *downs, *ups, *scales):
        return _written_out(x, x if low is None else low, weights, biases, downs, ups, scales)
    told = told or [()] * len(weights)
    return _Layers.apply(told, autocast_dtype(x), x, low, *weights, *biases, *downs, *ups, *scales)


def _written_out(x: Tensor, low: Tensor, *lists: Sequence[Any]) -> Sequence[Tensor]:
    out: list[Tensor] = []
    for w, b, down, up, s in zip(*lists, strict=True):
        y, change = F.linear(x, w, b), s * F.linear(F.linear(low, down), up)
        out.append((y.to(change.dtype) + change).to(y.dtype))
    return out


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, told: Sequence[Told], dtype: torch.dtype | None, x: Tensor, low: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, ...]:
        n = len(told)
        ctx.told, ctx.shape, ctx.own = told, x.shape, low is not None
        ctx.dtypes = [None if t is None else t.dtype for t in (x, low, *tensors)]
        ctx.set_materialize_grads(False)
        tensors = (*(cast(t, dtype) for t in tensors[: 4 * n]), *tensors[4 * n :])
        weights, biases, downs, ups, scales = (tensors[i * n : (i + 1) * n] for i in range(5))
        rows = cast(x, dtype).reshape(-1, x.shape[-1])
        into = rows if low is None else cast(low, dtype).reshape(rows.shape)
        h = into @ _stacked(downs).t()
        out = []
        for w, b, up, s, part, by in zip(weights, biases, ups, scales, _split(h, downs), told, strict=True):
            y = base_product(rows, w, b, by)
            wide = y.to(h.dtype).addmm_(part * s, up.t()).to(y.dtype)
            out.append(wide.reshape(*x.shape[:-1], wide.shape[-1]))
        both = ctx.own and any(ctx.needs_input_grad[4 : 4 + n])
        # The inputs themselves where nothing was cast: through them a second derivative reaches the error.
        source = x if low is None else low
        into, rows = source if cast(source, dtype) is source else into, x if cast(x, dtype) is x else rows
        # Weights and factors belong to the module, so keeping them costs nothing. Their casts under autocast cost
        # memory, which autograd would keep as well.
        ctx.save_for_backward(into, rows if both else None, h, *weights, *downs, *ups, *scales)
        return tuple(out)

    @staticmethod
    @first_order("a layer with its adapter")
    @without_autocast
    def backward(ctx: Any, *gs: Tensor | None) -> tuple[Tensor | None, ...]:
        n = len(ctx.told)
        low, x, h, *tensors = ctx.saved_tensors
        low, x = low.reshape(-1, low.shape[-1]), None if x is None else x.reshape(-1, x.shape[-1])
        weights, downs, ups, scales = (tensors[i * n : (i + 1) * n] for i in range(4))
        needs_x, needs_low, *needs = ctx.needs_input_grad[2:]
        need_w, need_b, need_down, need_up, need_scale = (needs[i * n : (i + 1) * n] for i in range(5))
        rows = low if x is None else x
        found: Any = [[None] * n for _ in range(4)]
        d_w, d_b, d_up, d_scale = found
        d_x: Any = None
        d_parts: list[Tensor] = []
        for i, (g, part) in enumerate(zip(gs, _split(h, downs), strict=True)):
            if g is None:
                d_parts.append(torch.zeros_like(part))
                continue
            g = g.reshape(-1, g.shape[-1])
            if needs_x:
                d_x = base_gradient(g, weights[i], ctx.told[i], d_x)
            d_w[i] = g.t() @ rows if need_w[i] else None
            d_b[i] = g.sum(0) if need_b[i] else None
            g = g.to(h.dtype)
            d_part = g @ ups[i]
            d_scale[i] = (d_part * part).sum() if need_scale[i] else None
            d_parts.append(d_part.mul_(scales[i]))
            d_up[i] = g.t() @ (part * scales[i]) if need_up[i] else None
        d_h = d_parts[0] if n == 1 else torch.cat(d_parts, 1)
        d_down = (d_h.t() @ low).split([a.shape[0] for a in downs]) if any(need_down) else [None] * n
        d_low = None
        if ctx.own:
            d_low = (d_h @ _stacked(downs)).reshape(ctx.shape) if needs_low else None
        elif d_x is not None:
            d_x = d_x.to(h.dtype).addmm_(d_h, _stacked(downs)).to(d_x.dtype)
        d_x = None if d_x is None else d_x.reshape(ctx.shape)
        found = (d_x, d_low, *d_w, *d_b, *d_down, *d_up, *d_scale)
        return None, None, *map(cast, found, ctx.dtypes)


def _stacked(downs: Sequence[Tensor]) -> Tensor:
    return downs[0] if len(downs) == 1 else torch.cat(list(downs))


def _split(h: Tensor, downs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Split h by columns, into those of each layer."""
    return h.split([a.shape[0] for a in downs], dim=1)
