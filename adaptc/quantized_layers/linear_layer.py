"""Define the linear layer that stands in the place of another library's, and what a library's reader provides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptc.errors import CaptureError, ConfigError
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.passes.quantized.scheme import Scheme


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is quantised.

    It computes in the weight's dtype and returns the dtype of its input. Its weight is frozen.
    """

    # Programs name the class of each layer, and rules for layers ask for this one.
    __module__ = nn.Linear.__module__
    __qualname__ = nn.Linear.__qualname__

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        dtype = self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(input.to(dtype), self.weight, bias).to(input.dtype)


class LayerReader(NamedTuple):
    """The reading of one library's layers.

    Attributes:
        formats: the layers that are read, for messages.
        find_codes: takes a module and returns the tensor with its codes, or None for any other module.
        read: takes a module with codes, and the dtype of the model; returns the weight. The weight's dtype is the one
            that the layer computes in. Raises CaptureError, with no path, where the layer cannot be read.
    """

    formats: str
    find_codes: Callable[[nn.Module], Tensor | None]
    read: Callable[[nn.Module, torch.dtype], QuantizedTensor]


def class_path(kind: type) -> str:
    """Return the module and the name of ``kind``."""
    return f"{kind.__module__}.{kind.__qualname__}"


def as_plain_tensor(t: Tensor) -> Tensor:
    """Return an alias of ``t`` that is neither a parameter nor of a library's class."""
    return t.detach().as_subclass(Tensor)


def require_tensor(name: str, value: object, shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> Tensor:
    """Return ``value`` as a plain tensor. Raises CaptureError where it is not of ``shape`` and one of ``dtypes``."""
    expected = f"{' or '.join(str(d) for d in dtypes)} {tuple(shape)}"
    if not isinstance(value, Tensor):
        raise CaptureError(f"its {name!r} must be {expected}, and it has none")
    if tuple(value.shape) != tuple(shape) or value.dtype not in dtypes:
        raise CaptureError(f"its {name!r} must be {expected}, and is {value.dtype} {tuple(value.shape)}")
    return as_plain_tensor(value)


def make_weight(
    scheme: Scheme,
    stored: Mapping[str, Tensor],
    names: Mapping[str, str],
    shape: Sequence[int],
    dtype: torch.dtype,
    is_transposed: bool = False,
) -> QuantizedTensor:
    """Return the weight of ``shape`` that ``stored`` holds by role.

    ``names`` maps a role to the name of the tensor of the layer that it was made of.

    Raises CaptureError where a tensor is not what the scheme stores, and for values that are not finite.
    """
    rows, columns = (shape[1], shape[0]) if is_transposed else shape
    try:
        layout = scheme.layout(rows, columns)
    except ConfigError as error:
        raise CaptureError(str(error)) from error
    for role, (expected, stored_dtype) in layout.items():
        found, name = require_tensor(names[role], stored.get(role), expected, [stored_dtype]), names[role]
        if found.is_floating_point() and not found.is_meta and not bool(torch.isfinite(found).all()):
            raise CaptureError(f"its {name!r} has values that are not finite")
    return QuantizedTensor(scheme, stored, shape, dtype, is_transposed)


def dtype_name(t: Tensor) -> str:
    """Return the name of the dtype of ``t`` as schemes write it, such as "float16"."""
    return str(t.dtype).removeprefix("torch.")
