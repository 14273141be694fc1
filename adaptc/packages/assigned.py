"""Assign the adapters of a packaged bank to the rows of a batch, for calls that belong together.

An assignment has the mix of adapters of each row, and the place of each adapter in the compiled code. While it exists
the bank puts nothing else in these places. So a generation ends with the adapters it began with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptc.binding.binding import Binding
from adaptc.packages.manifest import Input
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.program.assigned import Assignment, repeated
from adaptc.program.parts import ProgramPart
from adaptc.rows.assignment import Mixes, coefficients, used
from adaptc.rows.code import KEYWORD


class PackagedAssignment(Assignment):
    """A callable that runs a packaged bank with per-row adapters; ``PackagedBank.assigned`` makes it.

    ``places`` maps the name of each adapter to its place. ``count`` is the number of places in the code.
    """

    def __init__(
        self,
        package: PackagedProgram,
        mixes: Mixes,
        places: Mapping[str, int],
        count: int,
        adapters: Mapping[str, Binding],
    ) -> None:
        super().__init__(mixes, package, adapters)
        self._package, self._count, self._places = package, count, places
        self._names = used(mixes)
        self._at = [places[n] for n in self._names]
        #: the places that no other adapter may be put in
        self.taken = frozenset(self._at)

    def alone(self, name: str) -> PackagedAssignment:
        return PackagedAssignment(self._package, ({name: 1.0},), self._places, self._count, self.adapters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(args, kwargs, self._rows(self._package.manifest.inputs, kwargs))

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int) -> Any:
        """Run a call with so many rows."""
        return self._package.run(None, args, {**kwargs, KEYWORD: self._coefficients(rows)})

    def parts(self, scale: Any = None) -> Mapping[str, ProgramPart]:
        """Return the parts of the package with these adapters, by name. Raises ConfigError for a ``scale``."""
        self._keeps(scale)
        parts, inputs = self._package.parts_with(None), self._package.manifest.parts
        return {
            n: ProgramPart(partial(self._part, p, inputs[n].inputs), {*p.inputs} - {KEYWORD}) for n, p in parts.items()
        }

    def _part(self, part: ProgramPart, inputs: Sequence[Input], **kwargs: Any) -> dict[str, Tensor]:
        return part.run(**kwargs, **{KEYWORD: self._coefficients(self._rows(inputs, kwargs))})

    def _rows(self, inputs: Sequence[Input], kwargs: Mapping[str, Any]) -> int:
        """Return how many rows a call has: as its inputs tell, else as many as the assignment."""
        shapes = {i.name: i.tensor.shape for i in inputs if i.tensor is not None}
        size = shapes[KEYWORD][0]
        if isinstance(size, int):
            return size
        for name, shape in shapes.items():
            if size in shape and isinstance(value := kwargs.get(name), Tensor) and value.ndim == len(shape):
                return value.shape[shape.index(size)]
        return len(self.mixes)

    def _coefficients(self, rows: int) -> Tensor:
        c = torch.zeros(rows, self._count)
        c[:, self._at] = coefficients(repeated(self.mixes, rows), self._names, len(self._names), torch.device("cpu"))
        return c.to(self.device)

    @property
    def device(self) -> torch.device:
        return self._package.device
