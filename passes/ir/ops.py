"""What a consuming op means: the one table of layer kinds, shared by every method.

A method never sees ``nn.Linear`` or ``nn.Conv2d``. It sees an :class:`Op`: the op that consumes the weight, with every
argument but input, weight and bias fixed, and its weight turned into the *canonical* layout

    linear, addmm, embedding   (out, in)            embedding: out = width, in = vocabulary
    conv1d/2d/3d, weight       (out, in/groups, *kernel)
    experts                    (experts, out, in)

Adding a layer kind means adding it here; no method changes. Every function below is plain PyTorch, so that it can be
traced into a region, run eagerly by a merge, and serve as the oracle of a test, all with one meaning.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

aten = torch.ops.aten

#: op -> (kind, position of input, weight and bias, position of the first remaining argument)
TABLE: dict[Any, tuple[str, int, int, int | None, int]] = {
    aten.linear.default: ("linear", 0, 1, 2, 3),
    aten.addmm.default: ("addmm", 1, 2, 0, 3),
    aten.conv1d.default: ("conv1d", 0, 1, 2, 3),
    aten.conv1d.padding: ("conv1d", 0, 1, 2, 3),
    aten.conv2d.default: ("conv2d", 0, 1, 2, 3),
    aten.conv2d.padding: ("conv2d", 0, 1, 2, 3),
    aten.conv3d.default: ("conv3d", 0, 1, 2, 3),
    aten.conv3d.padding: ("conv3d", 0, 1, 2, 3),
    aten.embedding.default: ("embedding", 1, 0, None, 2),
}

TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)

#: ops between a parameter and its consumer that only change dtype or identity, never the layout
CASTS = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.detach.default,
    aten.alias.default,
    aten.contiguous.default,
)


#: where a convolution made dense keeps its number of groups, which is the last argument of all of them
GROUPS = "adaptc_groups"
#: custom meta of a lookup in an embedding with max_norm: the largest norm of a row, and which norm
BOUND = "adaptc_max_norm"
#: custom meta of what reads the weight of a module whose class derives from a linear layer's
LINEAR = "adaptc_linear"
#: custom meta of a node that stands for a layer inside a block (see ``blocks``)
INSIDE = "adaptc_inside"
_BY_NAME = {str(target): target for target in TABLE}


@dataclass(frozen=True)
class Op:
    """One consuming op. ``shape`` is the canonical weight shape; ``rest`` are the op's remaining arguments. ``bound``:
    of an embedding with ``max_norm``, the largest norm that a row may have, and which norm. Its weight keeps to it."""

    kind: str
    shape: tuple[int, ...]
    target: Any = None
    rest: tuple[Any, ...] = ()
    bound: tuple[float, float] | None = None

    @property
    def callable(self) -> bool:
        """Whether the op can be run as op(x, weight); if not, only the weight form exists."""
        return self.target is not None

    def at(self, consumer: fx.Node) -> Op:
        """This op as another of the weight's consumers has it: the same layer may be called with another stride."""
        if not self.callable or consumer.target not in TABLE:
            return self
        return replace(self, target=consumer.target, rest=_rest(consumer), bound=bound_of(consumer))

    @property
    def is_conv(self) -> bool:
        return self.kind.startswith("conv") and self.callable

    @property
    def groups(self) -> int:
        return self.rest[3] if self.is_conv and len(self.rest) > 3 else 1

    @property
    def experts(self) -> int:
        """How many matrices the weight stacks; 0 for one plain weight."""
        return self.shape[0] if self.kind.startswith("experts") else 0

    @property
    def out_features(self) -> int:
        return self.shape[1] if self.experts else self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[-1] if self.experts else self.shape[1] * self.groups

    @property
    def kernel(self) -> tuple[int, ...]:
        return () if self.experts else self.shape[2:]

    def canonical(self, weight: Tensor) -> Tensor:
        """The parameter as stored -> canonical layout (a view)."""
        if self.kind in ("addmm", "embedding"):
            return weight.t()
        return weight.transpose(-2, -1) if self.kind == "experts_t" else self._swap(weight)

    def stored(self, canonical: Tensor) -> Tensor:
        """Inverse of :meth:`canonical`; it is its own inverse, kept apart so that callers say what they mean."""
        return self.canonical(canonical)

    def _swap(self, weight: Tensor) -> Tensor:
        return weight.transpose(0, 1) if self.kind == "conv_transpose" else weight

    def __call__(self, x: Tensor, canonical: Tensor, bias: Tensor | None = None) -> Tensor:
        """The op with another weight; a weight made dense (see :meth:`dense`) runs with one group."""
        if self.kind in ("linear", "addmm"):
            return F.linear(x, canonical, bias)
        if self.kind == "embedding":
            return aten.embedding(self.stored(canonical), x, *self.rest)
        return self._conv(x, canonical, bias, self.groups if canonical.shape[1] == self.shape[1] else 1)

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        stride, padding, dilation, _ = self.rest
        return self.target(x, weight, bias, stride, padding, dilation, groups)

    def as_input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` cast to ``dtype``, unless it is a tensor of indices."""
        return x if self.kind == "embedding" else cast(x, dtype)

    def down_up(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """op(x, product(a, b)) without ever forming the product: through the rank and up again."""
        if self.kind == "embedding":
            return F.linear(aten.embedding(a.t(), x, *self.rest), b)
        if self.is_conv:
            return self._pointwise(self._conv(x, a, None, 1), b)
        return F.linear(F.linear(x, a), b)

    def bounded(self, canonical: Tensor) -> Tensor:
        """What an embedding with ``max_norm`` makes of another tensor that it looks rows up in: (any, vocabulary) with
        no column longer than :attr:`bound` allows. The gradient passes as if nothing was done, as torch has it."""
        if self.bound is None:
            return canonical
        most, order = self.bound
        rows = self.stored(canonical)
        constant = rows.detach()
        length = torch.linalg.vector_norm(constant, order, dim=-1, keepdim=True)
        short = torch.where(length > most, constant * (most / (length + 1e-7)), constant)
        return self.canonical(short + (rows - constant))

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """op(x, a) for a weight with any number of rows, without bias and with one group."""
        if self.kind == "embedding":
            return aten.embedding(a.t(), x, *self.rest)
        return self._conv(x, a, None, 1) if self.is_conv else F.linear(x, a)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        """A matrix (out, channels) on the channels of ``h``, what this op gives with a weight of that many rows."""
        for _ in self.kernel:
            b = b.unsqueeze(-1)
        return self._pointwise(h, b) if self.is_conv else F.linear(h, b)

    def _pointwise(self, h: Tensor, b: Tensor) -> Tensor:
        conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(self.kernel)]
        return conv(h, b, groups=self.groups)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Down and up projection multiplied out to a weight of the canonical shape (dense when ``groups`` > 1)."""
        if self.experts or (a.ndim == 2 and not self.kernel):
            return b @ a
        up = b.flatten(1)
        if self.groups > 1:
            up = _block_diagonal(up, self.groups)
        return (up @ a.flatten(1)).reshape(self.out_features, self.in_features, *self.kernel)

    def plus(self, canonical: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        """dense(canonical) + scale * product(a, b); one product that adds to the weight, where one op can."""
        weight = self.dense(canonical)
        exact = weight.dtype in (torch.float32, torch.float64)  # the scale must not be rounded with B
        if exact and weight.ndim == a.ndim == b.ndim == 2 and weight.dtype == a.dtype == b.dtype:
            return torch.addmm(weight, b * scale, a)
        return weight + self.product(a, b) * scale

    def dense(self, canonical: Tensor) -> Tensor:
        """The same map as a weight that reads every input channel: a grouped convolution as an ungrouped one."""
        return _block_diagonal(canonical, self.groups) if self.groups > 1 else canonical

    def along_out(self, v: Tensor, y: Tensor) -> Tensor:
        """A vector of size (out,) shaped to broadcast over this op's output ``y``."""
        return v.reshape(-1, *([1] * len(self.kernel))) if self.is_conv else v

    def along_in(self, v: Tensor, x: Tensor) -> Tensor:
        """A vector of size (in,) shaped to broadcast over this op's input ``x``."""
        return self.along_out(v, x)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the canonical weight as it is: kernels, and the inputs of one group, in the columns."""
        return self.shape[0], prod(self.shape[1:])

    def matrix(self, canonical: Tensor) -> Tensor:
        """The canonical weight as a matrix of :attr:`matrix_shape`, channels before kernel positions in a row."""
        return canonical.reshape(self.matrix_shape)

    def unmatrix(self, matrix: Tensor) -> Tensor:
        """Inverse of :meth:`matrix`."""
        return matrix.reshape(self.shape)

    @property
    def pointwise(self) -> bool:
        """Whether an output reads each input channel at one place only: a map of the channels can go to the input."""
        if self.is_conv:
            return all(k == 1 for k in self.kernel) and self.groups == 1
        return self.kind in ("linear", "addmm")


def _block_diagonal(w: Tensor, groups: int) -> Tensor:
    """(out, in/g, *k), g blocks of rows, -> (out, in, *k) with zeros off the blocks."""
    # -1 and not the number of columns: in a factor it is the rank, which no region may depend on.
    rows, kernel = w.shape[0] // groups, w.shape[2:]
    blocks = w.reshape(groups, rows, -1, *kernel).movedim(0, -1)
    return torch.diag_embed(blocks, dim1=0, dim2=2).reshape(groups * rows, -1, *kernel)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` in ``dtype``; unlike ``t.to`` it leaves no node in a trace when there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def operands(node: fx.Node) -> tuple[Any, Any, Any]:
    """(input, weight, bias) arguments of a node whose target is in :data:`TABLE`; bias is None when absent."""
    _, xi, wi, bi, _ = TABLE[node.target]
    return argument(node, xi), argument(node, wi), None if bi is None else argument(node, bi)


def argument(node: fx.Node, position: int) -> Any:
    """A node's argument by schema position, wherever it was written, with the schema's default."""
    if position < len(node.args):
        return node.args[position]
    schema = node.target._schema.arguments[position]  # type: ignore[union-attr]  # OpOverload
    return node.kwargs.get(schema.name, schema.default_value if schema.has_default_value() else None)


def set_argument(node: fx.Node, position: int, value: Any) -> None:
    """Write a node's argument by schema position, wherever it stands."""
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(node.target._schema.arguments[position].name, value)  # type: ignore[union-attr]


def op_of(kind: str, weight: Tensor, consumer: fx.Node | None) -> Op:
    """The :class:`Op` of a site: ``weight`` as stored (a fake tensor will do), ``consumer`` one of its nodes."""
    probe = Op(kind, tuple(weight.shape))
    shape = tuple(int(s) for s in probe.canonical(weight).shape) if weight.ndim > 1 else tuple(weight.shape)
    target, rest = (None, ()) if consumer is None else called(consumer)
    known = target in TABLE and TABLE[target][0] == kind
    bound = None if consumer is None else bound_of(consumer)
    return Op(kind, shape, target if known else None, rest if known else (), bound)


def bound_of(consumer: fx.Node) -> tuple[float, float] | None:
    """What the rows that a node looks up keep to: the largest norm, and which; None where there is no such thing."""
    bound = (consumer.meta.get("custom") or {}).get(BOUND)
    return None if bound is None else (float(bound[0]), float(bound[1]))


def mark_bound(consumer: fx.Node, bound: tuple[float, float]) -> None:
    """Write down what :func:`bound_of` reads; as texts, for no other form of infinity is safe in files."""
    consumer.meta["custom"] = {**(consumer.meta.get("custom") or {}), BOUND: [str(v) for v in bound]}


def called(consumer: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    """The op by which a consumer reads a weight, and its remaining arguments; (None, ()) for what no table knows."""
    meta = (consumer.meta.get("custom") or {}).get(INSIDE)
    if meta is not None:
        return (None, ()) if meta["op"] is None else (_BY_NAME[meta["op"][0]], _frozen(meta["op"][1]))
    return (consumer.target, _rest(consumer)) if consumer.target in TABLE else (None, ())


def _rest(consumer: fx.Node) -> tuple[Any, ...]:
    first = TABLE[consumer.target][4]
    n = len(consumer.target._schema.arguments)  # type: ignore[union-attr]
    rest = [_frozen(argument(consumer, i)) for i in range(first, n)]
    groups = (consumer.meta.get("custom") or {}).get(GROUPS)
    return tuple(rest if groups is None else [*rest[:-1], groups])


def make_dense(consumer: fx.Node, remember: bool) -> None:
    """Run a grouped convolution with one group, since its weight became dense; for good, or to be undone."""
    count = len(consumer.target._schema.arguments)  # type: ignore[union-attr]
    arguments = [argument(consumer, i) for i in range(count)]
    if remember:
        consumer.meta["custom"] = {GROUPS: arguments[-1], **(consumer.meta.get("custom") or {})}
    consumer.args, consumer.kwargs = (*arguments[:-1], 1), {}


def make_grouped(consumer: fx.Node) -> None:
    """Undo :func:`make_dense`, if it was done."""
    custom = dict(consumer.meta.get("custom") or {})
    if GROUPS in custom:
        consumer.args = (*consumer.args[:-1], custom.pop(GROUPS))
        consumer.meta["custom"] = custom


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value
