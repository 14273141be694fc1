"""Merging again: the graph of a merged program does not depend on an adapter's values, so it is made once.

Before: a program and the :class:`Merge` to do on it. After: the merged program; where the same sites of it were merged
before, one with that graph and the weights this merge makes, which takes no more than making them.

The graph is remembered without its weights, and only where a merge changes nothing but weights of one shape: not where
biases are merged, grouped convolutions become dense, or the base is given up.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor
from torch.export import ExportedProgram

from adaptc.passes.merge import Merge, SiteMerge
from adaptc.passes.set_mode import SetMode

if TYPE_CHECKING:
    from adaptc.program import AdaptedProgram


class Remembered:
    """A merged program without the weights that were merged; ``names``: under which it has each of them."""

    def __init__(self, merged: AdaptedProgram, names: Sequence[Sequence[str]], rows: Sequence[SiteMerge]) -> None:
        gone = {n for group in names for n in group}
        self._names, self._untied = names, [r.untied for r in rows]
        self._state: Mapping[str, Tensor] = {k: v for k, v in merged._state_dict.items() if k not in gone}
        self._order = list(merged._state_dict)
        self._attributes = {
            k: v
            for k, v in merged.__dict__.items()
            if k not in ("_state_dict", "_executor", "_arguments", "_lock", "_origin", "merge_report", "_base_program")
        }

    def program(self, kind: type[AdaptedProgram], weights: Sequence[Tensor]) -> AdaptedProgram:
        """One of its own, with these weights."""
        new = kind.__new__(kind)
        new.__dict__.update(self._attributes)
        own = {n: w for names, w in zip(self._names, weights, strict=True) for n in names}
        new._state_dict = {n: own[n] if n in own else self._state[n] for n in self._order}
        new._originals, new._traces = {}, {}
        new._lock = threading.RLock()
        new._executor = new._arguments = new._origin = new.merge_report = None
        new._shared = True
        return new

    def rows(self, rows: Sequence[SiteMerge]) -> tuple[SiteMerge, ...]:
        return tuple(replace(r, untied=u) for r, u in zip(rows, self._untied, strict=True))


def merge(program: AdaptedProgram, fold: Merge) -> tuple[AdaptedProgram, Sequence[SiteMerge]]:
    """The merged program, and its report's rows. Raises MergeError, with ``program`` unchanged."""
    key = tuple(a.id for a in fold.attachments)
    plain = fold.release is None and not any(a.method.has_bias() for a in fold.attachments)
    known = program._merged.get(key) if plain else None
    shapes = {k: t.shape for k, t in program.base_tensors.items() if isinstance(t, Tensor)}
    if known is not None:
        weights, rows = fold.weights(program)
        if all(w.shape == shapes[r.fqn] for w, r in zip(weights, rows, strict=True)):
            return known.program(type(program), weights), known.rows(rows)
    done = fold(program)
    result: ExportedProgram = done.program
    if program.adaptation.training:
        result = SetMode(training=False)(result).program
    new = type(program).adopt(result, type(program.adaptation)(fills=program.adaptation.fills), None, program.backend)
    state = new._state_dict
    names = [[n for n, t in state.items() if t is state[r.fqn]] for r in done.data]
    if plain and all(state[r.fqn].shape == shapes[r.fqn] for r in done.data):
        new._shared = True
        program._merged[key] = Remembered(new, names, done.data)
    return new, done.data
