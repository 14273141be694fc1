"""The one table of layer kinds, shared by every method: which ops read a weight, and what they compute with it.

A method never sees ``nn.Linear`` or ``nn.Conv2d``. It sees an :class:`Op`, the op that reads the weight, with every
argument fixed except input, weight and bias. The weight is turned into the *canonical* layout

    linear, addmm, embedding   (out, in)            embedding: out = width, in = vocabulary
    conv1d/2d/3d, weight       (out, in/groups, *kernel)
    experts                    (experts, out, in)

A new layer kind is added here, and no method changes. Every function below is plain PyTorch. A region can trace it, a
merge can run it eagerly, and a test can use it as the oracle, all with one meaning.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from adaptc.torch_typing import is_dict, is_list_or_tuple, vector_norm

aten = torch.ops.aten

#: op -> (kind, position of input, weight and bias, position of the first remaining argument)
LAYER_OPS: dict[Any, tuple[str, int, int, int | None, int]] = {
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

TRANSPOSED_CONVS = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)

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


#: custom meta of a grouped convolution that was made dense: its number of groups, the last argument of its op
GROUPS_META = "adaptc_groups"
#: custom meta of a lookup in an embedding with max_norm: the largest norm of a row, and the order of the norm
MAX_NORM_META = "adaptc_max_norm"
#: custom meta of a node that reads the weight of a module whose class derives from a linear layer class
LINEAR_META = "adaptc_linear"
#: custom meta of a node that stands for a layer inside a block (see ``blocks``)
SUBGRAPH_INPUT_META = "adaptc_inside"
_BY_NAME = {str(target): target for target in LAYER_OPS}


@dataclass(frozen=True)
class Op:
    """The op that reads a weight, with all its arguments but input, weight and bias.

    Attributes:
        kind: the kind of layer, such as "linear", "embedding", "conv2d" or "experts".
        shape: the canonical shape of the weight: (out, in), or (out, in / groups, *kernel) for convolutions.
        target: the op; None where only the weight is known, and not how it is read.
        other_args: the remaining arguments of the op.
        max_norm: (largest norm of a row, order of the norm) of an embedding with ``max_norm``, whose weight keeps to
            it. None for all others.
        has_bias: whether the layer adds a bias. It says nothing where the op is unknown.

    Arguments of the functions:
        - `x`: an input of the layer.
        - `y`: an output of the layer.
        - `weight`: the weight as the parameter stores it.
        - `canonical`: the weight in canonical layout, :attr:`shape`.
        - `a`: the projection down to the rank, (rank, in), for convolutions (rank, in, *kernel).
        - `b`: the projection up from the rank, (out, rank).
        - `h`: an output of :meth:`down`.
        - `v`: a vector.
        - `matrix`: the canonical weight as a matrix.
        - `scale`: a 0-d tensor.

    Example:
        >>> op = adaptc.methods.Op("linear", (5, 7), torch.ops.aten.linear.default)
        >>> a, b = torch.randn(2, 7), torch.randn(5, 2)
        >>> torch.allclose(op.down_up(torch.ones(3, 7), a, b), torch.ones(3, 7) @ op.product(a, b).T, atol=1e-5)
        True
    """

    kind: str
    shape: tuple[int, ...]
    target: Any = None
    other_args: tuple[Any, ...] = ()
    max_norm: tuple[float, float] | None = None
    has_bias: bool = True

    @property
    def callable(self) -> bool:
        """Return whether the op can be run as op(x, weight); if not, only the weight form exists."""
        return self.target is not None

    def as_called_by(self, consumer: fx.Node) -> Op:
        """Return this op as another node that reads the weight calls it, perhaps with another stride."""
        if not self.callable or consumer.target not in LAYER_OPS:
            return self
        return replace(self, target=consumer.target, other_args=_other_args(consumer), max_norm=max_norm_of(consumer))

    @property
    def is_conv(self) -> bool:
        """Return whether the op is a convolution that can be called."""
        return self.kind.startswith("conv") and self.callable

    @property
    def groups(self) -> int:
        """Return the number of groups of a convolution; 1 for other ops."""
        return self.other_args[3] if self.is_conv and len(self.other_args) > 3 else 1

    @property
    def experts(self) -> int:
        """Return how many matrices the weight stacks; 0 for one plain weight."""
        return self.shape[0] if self.kind.startswith("experts") else 0

    @property
    def out_features(self) -> int:
        """Return the number of outputs of the layer."""
        return self.shape[1] if self.experts else self.shape[0]

    @property
    def in_features(self) -> int:
        """Return the number of inputs of the layer, of all groups."""
        return self.shape[-1] if self.experts else self.shape[1] * self.groups

    @property
    def kernel(self) -> tuple[int, ...]:
        """Return the sizes of a convolution's kernel; () for other ops."""
        return () if self.experts else self.shape[2:]

    def canonical(self, weight: Tensor) -> Tensor:
        """Return a view of the parameter, given as stored, in canonical layout."""
        if self.kind in ("addmm", "embedding"):
            return weight.t()
        return weight.transpose(-2, -1) if self.kind == "experts_t" else self._swap_channels(weight)

    def stored(self, canonical: Tensor) -> Tensor:
        """Return a canonical weight in the parameter's stored layout; the inverse of :meth:`canonical`.

        The two are one function, since each is a transposition or nothing. They have two names so that callers say what
        they mean.
        """
        return self.canonical(canonical)

    def _swap_channels(self, weight: Tensor) -> Tensor:
        return weight.transpose(0, 1) if self.kind == "conv_transpose" else weight

    def __call__(self, x: Tensor, canonical: Tensor, bias: Tensor | None = None) -> Tensor:
        """Run the op with another weight; a weight made dense (see :meth:`dense`) runs with one group."""
        if self.kind in ("linear", "addmm"):
            return F.linear(x, canonical, bias)
        if self.kind == "embedding":
            return aten.embedding(self.stored(canonical), x, *self.other_args)
        return self._run_conv(x, canonical, bias, self.groups if canonical.shape[1] == self.shape[1] else 1)

    def _run_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        stride, padding, dilation, _ = self.other_args
        return self.target(x, weight, bias, stride, padding, dilation, groups)

    def cast_input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``x`` cast to ``dtype``, unless it is a tensor of indices."""
        return x if self.kind == "embedding" else cast(x, dtype)

    def down_up(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return op(x, product(a, b)) without forming that weight: project ``x`` down to the rank, then up."""
        if self.kind == "embedding":
            return F.linear(aten.embedding(a.t(), x, *self.other_args), b)
        if self.is_conv:
            return self._pointwise_conv(self._run_conv(x, a, None, 1), b)
        return F.linear(F.linear(x, a), b)

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Return :meth:`down_up` of two matrices, for an op without groups.

        Args:
            x: the op's input.
            down: (rank, columns of the weight as a matrix).
            up: (rows of the weight as a matrix, rank).
        """
        return self.up(self.down(x, down.reshape(-1, *self.shape[1:])), up)

    def with_max_norm(self, canonical: Tensor) -> Tensor:
        """Return ``canonical`` (any, vocabulary) with each column scaled down to the norm that :attr:`max_norm` allows.

        This is what an embedding with ``max_norm`` does to a tensor that it looks rows up in. As in torch, the gradient
        passes unchanged.
        """
        if self.max_norm is None:
            return canonical
        limit, order = self.max_norm
        rows = self.stored(canonical)
        constant = rows.detach()
        length = vector_norm(constant, order, dim=-1, keepdim=True)
        short = torch.where(length > limit, constant * (limit / (length + 1e-7)), constant)
        return self.canonical(short + (rows - constant))

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """Return op(x, a) for a weight with any number of rows, without bias and with one group."""
        if self.kind == "embedding":
            return aten.embedding(a.t(), x, *self.other_args)
        return self._run_conv(x, a, None, 1) if self.is_conv else F.linear(x, a)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        """Return the matrix ``b`` (out, channels) applied to ``h``, an output of this op with ``channels`` channels."""
        for _ in self.kernel:
            b = b.unsqueeze(-1)
        return self._pointwise_conv(h, b) if self.is_conv else F.linear(h, b)

    def _pointwise_conv(self, h: Tensor, b: Tensor) -> Tensor:
        conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(self.kernel)]
        return conv(h, b, groups=self.groups)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the matmul of up and down projection in the weight's canonical shape, dense where ``groups`` > 1."""
        if self.experts or (a.ndim == 2 and not self.kernel):
            return b @ a
        up = b.flatten(1)
        if self.groups > 1:
            up = _block_diagonal(up, self.groups)
        return (up @ a.flatten(1)).reshape(self.out_features, self.in_features, *self.kernel)

    def add_low_rank(self, canonical: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        """Return dense(canonical) + scale * product(a, b), by one ``addmm`` where shapes and dtypes allow it."""
        weight = self.dense(canonical)
        exact = weight.dtype in (torch.float32, torch.float64)  # the scale must not be rounded with B
        if exact and weight.ndim == a.ndim == b.ndim == 2 and weight.dtype == a.dtype == b.dtype:
            return torch.addmm(weight, b * scale, a)
        return weight + self.product(a, b) * scale

    def dense(self, canonical: Tensor) -> Tensor:
        """Return the weight of an ungrouped convolution that equals this grouped one; other weights unchanged."""
        return _block_diagonal(canonical, self.groups) if self.groups > 1 else canonical

    def along_out(self, v: Tensor, y: Tensor) -> Tensor:
        """Return a vector (out,) shaped to broadcast over this op's output ``y``."""
        return v.reshape(-1, *([1] * len(self.kernel))) if self.is_conv else v

    def along_in(self, v: Tensor, x: Tensor) -> Tensor:
        """Return a vector (in,) shaped to broadcast over this op's input ``x``."""
        return self.along_out(v, x)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Return (rows, columns) of the canonical weight as a matrix.

        The columns are the inputs of one group, times the positions of the kernel.
        """
        return self.shape[0], prod(self.shape[1:])

    def matrix(self, canonical: Tensor) -> Tensor:
        """Return the canonical weight as a matrix of :attr:`matrix_shape`; kernel positions vary fastest in a row."""
        return canonical.reshape(self.matrix_shape)

    def unmatrix(self, matrix: Tensor) -> Tensor:
        """Return the canonical weight of a matrix; the inverse of :meth:`matrix`."""
        return matrix.reshape(self.shape)

    @property
    def is_pointwise(self) -> bool:
        """Return whether each output position reads only one input position.

        A map of the input's channels can then be applied to the input instead of the weight.
        """
        if self.is_conv:
            return all(k == 1 for k in self.kernel) and self.groups == 1
        return self.kind in ("linear", "addmm")


def _block_diagonal(w: Tensor, groups: int) -> Tensor:
    """Return the weight (out, in/groups, *kernel) as (out, in, *kernel), with zeros between the groups."""
    # -1 and not the number of columns: in a low-rank factor that number is the rank, which no region may depend on.
    rows, kernel = w.shape[0] // groups, w.shape[2:]
    blocks = w.reshape(groups, rows, -1, *kernel).movedim(0, -1)
    return torch.diag_embed(blocks, dim1=0, dim2=2).reshape(groups * rows, -1, *kernel)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``t`` in ``dtype``; unlike ``t.to``, a cast that changes nothing leaves no node in a trace."""
    return t if t.dtype == dtype else t.to(dtype)


def schema_of(op: Any) -> torch.FunctionSchema:
    """Return the schema of ``op``, an ``OpOverload``; fx gives the target of a node no narrower type."""
    return op._schema


def custom_meta(node: fx.Node) -> dict[str, Any]:
    """Return what captures and passes wrote into the custom meta of a node; an empty dict for most nodes."""
    custom = node.meta.get("custom")
    return custom if is_dict(custom) else {}


def operands(node: fx.Node) -> tuple[Any, Any, Any]:
    """Return the (input, weight, bias) arguments of a node whose target is in :data:`LAYER_OPS`; bias None when
    absent."""
    _, xi, wi, bi, _ = LAYER_OPS[node.target]
    return argument(node, xi), argument(node, wi), None if bi is None else argument(node, bi)


def argument(node: fx.Node, position: int) -> Any:
    """Return a node's argument by its position in the schema, from args, kwargs or the schema's default."""
    if position < len(node.args):
        return node.args[position]
    parameter = schema_of(node.target).arguments[position]
    return node.kwargs.get(parameter.name, parameter.default_value if parameter.has_default_value() else None)


def set_argument(node: fx.Node, position: int, value: Any) -> None:
    """Write a node's argument by its position in the schema, into args or kwargs."""
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(schema_of(node.target).arguments[position].name, value)


def op_of(kind: str, weight: Tensor, consumer: fx.Node | None) -> Op:
    """Return the :class:`Op` of a site, given ``weight`` as stored (may be fake) and a node that reads it, or None."""
    probe = Op(kind, tuple(weight.shape))
    shape = tuple(int(s) for s in probe.canonical(weight).shape) if weight.ndim > 1 else tuple(weight.shape)
    target, rest = (None, ()) if consumer is None else called_op(consumer)
    matches_kind = target in LAYER_OPS and LAYER_OPS[target][0] == kind
    max_norm = None if consumer is None else max_norm_of(consumer)
    biased = consumer is not None and _adds_bias(consumer)
    return Op(kind, shape, target if matches_kind else None, rest if matches_kind else (), max_norm, biased)


def _adds_bias(consumer: fx.Node) -> bool:
    """Return whether the op by which a node reads a weight adds a bias, one that is computed there included."""
    meta = custom_meta(consumer).get(SUBGRAPH_INPUT_META)
    if meta is not None:
        return meta["op"] is not None and meta["bias"] != ""
    return consumer.target in LAYER_OPS and operands(consumer)[2] is not None


def max_norm_of(consumer: fx.Node) -> tuple[float, float] | None:
    """Return (largest norm, order of the norm) of the rows that a node looks up; None without such a bound."""
    max_norm = custom_meta(consumer).get(MAX_NORM_META)
    return None if max_norm is None else (float(max_norm[0]), float(max_norm[1]))


def mark_max_norm(consumer: fx.Node, max_norm: tuple[float, float]) -> None:
    """Store ``max_norm`` where :func:`max_norm_of` reads it, as text, since JSON has no safe form of infinity."""
    consumer.meta["custom"] = {**custom_meta(consumer), MAX_NORM_META: [str(v) for v in max_norm]}


def called_op(consumer: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    """Return the op by which a node reads a weight, and its remaining arguments; (None, ()) for an unknown op."""
    meta = custom_meta(consumer).get(SUBGRAPH_INPUT_META)
    if meta is not None:
        return (None, ()) if meta["op"] is None else (_BY_NAME[meta["op"][0]], _as_tuples(meta["op"][1]))
    return (consumer.target, _other_args(consumer)) if consumer.target in LAYER_OPS else (None, ())


def _other_args(consumer: fx.Node) -> tuple[Any, ...]:
    first = LAYER_OPS[consumer.target][4]
    n = len(schema_of(consumer.target).arguments)
    rest = [_as_tuples(argument(consumer, i)) for i in range(first, n)]
    groups = custom_meta(consumer).get(GROUPS_META)
    return tuple(rest if groups is None else [*rest[:-1], groups])


def make_dense(consumer: fx.Node, remember: bool) -> None:
    """Make a grouped convolution run with one group, since its weight became dense.

    ``remember`` keeps the number of groups in the node's meta, so that :func:`make_grouped` can undo it.
    """
    count = len(schema_of(consumer.target).arguments)
    arguments = [argument(consumer, i) for i in range(count)]
    if remember:
        consumer.meta["custom"] = {GROUPS_META: arguments[-1], **custom_meta(consumer)}
    consumer.args, consumer.kwargs = (*arguments[:-1], 1), {}


def make_grouped(consumer: fx.Node) -> None:
    """Undo :func:`make_dense`, if it was done and remembered."""
    custom = dict(custom_meta(consumer))
    if GROUPS_META in custom:
        consumer.args = (*consumer.args[:-1], custom.pop(GROUPS_META))
        consumer.meta["custom"] = custom


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if is_list_or_tuple(value) else value
