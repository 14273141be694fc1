"""Bring tensors into the memory layout that compiled code was made for.

A tensor may have any strides: it may be transposed, expanded or a slice. It is copied only where it does not have the
layout already.

:class:`CompiledStrides` lays out the inputs of compiled code as it was compiled for. An input of other strides is
copied. What the code writes to such a copy is then written to the caller's tensor, too. :func:`pad_and_lay_out` first
pads the ranks of an adapter, where the code is for other ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from adaptc.errors import AdaptcError, BackendError
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.attachment import Attachment
from adaptc.runtime.rank_padding import pad_rank_one, pad_to_buckets


def axis_order(value: Tensor) -> tuple[int, ...]:
    """Return the axes of a tensor from the outermost to the innermost in memory.

    They are in their own order where the tensor has gaps, or where a size is not known. Symbolic sizes and strides
    count with the values of the example inputs.
    """
    shape, stride = ([_size_or_hint(n) for n in sizes] for sizes in (value.shape, value.stride()))
    plain = _natural_order(len(shape))
    if any(n is None for n in (*shape, *stride)) or _is_dense(shape, stride, plain):
        return plain
    order = tuple(sorted(plain, key=lambda i: (-stride[i], -shape[i], i)))
    return order if _is_dense(shape, stride, order) else plain


def _size_or_hint(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.hint


def _is_dense(shape: Sequence[int], stride: Sequence[int], order: Sequence[int]) -> bool:
    step = 1
    for i in reversed(order):
        if shape[i] != 1 and stride[i] != step:
            return False
        step *= max(shape[i], 1)
    return True


def empty_in_order(order: Sequence[int], shape: Sequence[Any], like: Tensor) -> Tensor:
    """Return an uninitialised tensor of ``shape`` with its axes in memory in ``order``.

    It has the dtype and device of ``like``.
    """
    made = torch.empty([shape[i] for i in order], dtype=like.dtype, device=like.device)
    return made.permute(_inverse_order(order))


def lay_out(value: Tensor, order: Sequence[int]) -> Tensor:
    """Return ``value`` with its axes in memory in ``order``, dense: itself where it lies so already, else a copy."""
    turned = value.permute(tuple(order))
    return value if turned.is_contiguous() else turned.contiguous().permute(_inverse_order(order))


def write_back(destination: Tensor, source: Tensor, name: str) -> None:
    """Copy what a program wrote to ``source``, a copy of its input, to the tensor ``destination`` as that input.

    Raises AdaptcError where elements of ``destination`` share memory, as those of an expanded tensor do.
    """
    try:
        with torch.no_grad():
            destination.copy_(source)
    except RuntimeError as error:
        raise AdaptcError(
            f"the program writes to its input {name}, and elements of the tensor it was given share memory (it was "
            "expanded): give it a tensor of its own, tensor.contiguous()"
        ) from error


def _inverse_order(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


@cache
def _natural_order(ndim: int) -> tuple[int, ...]:
    return tuple(range(ndim))


class CompiledStrides:
    """The memory layouts that the compiled code of a graph takes for granted, as an order of axes for each input.

    ``names`` are the placeholders of lifted inputs; those in ``slots`` may change their sizes, and are contiguous.
    ``written`` are the placeholders that the graph writes to.
    """

    def __init__(
        self, graph: fx.Graph, names: Collection[str], slots: Collection[str], written: Collection[str]
    ) -> None:
        self._lifted_orders: dict[str, tuple[int, ...]] = {}
        self._input_orders: list[tuple[int, ...] | None] = []
        self._written_inputs: list[int] = []
        for node in graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            order = axis_order(value) if isinstance(value, Tensor) else None
            if node.name not in names:
                if node.name in written:
                    self._written_inputs.append(len(self._input_orders))
                self._input_orders.append(order)
            elif order is not None and node.name not in slots:
                self._lifted_orders[node.name] = order
        self._written_lifted = {n for n in written if n in names}

    def lay_out_lifted(self, names: Sequence[str], values: Sequence[Any]) -> list[Any]:
        """Return the values of the lifted inputs ``names`` in the layouts of the code.

        Slots, and the buffers that packing made, are laid out contiguously. Raises BackendError for an input that the
        graph writes to and that is not contiguous.
        """
        out: list[Any] = []
        for name, value in zip(names, values, strict=True):
            new = (
                lay_out(value, self._lifted_orders.get(name) or range(value.ndim))
                if isinstance(value, Tensor)
                else value
            )
            if new is not value and name in self._written_lifted:
                raise BackendError(
                    f"calls write to {name!r}, whose strides {value.stride()} inductor cannot be told: make it "
                    "contiguous in the model, or use backend='eager'"
                )
            out.append(new)
        return out

    def lay_out_inputs(self, flat: Sequence[Any]) -> list[Any]:
        """Return the user's inputs ``flat`` in the layouts of the code."""
        return [v if order is None else lay_out(v, order) for v, order in zip(flat, self._input_orders, strict=True)]

    def write_back(self, flat: Sequence[Any], laid_out: Sequence[Any]) -> None:
        """Copy what a call wrote to ``laid_out`` back to the user's inputs ``flat``.

        Raises AdaptcError where elements of a user's tensor share memory.
        """
        for i in self._written_inputs:
            if laid_out[i] is not flat[i]:
                write_back(flat[i], laid_out[i], f"number {i}")


def pad_and_lay_out(
    values: list[Any],
    *,
    names: Sequence[str | None],
    graph_names: Sequence[str],
    attachments: Sequence[Attachment],
    ops: Mapping[str, Op],
    strides: CompiledStrides | None,
    training: bool,
    in_buckets: bool,
) -> list[Any]:
    """Return the lifted inputs with the ranks and in the layouts that the code is for.

    They are ``names`` in the program, and ``graph_names`` in the graph. Recorded calls are for a few ranks, which
    others are padded to. Compiled code, which has ``strides``, takes no rank of one.
    """
    if in_buckets:
        values = pad_to_buckets(values, names, attachments, ops)
    if strides is None:
        return values
    roomy = pad_rank_one(values, names=names, attachments=attachments, ops=ops, training=training)
    return strides.lay_out_lifted(graph_names, roomy)
