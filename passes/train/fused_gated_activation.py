"""Fuse gated activations of a training graph into one step that keeps only its two inputs.

Takes the graph of a module to train. act(a) * b becomes one call, equal in outputs and gradients. Autograd alone would
keep a, b and act(a), which are the widest activations of a transformer. Here the backward computes act(a) again, which
is cheap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from adaptc.passes.graph.mutation import erase_dead_nodes, find_written_nodes
from adaptc.passes.graph.pass_infra import GraphPass, PassResult
from adaptc.passes.train.autocast import without_autocast
from adaptc.passes.train.first_order import first_order_only, needs_plain_ops

aten = torch.ops.aten

#: activation -> its backward op, which takes the gradient, the input, and the activation's options
BACKWARD_OPS: dict[Any, Any] = {
    aten.silu.default: aten.silu_backward.default,
    aten.gelu.default: aten.gelu_backward.default,
}


@dataclass(frozen=True)
class FuseGatedActivations(GraphPass):
    """A pass that fuses gated activations; its count is that of the gates."""

    name: ClassVar[str] = "fuse_gated_activations"

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        dirty, _ = find_written_nodes(subject)
        count = 0
        for node in subject.find_nodes(op="call_function", target=aten.mul.Tensor):
            gate = next((a for a in node.args if _is_activation(a)), None)
            if gate is None:
                continue
            other = node.args[1] if node.args[0] is gate else node.args[0]
            a = gate.args[0]
            if (
                not isinstance(other, fx.Node)
                or not dirty.isdisjoint((node, gate, other, a))
                or not _have_same_meta(a, other)
            ):
                continue
            with subject.inserting_before(node):
                new = subject.call_function(gated_activation, (a, other, gate.target, dict(gate.kwargs)))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            count += 1
        erase_dead_nodes(subject)
        return PassResult(subject, count)


def _is_activation(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in BACKWARD_OPS and len(node.users) == 1 and len(node.args) == 1


def _have_same_meta(a: Any, b: fx.Node) -> bool:
    """Return whether two values have one shape and dtype, so that no gradient must be summed or cast."""
    first, second = a.meta["val"], b.meta.get("val")
    if not isinstance(second, Tensor) or a is b:
        return False
    return str(first.shape) == str(second.shape) and first.dtype == second.dtype


def gated_activation(a: Tensor, b: Tensor, act: Any, options: dict[str, Any]) -> Tensor:
    """Return act(a) * b, for a and b of one shape, with first-order gradients for both.

    Plain ops compute it where autocast gave a and b different dtypes, and in transforms of ``torch.func``.
    """
    if a.dtype != b.dtype or needs_plain_ops(a, b):
        return act(a, **options) * b
    step: Any = _GatedActivation  # torch gives apply no types
    return step.apply(a, b, act, options)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor, act: Any, options: dict[str, Any]) -> Tensor:
        made = act(a, **options)
        # Not in place under a compiler: that of torch 2.11 loses the gradients of results that were written to.
        return made * b if torch.compiler.is_compiling() else made.mul_(b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, ctx.act, ctx.options = inputs
        ctx.save_for_backward(a, b)

    @staticmethod
    @first_order_only("a gated activation")
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        d_a = BACKWARD_OPS[ctx.act](g * b, a, **ctx.options) if ctx.needs_input_grad[0] else None
        d_b = ctx.act(a, **ctx.options).mul_(g) if ctx.needs_input_grad[1] else None
        return d_a, d_b, None, None
