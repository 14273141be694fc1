"""Define what a scheme is: how a matrix is stored in few bits, and what its values are.

A scheme is mathematics in plain torch. A program holds the stored tensors and the nodes of :meth:`Scheme.dequantize`,
so it runs where adaptc is absent. Everything else (merges, weight forms, adapters, files) reads the result as a weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from adaptc.errors import ConfigError


class StoredMatrix(Protocol):
    """A weight as kernels read it: its scheme, its stored tensors by role, and (rows, columns) of the matrix."""

    @property
    def scheme(self) -> Scheme: ...
    @property
    def stored(self) -> Mapping[str, Tensor]: ...
    @property
    def matrix_shape(self) -> tuple[int, int]: ...


class StoredTensor(NamedTuple):
    """The shape and dtype of a tensor that a scheme stores."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Scheme(ABC):
    """A way to store a matrix (rows, columns) in few bits; the fields are its options.

    A weight with more axes is stored as the matrix of its first axis and all others.
    """

    name: ClassVar[str]

    @abstractmethod
    def __str__(self) -> str:
        """Return the scheme in a few words, for reports and messages."""

    @abstractmethod
    def layout(self, rows: int, columns: int) -> dict[str, StoredTensor]:
        """Return role -> shape and dtype of the tensors that store a matrix.

        Raises ConfigError where the scheme cannot store a matrix of this shape.
        """

    @abstractmethod
    def dequantize(self, stored: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """Return the matrix (rows, columns), float32, of the tensors ``stored`` by role."""

    @abstractmethod
    def quantize(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the tensors, by role, that store ``matrix`` (rows, columns) as closely as the scheme can.

        Raises ConfigError where the scheme cannot store this matrix.
        """

    @property
    def rounds_inputs(self) -> bool:
        """Return whether inputs of a layer are rounded by :meth:`round_input` before they meet the matrix."""
        return False

    def round_input(self, x: Tensor) -> Tensor:
        """Return the input ``x`` (..., columns) as the layer reads it, of the same shape and dtype."""
        return x

    def check(self, stored: Mapping[str, Tensor], rows: int, columns: int) -> None:
        """Raise ConfigError, with the role of the tensor, where ``stored`` is not what :meth:`layout` says.

        Scales that are not finite are refused, too.
        """
        expected = self.layout(rows, columns)
        if missing := sorted(expected.keys() - stored.keys()):
            raise ConfigError(f"{self.name} of ({rows}, {columns}) lacks {missing[0]!r}; it stores {sorted(expected)}")
        if unknown := sorted(stored.keys() - expected.keys()):
            raise ConfigError(f"{self.name} stores {sorted(expected)}, and no {unknown[0]!r}")
        for role, (shape, dtype) in expected.items():
            found = stored[role]
            if tuple(found.shape) != shape or found.dtype != dtype:
                raise ConfigError(
                    f"{role!r} of {self.name} for a matrix ({rows}, {columns}) is {dtype} {shape}, and this one is "
                    f"{found.dtype} {tuple(found.shape)}"
                )
            if found.is_floating_point() and not bool(torch.isfinite(found).all()):
                raise ConfigError(f"{role!r} of {self.name} has values that are not finite")

    def has_codes_of(self, other: Scheme) -> bool:
        """Return whether this scheme gives a weight the codes that ``other`` gives it, up to how scales are stored."""
        return self == other

    def with_plain_scales(self, stored: Mapping[str, Tensor]) -> tuple[Scheme, Mapping[str, Tensor]]:
        """Return a scheme, and its tensors, of the same values, whose scales are quantised no more."""
        return self, stored

    def select_rows(
        self, stored: Mapping[str, Tensor], shape: Sequence[int], rows: slice | Tensor
    ) -> tuple[Scheme, dict[str, Tensor]] | None:
        """Return the scheme and the tensors that store some rows of a matrix of ``shape`` (rows, columns).

        ``rows`` is a slice, or indices (n,). None where rows do not lie by themselves.
        """
        return None


def require_matrix(matrix: Tensor) -> Tensor:
    """Return ``matrix`` as float32.

    Raises ConfigError where it has other than two axes, is on the meta device, or has a value that is not finite.
    """
    if matrix.is_meta:
        raise ConfigError("the weight is on the meta device and has no values: load the base first")
    if matrix.ndim != 2:
        raise ConfigError(f"a scheme stores matrices (rows, columns), and this tensor is {tuple(matrix.shape)}")
    if not bool(torch.isfinite(matrix).all()):
        raise ConfigError("the weight has values that are not finite, which no scheme stores")
    return matrix.detach().float()
