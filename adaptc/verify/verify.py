"""Verify programs on random inputs of several shapes.

There are four claims, each measured:

- The base taken out of the program computes what the model computes.
- With identity values in every slot, the program computes the base.
- Merging changes nothing but rounding.
- Unmerging restores every bit.

The program and its current adapter, the model with its buffers and its train and eval flags, and torch's random state
stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from adaptc.binding.bind import first_values
from adaptc.capture.inputs import random_inputs
from adaptc.capture.inputs.random_inputs import DrawnCall
from adaptc.capture.model_state import preserve_state
from adaptc.errors import AdaptcError
from adaptc.passes.graph.graph_lock import GRAPHS
from adaptc.passes.graph.lifted import Lifted
from adaptc.passes.protocol.regions import added_inputs
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.state.merge_program import merged, unmerged
from adaptc.state.unload_program import unloaded
from adaptc.verify.checks import Claims, added
from adaptc.verify.compare import Leaves, compare, differ, digests
from adaptc.verify.preserve_state import Buffers
from adaptc.verify.report import Check, VerifyReport

#: largest difference allowed, relative to the largest magnitude of an output, by the coarsest dtype of the weights
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}

NO_ADAPTER = "the program has no adapter"
NO_BASE = "the program does not hold the base, only this adapter's version of it"


def verify_program(
    program: AdaptedProgram,
    model: Any = None,
    *,
    shapes: int | Sequence[Mapping[str, Sequence[int]]] | None = None,
    seed: int = 0,
    atol: float | None = None,
    inputs: Any = None,
    raise_on_failure: bool = False,
) -> VerifyReport:
    """Check ``program`` against ``model``, the base it was made from, and against itself; return the report.

    ``model``: an nn.Module, an ExportedProgram or any callable; without it the first check is not run. ``shapes``: how
    many input shapes to draw, or a list of {input name: shape}. ``inputs``: inputs of your own instead, a dict of
    keyword inputs or a tuple of positional ones, or a list of these. ``atol``: the largest absolute difference allowed.
    By default it is a share of the largest output that fits the coarsest dtype of the weights (``TOLERANCE``).

    A check that fails is reported with the largest difference and where it was, and one that raises with its error;
    ``report.ok`` sums up. Raises AdaptcError for inputs that the program cannot take, and with ``raise_on_failure``
    where a check failed.
    """
    if not isinstance(program, AdaptedProgram):
        raise AdaptcError(f"verify takes a program of adaptc.compile or adaptc.load, not a {type(program).__name__}")
    program.executor()  # made here, so that the program keeps it: a snapshot's own would be lost with the snapshot
    program = program.snapshot()
    if inputs is not None:
        runs = random_inputs.given(inputs)
    else:
        wanted = 3 if shapes is None else shapes
        runs = random_inputs.draw(program, shapes=wanted, seed=seed, vocabulary=_vocabulary(model))
    with torch.no_grad(), preserve_state(model, training=False, traced=True), Buffers(program, model) as buffers:
        checks = _Verifier(program, model, runs, atol, seed, buffers).checks()
    strength = "" if program.current is None else program.current.strength()
    return VerifyReport.of(checks, (r.text for r in runs), seed, raise_on_failure, strength)


class _Verifier(Claims):
    def __init__(
        self,
        program: AdaptedProgram,
        model: Any,
        runs: list[DrawnCall],
        atol: float | None,
        seed: int,
        buffers: Buffers,
    ) -> None:
        super().__init__(runs, atol, seed, buffers)
        self.program, self.model = program, model
        self.adapted = bool(program.adaptation.attachments)
        #: names of inputs that the base does not take
        self.added = added(program.adaptation.attachments)
        self.added |= {n.name for n in added_inputs(Lifted(program, edit=False))}
        self._base: list[Leaves] | None = None

    def checks(self) -> list[Check]:
        return [
            self.tried("base equals model", self._base_equals_model),
            self.tried("identity equals base", self._identity_equals_base),
            self.tried("merged equals adapted", self._merged_equals_adapted),
            self.tried("unmerge is bitwise", self._unmerge_is_bitwise),
        ]

    # -- the four claims -------------------------------------------------------------------------------------------

    def _base_equals_model(self, name: str) -> Check:
        if self.model is None:
            return Check(name, None, note="no model was given")
        if self.program.adaptation.residual:
            return Check(name, None, note=NO_BASE)
        call = self.model.module() if isinstance(self.model, ExportedProgram) else self.model
        with GRAPHS:  # a capture in another thread patches torch's module calls for all threads
            expected = self.outputs(call, self.added)
        return self._compare(name, expected, self.base())

    def _identity_equals_base(self, name: str) -> Check:
        if not self.adapted:
            return Check(name, None, note=NO_ADAPTER)
        if self.program.adaptation.residual:
            return Check(name, None, note=NO_BASE)
        identity = first_values(self.program.spec(), self.program.binding.config, only={})
        # Not program.bind: it has buffers of its own, which are not restored between calls.
        return self._compare(name, self.base(), self.outputs(self.program.with_binding(identity)))

    def _merged_equals_adapted(self, name: str) -> Check:
        if reason := self._not_mergeable():
            return Check(name, None, note=reason)
        program, adapted, note = self.program, self.outputs(self.program), ""
        if not self.program.adaptation.residual and not any(map(differ, self.base(), adapted)):
            # An adapter that changes nothing would merge into the same weights, and the check could not fail.
            program, note = self._shaken(), "with random values, since the current adapter changes nothing"
            adapted = self.outputs(program)
        check = self._compare(name, adapted, self.outputs(_eager(merged(program, safe=False)[0])))
        return replace(check, note=check.note or note)

    def _shaken(self) -> AdaptedProgram:
        """Return a copy of the program whose adapter is the current one plus noise."""
        p, old = self.program, self.program.binding
        trained = {
            a.slots[n]
            for a in p.adaptation.attachments
            if a.id in old.methods
            for n, slot in old.methods[a.id].slots(p.ops[a.id]).items()
            if slot.trainable
        }
        generator = torch.Generator().manual_seed(self.seed)
        values = dict(old.values)
        for fqn in sorted(trained):
            noise = torch.randn(values[fqn].shape, generator=generator) * 0.05
            values[fqn] = nn.Parameter(values[fqn].detach() + noise.to(values[fqn]), requires_grad=False)
        return _eager(p.with_binding(replace(old, values=values)))

    def _unmerge_is_bitwise(self, name: str) -> Check:
        if reason := self._not_mergeable():
            return Check(name, None, note=reason)
        before = digests(self.program.state_dict)
        back = unmerged(merged(self.program, safe=False)[0])
        after = digests(back.state_dict)
        changed = [k for k in before | after if before.get(k) != after.get(k)]
        if changed:
            return Check(name, False, note=f"{len(changed)} tensors are not what they were: {', '.join(changed[:3])}")
        check = compare(name, self.outputs(self.program), self.outputs(back), 0.0)
        return replace(check, note=f"{len(before)} tensors equal bit for bit") if check.passed else check

    # -- outputs ---------------------------------------------------------------------------------------------------

    def base(self) -> list[Leaves]:
        if self._base is None:
            self._base = self.outputs(_eager(unloaded(self.program)), self.added)
        return self._base

    def _not_mergeable(self) -> str:
        if not self.adapted:
            return NO_ADAPTER
        for a in self.program.adaptation.attachments:
            if a.id in self.program.binding.methods and (reason := a.method.check_merge(self.program.ops[a.id])):
                return f"{a.fqn} cannot be merged: {reason}"
        return ""

    def _compare(self, name: str, expected: list[Leaves], found: list[Leaves]) -> Check:
        return compare(name, expected, found, TOLERANCE[self._coarsest()], self.atol)

    def _coarsest(self) -> torch.dtype:
        held = [t.dtype for t in self.program.state_dict.values() if isinstance(t, nn.Parameter)]
        known = [d for d in held if d in TOLERANCE]
        return max(known, key=TOLERANCE.__getitem__, default=torch.float32)


def _eager(program: AdaptedProgram) -> AdaptedProgram:
    """Return ``program`` with the eager backend.

    The checks are about graphs, so programs that are only made for a check need not be compiled.
    """
    return program.with_options(backend="eager")


def _vocabulary(model: Any) -> int | None:
    config = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    return getattr(config if get is None else get(), "vocab_size", None)
