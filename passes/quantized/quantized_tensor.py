"""Give a quantised weight the face of a tensor, so that a program, a pass or a merge takes it for a weight.

A :class:`QuantizedTensor` has the shape and the dtype of the weight and holds the tensors of its scheme. ``linear``,
``embedding`` and matmuls with a matrix to the left of it read it as it is stored. Every other operation reads its
values, made for that operation alone. It is frozen: nothing writes to it, and it takes no gradient.

Private torch use, with the public route that was tried: ``Tensor._make_wrapper_subclass`` makes a tensor without memory
of its own. Public: ``Tensor._make_subclass``'s public twin ``as_subclass`` needs the memory of the whole weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from adaptc.errors import AdaptcError, ConfigError
from adaptc.passes.graph.ops import schema_of
from adaptc.passes.graph.pytree import pytree
from adaptc.passes.quantized.all_schemes import scheme_from_text, scheme_text
from adaptc.passes.quantized.bitsandbytes_kernels import dequantize_matrix
from adaptc.passes.quantized.fast_linear import fast_linear
from adaptc.passes.quantized.quantized_experts import grouped_matmul, is_grouped_matmul
from adaptc.passes.quantized.quantized_linear import quantized_embedding, quantized_linear, quantized_matmul
from adaptc.passes.quantized.scheme import Scheme
from adaptc.torch_modes import autocast_dtype, has_transform_or_tangent

aten = torch.ops.aten


class QuantizedTensor(Tensor):
    """A weight that is stored by a scheme.

    Attributes:
        scheme: how it is stored.
        scheme_text: the scheme as ops take it.
        stored: role -> tensor, as the scheme's ``layout`` says.
        is_transposed: whether the last two axes of the weight are swapped before it is stored.
        row_axes: how many of the first axes are the rows of the stored matrix: 1, or 2 for experts that are stacked.
    """

    scheme: Scheme
    scheme_text: str
    stored: Mapping[str, Tensor]
    is_transposed: bool
    row_axes: int
    _prepared: dict[str, tuple[Tensor, ...]]

    def __new__(
        cls,
        scheme: Scheme,
        stored: Mapping[str, Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        is_transposed: bool = False,
        row_axes: int = 1,
    ) -> Self:
        tensor_class: Any = Tensor
        made: Self = tensor_class._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=stored["codes"].device)
        made.scheme, made.scheme_text = scheme, scheme_text(scheme)
        made.is_transposed, made.row_axes, made._prepared = is_transposed, row_axes, {}
        made.stored = {role: stored[role] for role in scheme.layout(*made.matrix_shape)}
        return made

    @classmethod
    def quantize(
        cls, weight: Tensor, scheme: Scheme, is_transposed: bool = False, row_axes: int = 1
    ) -> QuantizedTensor:
        """Return ``weight`` stored by ``scheme``. Raises ConfigError where the scheme cannot store it."""
        rows = weight.transpose(-2, -1) if is_transposed else weight
        matrix = rows.flatten(row_axes).flatten(0, row_axes - 1)
        stored = {role: t.clone(memory_format=torch.contiguous_format) for role, t in scheme.quantize(matrix).items()}
        return cls(scheme, stored, weight.shape, weight.dtype, is_transposed, row_axes)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Return (rows, columns) of the stored matrix."""
        return matrix_shape(self.shape, self.is_transposed, self.row_axes)

    @property
    def memory_tensor(self) -> Tensor:
        """Return the stored tensor by whose memory this weight is known."""
        return self.stored["codes"]

    @property
    def stored_bytes(self) -> int:
        """Return the bytes of the stored tensors."""
        return sum(t.nbytes for t in self.stored.values())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """Return the weight's values as a plain tensor of ``dtype``, by default its own."""
        return self.values_of(self.stored, dtype)

    def prepared(self, key: str, prepare: Callable[[QuantizedTensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Return what ``prepare`` makes of this weight for a kernel, made at the first call and kept under ``key``."""
        if key not in self._prepared:
            self._prepared[key] = prepare(self)
        return self._prepared[key]

    @property
    def prepared_bytes(self) -> int:
        """Return the bytes of what kernels keep besides the stored tensors."""
        return sum(t.nbytes for made in self._prepared.values() for t in made)

    def values_of(self, stored: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Return what :meth:`dequantize` would return for other ``stored`` tensors, which may be fake."""
        matrix = dequantize_matrix(self.scheme, stored, *self.matrix_shape, dtype or self.dtype)
        if not self.is_transposed:
            return matrix.reshape(self.shape)
        return matrix.reshape(_with_swapped_axes(self.shape)).transpose(-2, -1).contiguous()

    def linear_of_values(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + bias (..., rows) by no kernel for few rows, which rounds elsewhere than the gradient does.

        So a loss does not depend on the size of the batch, and no copy is kept for such a kernel.
        """
        if self.ndim != 2 or self.is_transposed or self.scheme.rounds_inputs:
            return F.linear(x, self, bias)
        return quantized_linear(x, self.scheme_text, [*self.stored.values()], self.matrix_shape, bias)

    def shares_tensors_of(self, other: object) -> bool:
        """Return whether ``other`` is this weight, too, in the same memory."""
        return self._is_stored_as(other) and all(t is other.stored[r] for r, t in self.stored.items())

    def has_same_values(self, other: object) -> bool:
        """Return whether ``other`` is stored in the same way, with equal tensors."""
        return self._is_stored_as(other) and all(torch.equal(t, other.stored[r]) for r, t in self.stored.items())

    def _is_stored_as(self, other: object) -> TypeGuard[QuantizedTensor]:
        if not isinstance(other, QuantizedTensor):
            return False
        own, its = ((t.scheme, t.shape, t.dtype, t.is_transposed, t.row_axes) for t in (self, other))
        return own == its

    def with_stored(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> QuantizedTensor:
        """Return this weight with ``change`` applied to each stored tensor, and with values of ``dtype``."""
        stored = {role: change(t) for role, t in self.stored.items()}
        return QuantizedTensor(self.scheme, stored, self.shape, dtype or self.dtype, self.is_transposed, self.row_axes)

    def transposed(self) -> QuantizedTensor:
        """Return this weight with its last two axes swapped. It shares the stored tensors.

        The weight has two axes, or is a stack of experts.
        """
        shape = _with_swapped_axes(self.shape)
        return QuantizedTensor(self.scheme, self.stored, shape, self.dtype, not self.is_transposed, self.row_axes)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"QuantizedTensor({self.scheme}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__setitem__ and isinstance(args[0], QuantizedTensor):  # it would write to a copy
            raise _frozen_error(args[0], func)
        if func == _SET_DATA and isinstance(args[0], QuantizedTensor):
            return args[0].set_data(args[1])
        reader = _READERS.get(func)
        if reader is not None and (found := reader(*args, **kwargs)) is not NotImplemented:
            return found
        # Without types and in the name of Tensor itself: torch would make results instances of this class.
        return Tensor.__torch_function__(func, (), tuple(args), dict(kwargs))  # type: ignore[arg-type]

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _COPIES:
            return _copy_of(args[0], func, kwargs)
        if _swaps_last_axes(func, *args):
            return args[0].transposed()
        if (
            is_grouped_matmul(func)
            and isinstance(args[1], QuantizedTensor)
            and not isinstance(args[0], QuantizedTensor)
        ):
            return grouped_matmul(func, *args, **kwargs)
        if func is aten.copy_.default and isinstance(args[0], QuantizedTensor) and args[0].shares_tensors_of(args[1]):
            return args[0]  # as a module loads its own state
        for value in _written_values(func, args, kwargs):
            if isinstance(value, QuantizedTensor):
                raise _frozen_error(value, func)
        if func in _MATMULS and not kwargs and (found := _matmul(func, *args)) is not None:
            return found
        if func in _SHAPE_READERS:
            kwargs.setdefault("device", args[0].device)
            empty = pytree.tree_map_only(QuantizedTensor, _without_values, (tuple(args), kwargs))
            return func(*empty[0], **empty[1])
        plain = pytree.tree_map_only(QuantizedTensor, QuantizedTensor.dequantize, (tuple(args), kwargs))
        return func(*plain[0], **plain[1])

    def set_data(self, other: Tensor) -> None:
        """Become what ``other`` is, as ``tensor.data = other`` asks, by which modules move their parameters.

        Raises AdaptcError where ``other`` is not quantised.
        """
        if not isinstance(other, QuantizedTensor):
            raise _frozen_error(self, _SET_DATA)
        Tensor.__torch_function__(_SET_DATA, (), (self, other))  # type: ignore[arg-type]
        self.scheme, self.scheme_text = other.scheme, other.scheme_text
        self.stored, self.is_transposed, self._prepared = other.stored, other.is_transposed, {}
        self.row_axes = other.row_axes

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        if id(self) not in memo:
            memo[id(self)] = _as_parameter_like(self, self.with_stored(torch.clone))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        is_parameter = isinstance(self, torch.nn.Parameter)
        state = self.scheme_text, dict(self.stored), tuple(self.shape), self.dtype, self.is_transposed
        return rebuild_quantized_tensor, (*state, is_parameter, self.row_axes)


def rebuild_quantized_tensor(
    scheme: str,
    stored: Mapping[str, Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
    is_transposed: bool,
    is_parameter: bool,
    row_axes: int = 1,
) -> Tensor:
    """Return the tensor that ``pickle`` or ``torch.save`` wrote. Raises ConfigError where ``stored`` does not fit."""
    made = QuantizedTensor(scheme_from_text(scheme), stored, shape, dtype, is_transposed, row_axes)
    made.scheme.check(stored, *made.matrix_shape)
    return torch.nn.Parameter(made, requires_grad=False) if is_parameter else made


_untyped_serialization: Any = torch.serialization
# What it rebuilds is data: files of it are read with torch.load(weights_only=True), as those of other tensors are.
_untyped_serialization.add_safe_globals([rebuild_quantized_tensor])


def _as_parameter_like(old: Tensor, new: Tensor) -> Tensor:
    return torch.nn.Parameter(new, requires_grad=False) if isinstance(old, torch.nn.Parameter) else new


_PLAIN = (Tensor, torch.nn.Parameter)
_UNTYPED_TENSOR: Any = Tensor
#: the function that ``tensor.data = other`` calls
_SET_DATA: Any = _UNTYPED_TENSOR.data.__set__
#: operations whose result is quantised, too
_COPIES = {
    aten.detach.default,
    aten.alias.default,
    aten.clone.default,
    aten.lift_fresh.default,
    aten._to_copy.default,
    aten.pin_memory.default,
}
#: operations that read the shape and the dtype of their first argument, and no values
_SHAPE_READERS = {
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
}

#: operations that multiply a matrix by a quantised one on its right
_MATMULS = {aten.mm.default, aten.addmm.default, aten.addmm_.default}


def matrix_shape(shape: Sequence[int], is_transposed: bool, row_axes: int) -> tuple[int, int]:
    """Return (rows, columns) of the matrix that stores a weight of ``shape``.

    Raises ConfigError where the weight has no ``row_axes`` axes and one more.
    """
    if row_axes < 1 or row_axes >= len(shape):
        raise ConfigError(f"row_axes={row_axes}: at least one axis, and not all, of a weight of shape {tuple(shape)}")
    stored = _with_swapped_axes(shape) if is_transposed else shape
    return prod(stored[:row_axes]), prod(stored[row_axes:])


def _with_swapped_axes(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def _swaps_last_axes(func: Any, t: Any = None, *rest: Any) -> bool:
    """Return whether an op with these arguments swaps the last two axes of a quantised weight that may swap them."""
    if not isinstance(t, QuantizedTensor) or t.ndim != t.row_axes + 1:
        return False
    if func is aten.transpose.int:
        return {int(axis) % t.ndim for axis in rest} == {t.ndim - 2, t.ndim - 1}
    return func is aten.t.default


def _written_values(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the arguments that an op writes to, as its schema says."""
    named = {**dict(zip((a.name for a in schema_of(func).arguments), args, strict=False)), **kwargs}
    written = [a.name for a in schema_of(func).arguments if a.alias_info is not None and a.alias_info.is_write]
    return [named[name] for name in written if name in named]


def _frozen_error(weight: QuantizedTensor, func: object) -> AdaptcError:
    return AdaptcError(
        f"{weight!r} is frozen, and {func} would write to it: put another tensor in its place, such as "
        "tensor.dequantize()"
    )


def _without_values(t: QuantizedTensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device="meta")


def _copy_of(t: QuantizedTensor, func: Any, kwargs: Mapping[str, Any]) -> QuantizedTensor:
    if func is aten.clone.default:
        return t.with_stored(torch.clone)
    if func is aten._to_copy.default:
        device = kwargs.get("device")
        return t.with_stored((lambda s: s) if device is None else (lambda s: s.to(device)), kwargs.get("dtype"))
    return t.with_stored(lambda s: s)


def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, QuantizedTensor) or isinstance(x, QuantizedTensor) or isinstance(bias, QuantizedTensor):
        return NotImplemented
    if weight.ndim != 2 or weight.is_transposed:
        return NotImplemented
    dtype = autocast_dtype(x)
    if dtype is not None:  # before the choice of a kernel, which autocast would not see
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias))
    is_plain = type(x) in _PLAIN and not needs_gradient and not has_transform_or_tangent(x)
    # A compiler gets one op: it would trace into the choice of a kernel.
    if is_plain and not is_compiling() and (found := fast_linear(x, weight, bias)) is not None:
        return found
    return quantized_linear(x, weight.scheme_text, [*weight.stored.values()], weight.matrix_shape, bias)


def _matmul(func: Any, *args: Any) -> Tensor | None:
    """Return the result of one of ``_MATMULS``; None for operands of which only the values can be read."""
    *totals, x, weight = args
    if not isinstance(weight, QuantizedTensor) or any(isinstance(t, QuantizedTensor) for t in (x, *totals)):
        return None
    if weight.ndim != 2 or any(t.dtype != weight.dtype for t in (x, *totals)) or x.shape[1] != weight.shape[0]:
        return None
    stored = weight.scheme_text, [*weight.stored.values()], weight.matrix_shape
    total = totals[0] if totals else None
    if not weight.is_transposed:
        found = quantized_matmul(x, *stored, None if total is None else total.expand(x.shape[0], weight.shape[1]))
    elif weight.scheme.rounds_inputs or (total is not None and total.ndim != 1):  # what a linear layer is not
        return None
    else:
        found = quantized_linear(x, *stored, total)
    return total.copy_(found) if func is aten.addmm_.default and total is not None else found


def _embedding(weight: Any, indices: Any, padding_idx: int = -1, *_: Any, **__: Any) -> Any:
    if not isinstance(weight, QuantizedTensor) or weight.is_transposed:
        return NotImplemented
    return quantized_embedding(weight.scheme, weight.stored, weight.matrix_shape, indices, weight.dtype)


def _share_memory(weight: QuantizedTensor) -> QuantizedTensor:
    for t in weight.stored.values():
        t.share_memory_()
    return weight


#: operations that read a weight as it is stored
_READERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    aten.linear.default: _linear,
    aten.embedding.default: _embedding,
    Tensor.share_memory_: _share_memory,
}
