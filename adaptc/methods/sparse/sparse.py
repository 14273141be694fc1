"""Draw the indices of sparse coefficients, and make dense matrices of them, for methods that change few entries.

Indices are drawn as PEFT draws them, so that a seed gives the same indices. A dense matrix is made by adding values up:
the padding at the end of a slot, zeros at index zero, then changes nothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.errors import ConfigError
from adaptc.methods._shared.option_checks import check_integers, check_matrix
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import InitialValues, Method, Slot, Slots
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.size_rule import SizeRule
from adaptc.torch_modes import outside_modes


@lru_cache(maxsize=64)
def _draw_cached(total: int, seed: int | None, count: int) -> Tensor:
    with outside_modes():
        generator = torch.Generator()
        if seed is not None:
            generator.manual_seed(seed)
        return torch.randperm(total, generator=generator)[:count].clone()


def draw_distinct(total: int, seed: int | None, count: int) -> Tensor:
    """Return ``count`` distinct numbers below ``total``, int64 on the CPU, from a generator seeded with ``seed``.

    Results are cached, since layers of one size have the same numbers and drawing them for a large layer is slow. With
    ``seed`` None the generator has its default seed.
    """
    return _draw_cached(total, seed, count).clone()


def scatter_dense(shape: tuple[int, int], flat_indices: Tensor, values: Tensor) -> Tensor:
    """Return a dense matrix of this shape, with ``values`` (n,) added at the ``flat_indices`` (n,)."""
    rows, columns = shape
    flat = torch.zeros(rows * columns, dtype=values.dtype, device=values.device)
    return flat.index_add(0, flat_indices, values).reshape(rows, columns)


def float32_or_wider(*tensors: Tensor) -> torch.dtype:
    """Return the widest dtype of ``tensors``, at least float32: Fourier transforms have no half-precision form."""
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def check_positive_counts(config: Any, option: str) -> None:
    """Raise ConfigError where ``option``, or ``<option>_pattern``, holds an integer that is not positive."""
    pattern = getattr(config, f"{option}_pattern") or {}
    patterns = {f"{option}_pattern[{k!r}]": v for k, v in pattern.items()}
    check_integers(config, {option: getattr(config, option), **patterns})


def check_seed(config: Any) -> None:
    """Raise ConfigError where ``random_loc_seed`` is None: without a seed, no file could be read back."""
    if config.random_loc_seed is None:
        raise ConfigError(
            f"{type(config).__name__}.random_loc_seed must be an integer, got None: the indices of the coefficients "
            "are not in the file and are drawn again from it"
        )


class SpectrumFiles(FileFormat):
    method: SparseSpectrumMethod

    def summed(self) -> str:
        return self.method.spectrum_slot

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        return {self.method.indices_slot: self.method.draw_indices(op).to(W.device)}


class SpectrumSizes(SizeRule):
    method: SparseSpectrumMethod

    def specialized_for(self, op: Op) -> Any:
        total = prod(op.matrix_shape)
        if self.method.r > total:
            raise ConfigError(
                f"n_frequency={self.method.r} is more than the {total} entries of a matrix of shape {op.matrix_shape}; "
                "n_frequency_pattern gives this layer another number"
            )
        return self.method

    def minimal(self, op: Op) -> Any:
        return dataclasses.replace(self.method, r=2 * op.groups)

    def with_sizes_of(self, op: Op, slots: Slots) -> Any:
        found = slots.get(self.method.spectrum_slot)
        return self.method if found is None else dataclasses.replace(self.method, r=found.shape[0])


@dataclass(frozen=True)
class SparseSpectrumMethod(Method):
    """A method with ``r`` coefficients of a transform of the weight, at indices drawn with ``seed``."""

    slot_prefix: ClassVar[str] = ""
    swappable: ClassVar[frozenset[str]] = Method.swappable | {"scaling", "seed", "zeros"}
    files = SpectrumFiles()
    sizes = SpectrumSizes()

    r: int = 1000
    scaling: float = 1.0
    seed: int = 777
    zeros: bool = True

    @property
    def spectrum_slot(self) -> str:
        return f"{self.slot_prefix}_spectrum"

    @property
    def indices_slot(self) -> str:
        return f"{self.slot_prefix}_indices"

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix(self.name, op)
        return {
            self.spectrum_slot: Slot((self.r,), free=(0,)),
            self.indices_slot: Slot((self.r,), free=(0,), dtype=torch.int64, trainable=False, saved=False),
        }

    def scale(self, op: Op) -> float:
        return self.scaling

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        values = self.initial_values(generator).to(W.device, dtype)
        return InitialValues({self.spectrum_slot: values, **self.files.derived(op, W, dtype, {})})

    def initial_values(self, generator: torch.Generator | None) -> Tensor:
        """Return the first values of the coefficients, (r,), drawn in float32."""
        raise AssertionError(f"{type(self).__name__} must define first()")

    def draw_indices(self, op: Op) -> Tensor:
        """Return the flat indices of the coefficients in the weight as a matrix: (r,), int64 on the CPU."""
        return draw_distinct(prod(op.matrix_shape), self.seed, self.r)
