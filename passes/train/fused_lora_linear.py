"""Fuse layers with LoRA that read one tensor into one step of a training graph, with a backward of its own.

Takes the graph of a module to train, whose lifted inputs are ``get_attr`` nodes with fake values. Layers that read the
same x compute y_i = linear(x, W_i, b_i) + s_i linear(linear(low, A_i), B_i). Here ``adapter_input`` is x, or x after
dropout and a cast. One call then gives all y_i. Outputs and gradients are equal up to the order of sums. In forward and
backward,

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

from adaptc.passes.graph.mutation import erase_dead_nodes, find_written_nodes
from adaptc.passes.graph.ops import argument
from adaptc.passes.graph.pass_infra import GraphPass, PassResult
from adaptc.passes.train.autocast import cast, without_autocast
from adaptc.passes.train.base_products import MatmulKinds, base_input_gradient, base_matmul
from adaptc.passes.train.first_order import first_order_only, needs_plain_ops
from adaptc.torch_modes import autocast_dtype

aten = torch.ops.aten


@dataclass(frozen=True)
class LoraLayer:
    """A layer with LoRA: ``out`` = linear(x, weight, bias) + scale * linear(linear(low, down), up)."""

    x: fx.Node
    adapter_input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    down: fx.Node
    up: fx.Node
    scale: fx.Node
    output: fx.Node


@dataclass(frozen=True)
class FuseLoraLayers(GraphPass):
    """A pass that fuses layers with LoRA; its count is that of the layers."""

    name: ClassVar[str] = "fuse_lora_layers"

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        dirty, _ = find_written_nodes(subject)
        groups: dict[Any, list[LoraLayer]] = {}
        for node in subject.find_nodes(op="call_function", target=aten.linear.default):
            layer = _match_layer(node)
            if layer is not None and dirty.isdisjoint(
                (layer.x, layer.adapter_input, layer.weight, layer.bias, node, layer.output)
            ):
                groups.setdefault((layer.x, layer.adapter_input, layer.down.meta["val"].dtype), []).append(layer)
        for layers in groups.values():
            _emit_fused(subject, layers)
        erase_dead_nodes(subject)
        return PassResult(subject, sum(map(len, groups.values())))


def _match_layer(node: Any) -> LoraLayer | None:
    x, weight, bias = (argument(node, i) for i in range(3))
    if not _is_lifted_input(weight) or not (bias is None or _is_lifted_input(bias)) or len(node.users) != 1:
        return None
    if x.meta["val"].ndim < 2:
        return None
    (sum_node,) = node.users
    if sum_node.target is not aten.add.Tensor or argument(sum_node, 2) != 1:
        return None
    scaled = sum_node.args[1] if sum_node.args[0] is node else sum_node.args[0]
    if not _is_single_use(scaled, aten.mul.Tensor):
        return None
    up, scale = scaled.args
    if not _is_single_use(up, aten.linear.default) or not _is_lifted_input(scale, ()):
        return None
    down = up.args[0]
    if not _is_single_use(down, aten.linear.default) or argument(up, 2) is not None or argument(down, 2) is not None:
        return None
    A, B, adapter_input = argument(down, 1), argument(up, 1), down.args[0]
    if not _is_lifted_input(A) or not _is_lifted_input(B) or not _has_shape_of(x, adapter_input):
        return None
    out, dtype = sum_node, node.meta["val"].dtype
    if sum_node.meta["val"].dtype != dtype:
        casts = [u for u in sum_node.users if u.target is aten.to.dtype and u.args[1] == dtype]
        if len(sum_node.users) != 1 or not casts:
            return None
        out = casts[0]
    return LoraLayer(x, adapter_input, weight, bias, A, B, scale, out)


def _is_single_use(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target and len(node.users) == 1


def _is_lifted_input(node: Any, shape: tuple[int, ...] | None = None) -> bool:
    """Return whether the node is a lifted input of that shape; None stands for any shape."""
    return isinstance(node, fx.Node) and node.op == "get_attr" and shape in (None, tuple(node.meta["val"].shape))


def _has_shape_of(x: fx.Node, adapter_input: Any) -> bool:
    """Return whether ``adapter_input`` has the shape of x."""
    return isinstance(adapter_input, fx.Node) and str(adapter_input.meta["val"].shape) == str(x.meta["val"].shape)


def _emit_fused(graph: fx.Graph, layers: Sequence[LoraLayer]) -> None:
    first = layers[0]
    adapter_input = None if first.adapter_input is first.x else first.adapter_input
    lists = [[getattr(layer, n) for layer in layers] for n in ("weight", "bias", "down", "up", "scale")]
    # Before the first result: all inputs of the layers exist there, and nothing has read a result yet.
    with graph.inserting_before(min(layer.output for layer in layers)):
        made = graph.call_function(lora_linears, (first.x, adapter_input, *lists))
        pieces = [graph.call_function(operator.getitem, (made, i)) for i in range(len(layers))]
    for layer, piece in zip(layers, pieces, strict=True):
        piece.meta = dict(layer.output.meta)
        layer.output.replace_all_uses_with(piece)


def lora_linears(
    x: Tensor,
    adapter_input: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[Tensor],
    kinds: Sequence[MatmulKinds] = (),
) -> Sequence[Tensor]:
    """Return all y_i of the module docstring.

    x is (..., K), and low has its shape, or is None for x itself; W_i (N_i, K), A_i (R_i, K), B_i (N_i, R_i), s_i 0-d.
    All of them get gradients of first order, which cannot be differentiated again. Under autocast y_i have its dtype.

    ``kinds`` says which kinds of matmul to use with each W_i; empty for torch's own. Plain ops compute all of it in
    transforms of ``torch.func`` and in forward mode.
    """
    if needs_plain_ops(x, adapter_input, *weights, *biases, *downs, *ups, *scales):
        return _plain_lora_linears(
            x, x if adapter_input is None else adapter_input, weights, biases, downs, ups, scales
        )
    kinds = kinds or [()] * len(weights)
    step: Any = _LoraLinears  # torch gives apply no types
    return step.apply(kinds, autocast_dtype(x), x, adapter_input, *weights, *biases, *downs, *ups, *scales)


def _plain_lora_linears(x: Tensor, adapter_input: Tensor, *lists: Sequence[Any]) -> Sequence[Tensor]:
    out: list[Tensor] = []
    for w, b, down, up, s in zip(*lists, strict=True):
        y, change = F.linear(x, w, b), s * F.linear(F.linear(adapter_input, down), up)
        out.append((y.to(change.dtype) + change).to(y.dtype))
    return out


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kinds: Sequence[MatmulKinds],
        dtype: torch.dtype | None,
        x: Tensor,
        adapter_input: Tensor | None,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        n = len(kinds)
        ctx.kinds, ctx.shape, ctx.has_adapter_input = kinds, x.shape, adapter_input is not None
        ctx.dtypes = [None if t is None else t.dtype for t in (x, adapter_input, *tensors)]
        ctx.set_materialize_grads(False)
        tensors = (*(cast(t, dtype) for t in tensors[: 4 * n]), *tensors[4 * n :])
        weights, biases, downs, ups, scales = (tensors[i * n : (i + 1) * n] for i in range(5))
        rows = cast(x, dtype).reshape(-1, x.shape[-1])
        adapter_rows = rows if adapter_input is None else cast(adapter_input, dtype).reshape(rows.shape)
        h = adapter_rows @ _stack_downs(downs).t()
        out: list[Tensor] = []
        for w, b, up, s, part, by in zip(weights, biases, ups, scales, _split_by_layer(h, downs), kinds, strict=True):
            y = base_matmul(rows, w, b, by)
            wide = y.to(h.dtype).addmm_(part * s, up.t()).to(y.dtype)
            out.append(wide.reshape(*x.shape[:-1], wide.shape[-1]))
        both = ctx.has_adapter_input and any(ctx.needs_input_grad[4 : 4 + n])
        # The inputs themselves where nothing was cast: through them a second derivative reaches the error.
        source = x if adapter_input is None else adapter_input
        adapter_rows, rows = (
            source if cast(source, dtype) is source else adapter_rows,
            x if cast(x, dtype) is x else rows,
        )
        # Weights and factors belong to the module, so keeping them costs nothing. Their casts under autocast cost
        # memory, which autograd would keep as well.
        ctx.save_for_backward(adapter_rows, rows if both else None, h, *weights, *downs, *ups, *scales)
        return tuple(out)

    @staticmethod
    @first_order_only("a layer with its adapter")
    @without_autocast
    def backward(ctx: Any, *gs: Tensor | None) -> tuple[Tensor | None, ...]:
        n = len(ctx.kinds)
        adapter_input, x, h, *tensors = ctx.saved_tensors
        adapter_input, x = (
            adapter_input.reshape(-1, adapter_input.shape[-1]),
            None if x is None else x.reshape(-1, x.shape[-1]),
        )
        weights, downs, ups, scales = (tensors[i * n : (i + 1) * n] for i in range(4))
        needs_x, needs_low, *needs = ctx.needs_input_grad[2:]
        need_w, need_b, need_down, need_up, need_scale = (needs[i * n : (i + 1) * n] for i in range(5))
        rows = adapter_input if x is None else x
        gradients: Any = [[None] * n for _ in range(4)]
        d_w, d_b, d_up, d_scale = gradients
        d_x: Any = None
        all_d_h_columns: list[Tensor] = []
        for i, (g, h_columns) in enumerate(zip(gs, _split_by_layer(h, downs), strict=True)):
            if g is None:
                all_d_h_columns.append(torch.zeros_like(h_columns))
                continue
            g = g.reshape(-1, g.shape[-1])
            if needs_x:
                d_x = base_input_gradient(g, weights[i], ctx.kinds[i], d_x)
            d_w[i] = g.t() @ rows if need_w[i] else None
            d_b[i] = g.sum(0) if need_b[i] else None
            g = g.to(h.dtype)
            d_part = g @ ups[i]
            d_scale[i] = (d_part * h_columns).sum() if need_scale[i] else None
            all_d_h_columns.append(d_part.mul_(scales[i]))
            d_up[i] = g.t() @ (h_columns * scales[i]) if need_up[i] else None
        d_h = all_d_h_columns[0] if n == 1 else torch.cat(all_d_h_columns, 1)
        d_down = (d_h.t() @ adapter_input).split([a.shape[0] for a in downs]) if any(need_down) else [None] * n
        d_low = None
        if ctx.has_adapter_input:
            d_low = (d_h @ _stack_downs(downs)).reshape(ctx.shape) if needs_low else None
        elif d_x is not None:
            d_x = d_x.to(h.dtype).addmm_(d_h, _stack_downs(downs)).to(d_x.dtype)
        d_x = None if d_x is None else d_x.reshape(ctx.shape)
        gradients = (d_x, d_low, *d_w, *d_b, *d_down, *d_up, *d_scale)
        return None, None, *map(cast, gradients, ctx.dtypes)


def _stack_downs(downs: Sequence[Tensor]) -> Tensor:
    return downs[0] if len(downs) == 1 else torch.cat(list(downs))


def _split_by_layer(h: Tensor, downs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Split h by columns, into those of each layer."""
    untyped: Any = h  # torch gives split no types
    return untyped.split([a.shape[0] for a in downs], dim=1)
