"""Find the values of inputs with which a program computes its base, as small as its methods allow.

A binding without sites has such values, whose ranks are two, since compilers specialise on zero and one. Runtimes of
other files do not. So a rank of zero is tried on random values, and is taken where a method's own result is the base.
It is not taken where an operator reads an empty tensor that runtimes are not known to compute: ONNX Runtime ends the
process in an ``Einsum`` over nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from adaptc.binding.bind import initial_values
from adaptc.binding.binding import Binding, BindingSpec
from adaptc.methods import AdapterConfig
from adaptc.passes.graph.ops import Op
from adaptc.passes.graph.pytree import pytree
from adaptc.passes.lower.free_axes import free_axes
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.program_method import PROGRAM_FORM
from adaptc.runtime.rank_padding import random_input
from adaptc.torch_typing import shape_of, symbolic_expression

aten = torch.ops.aten

#: FQN of a slot -> the axes whose size follows from the rank
Ranks = Mapping[str, Collection[int]]


#: the operators that other runtimes were seen to compute on empty tensors
_SAFE_WHEN_EMPTY = {
    *(aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default, aten.embedding.default),
    *(aten.mul.Tensor, aten.mul.Scalar, aten.t.default, aten.transpose.int, aten.permute.default),
    *(aten.to.dtype, aten._to_copy.default, aten.detach.default),
}


def ranks_that_may_be_zero(graph: fx.Graph, size_names: Mapping[str, str]) -> frozenset[str]:
    """Return the names of free sizes whose tensors are read by operators alone that take empty ones.

    ``size_names`` maps symbols in the graph's values to the names of sizes.
    """
    found = set(size_names.values())
    for node in graph.nodes:
        if node.op == "call_function" and node.target not in _SAFE_WHEN_EMPTY:
            values = pytree.tree_leaves([i.meta.get("val") for i in node.all_input_nodes])
            sizes = [n for v in values if isinstance(v, Tensor) for n in shape_of(v)]
            symbols = {str(s) for n in [*sizes, *values] if isinstance(n, torch.SymInt) for s in _free_symbols(n)}
            found -= {name for symbol, name in size_names.items() if symbol in symbols}
    return frozenset(found)


def _free_symbols(size: torch.SymInt) -> Iterable[object]:
    return symbolic_expression(size).free_symbols


def identity_binding(spec: BindingSpec, config: AdapterConfig, *, empty: Collection[str]) -> Binding:
    """Return a binding of the base, whose ranks are zero where that is possible and their names are in ``empty``.

    Scales are those of the methods that the program was compiled with, since an adapter without its scale has these.
    """
    base = initial_values(spec, config, methods_by_id={})
    values = dict(base.values)
    for a in spec.attachments:
        scale = a.method.scale(spec.ops[a.id])
        if a.scale_slot is not None and scale is not None:
            values[a.scale_slot] = torch.full_like(values[a.scale_slot], scale)
    if empty:
        free = free_axes(spec.attachments, spec.ops)
        ranks: Ranks = {
            f: [i for i, s in axes.items() if s.is_rank and s.unit_name in empty] for f, axes in free.items()
        }
        for fqn in _slots_that_may_be_empty(spec, values, ranks):
            values[fqn] = _emptied(values[fqn], ranks.get(fqn, ()))
    return replace(base, values=values)


def _slots_that_may_be_empty(spec: BindingSpec, values: Mapping[str, Tensor], ranks: Ranks) -> set[str]:
    """Return the slots that all of their sites take with a rank of zero."""
    known: dict[object, bool] = {}
    refused: set[str] = set()
    for a in spec.attachments:
        op = spec.ops[a.id]
        key = (a.method, op, a.form)
        if key not in known:
            known[key] = _computes_base(a, op, {n: _emptied(values[f], ranks.get(f, ())) for n, f in a.slots.items()})
        if not known[key]:
            refused |= set(a.slots.values())
    # Sites that share a slot have one rank.
    while more := {f for a in spec.attachments if refused & {*a.slots.values()} for f in a.slots.values()} - refused:
        refused |= more
    return {f for a in spec.attachments for f in a.slots.values()} - refused


def _emptied(value: Tensor, axes: Collection[int]) -> Tensor:
    return value.new_empty([0 if i in axes else n for i, n in enumerate(value.shape)]) if axes else value


def _computes_base(a: Attachment, op: Op, slots: Mapping[str, Tensor]) -> bool:
    """Return whether a site computes the base with ``slots``, at random weights and inputs."""
    if a.form == PROGRAM_FORM or all(t.numel() for t in slots.values()):
        return False
    method, generator = a.method.noiseless(), torch.Generator().manual_seed(0)
    slots = {n: t.to("cpu", torch.float32) if t.is_floating_point() else t.cpu() for n, t in slots.items()}
    weight = torch.randn(op.shape, generator=generator)
    scale = None if method.scale(op) is None else torch.tensor(0.7)
    try:
        with torch.no_grad():
            if a.form == "apply":
                x = random_input(op, generator)
                expected, found = op(x, weight), method.call_adapted(op, x, weight, None, slots, scale)
            else:
                expected, found = op.dense(weight), method.weight(op, weight, slots, scale)
    except Exception:  # whatever a method's operators say of a rank of zero
        return False
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
