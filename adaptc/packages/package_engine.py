"""Run the compiled code of a package with one adapter, or with those of each row where it is the package of a bank.

The code of a bank takes the coefficients of a call as one more input. They name adapters by their indices in the code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from adaptc.bank.compile_bank import COEFFICIENTS_INPUT
from adaptc.bank.row_adapters import RowSelection
from adaptc.errors import AdaptcError
from adaptc.packages.compiled_code import CompiledCode, run_part
from adaptc.packages.constants import PackagedBinding
from adaptc.packages.manifest import Input, Manifest
from adaptc.runtime.hoisted_values import HoistedMemory
from adaptc.state.runner import AdapterSelection, Engine, ProgramPart, Runner


class Package(Protocol):
    """A loaded package, as far as its engine uses it."""

    path: Any
    manifest: Manifest
    device: torch.device
    inputs: Any
    code_by_part: Mapping[str, CompiledCode]

    def run(self, adapter: PackagedBinding | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


@dataclass(frozen=True, eq=False)
class IndexedRows(RowSelection):
    """The adapters of each row in the package of a bank.

    ``index_by_name``: the index of each adapter in the code. ``capacity``: the number of indices.
    """

    index_by_name: Mapping[str, int] = field(default_factory=dict[str, int])
    capacity: int = 0

    def code_coefficients(self, rows: int, device: torch.device) -> Tensor:
        """Return the coefficients of a batch of so many rows, float32 (rows, capacity)."""
        names = self.names
        c = torch.zeros(rows, self.capacity)
        c[:, [self.index_by_name[n] for n in names]] = self.coefficients(rows, names, len(names), torch.device("cpu"))
        return c.to(device)


class PackageEngine(Engine):
    """Run the compiled code of ``package``."""

    why = "the form that the package was compiled in"

    def __init__(self, package: Package) -> None:
        self._package = package

    @property
    def program(self) -> Any:
        return self._package

    @property
    def device(self) -> torch.device:
        return self._package.device

    def prepare(self, selection: AdapterSelection) -> PackagedBinding | IndexedRows | None:
        """Return the adapter that was padded for the package, None without one; or the rows with their indices."""
        return selection if isinstance(selection, IndexedRows) else selection.binding

    def run(self, prepared: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(prepared, IndexedRows):
            return self._package.run(prepared, args, kwargs)
        inputs = self._package.manifest.inputs
        c = self._coefficients(prepared, inputs, inputs_by_name(inputs, args, kwargs))
        return self._package.run(None, args, {**kwargs, COEFFICIENTS_INPUT: c})

    def parts(self, prepared: Any, outputs: Mapping[str, Sequence[str]]) -> Mapping[str, ProgramPart]:
        codes = self._package.code_by_part
        if not isinstance(prepared, IndexedRows):
            return {
                n: ProgramPart(partial(run_part, c, prepared), frozenset(c.inputs.names), prepared)
                for n, c in codes.items()
            }
        return {
            n: ProgramPart(partial(self._run_part, n, prepared), {*c.inputs.names} - {COEFFICIENTS_INPUT})
            for n, c in codes.items()
        }

    def _run_part(self, name: str, rows: IndexedRows, **kwargs: Any) -> dict[str, Tensor]:
        c = self._coefficients(rows, self._package.manifest.parts[name].inputs, kwargs)
        return run_part(self._package.code_by_part[name], None, **kwargs, **{COEFFICIENTS_INPUT: c})

    def _coefficients(self, rows: IndexedRows, inputs: Sequence[Input], kwargs: Mapping[str, Any]) -> Tensor:
        if not rows.repeats:
            check_row_count(rows.row_count, inputs, kwargs)
        count = find_row_count(inputs, kwargs)
        return rows.code_coefficients(rows.row_count if count is None else count, self.device)

    def expected_inputs(self, prepared: Any) -> Mapping[str, Any]:
        return dict(self._package.inputs.expected)

    def for_one_row(self, selection: IndexedRows, name: str) -> Runner:
        return Runner(self, replace(selection, binding=selection.adapters[name], mixes=({name: 1.0},)))

    def memory(self, prepared: Any) -> HoistedMemory:
        if not isinstance(prepared, PackagedBinding):
            return HoistedMemory()
        return HoistedMemory(len(prepared.constants), prepared.nbytes)

    def pickle_error(self) -> AdaptcError:
        return AdaptcError(
            f"what is bound to a package can be neither copied nor pickled: load {self._package.path} where it is "
            "needed, and bind the adapter there"
        )

    def describe(self, runner: Runner) -> str:
        total, binding = len(self._package.manifest.sites), runner.binding
        if isinstance(runner.selection, RowSelection):
            return f"Runner({binding.source!r}, {runner.selection.row_count} rows with adapters of their own, packaged)"
        return f"Runner({binding.source!r}, {len(binding.methods)} of {total} sites, packaged)"


def inputs_by_name(inputs: Sequence[Input], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by the names of the code's ``inputs``; positional ones where all are tensors."""
    by_place = zip((i.name for i in inputs), args, strict=False) if all(isinstance(a, Tensor) for a in args) else ()
    return {**dict(by_place), **kwargs}


def find_row_count(inputs: Sequence[Input], kwargs: Mapping[str, Any]) -> int | None:
    """Return how many rows a call has, as its arguments tell or the code demands; None where neither does."""
    shapes = {i.name: i.tensor.shape for i in inputs if i.tensor is not None}
    size = shapes[COEFFICIENTS_INPUT][0]
    if isinstance(size, int):
        return size
    for name, shape in shapes.items():
        if size in shape and isinstance(value := kwargs.get(name), Tensor) and value.ndim == len(shape):
            return value.shape[shape.index(size)]
    return None


def check_row_count(count: int, inputs: Sequence[Input], kwargs: Mapping[str, Any]) -> None:
    """Raise AdaptcError where a call does not have ``count`` rows, the number of entries in ``adapters``."""
    if (rows := find_row_count(inputs, kwargs)) not in (None, count):
        raise AdaptcError(
            f"adapters has {count} entries, and the batch has {rows} rows: give one for each row, None for the base"
        )
