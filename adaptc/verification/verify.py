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

from adaptc.binding.bind import initial_values
from adaptc.capture.inputs import random_inputs
from adaptc.capture.inputs.random_inputs import CallInputs
from adaptc.capture.model_state import preserve_state
from adaptc.errors import AdaptcError
from adaptc.passes.graph.graph_lock import GRAPH_LOCK
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.protocol.regions import added_inputs
from adaptc.passes.quantized.quantized_merge import QuantizedMerge
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.state.merge_program import merge_program, unload_program, unmerge_program
from adaptc.verification.checks import Verifier, adapter_input_names
from adaptc.verification.compare import Leaves, compare, differ, digests
from adaptc.verification.preserve_state import BufferSnapshot
from adaptc.verification.report import Check, VerifyReport

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
        runs = random_inputs.calls_from_inputs(inputs)
    else:
        requested_shapes = 3 if shapes is None else shapes
        runs = random_inputs.draw_inputs(program, shapes=requested_shapes, seed=seed, vocab_size=_vocab_size(model))
    with (
        torch.no_grad(),
        preserve_state(model, training=False, only_traced=True),
        BufferSnapshot(program, model) as buffers,
    ):
        checks = _ProgramVerifier(program, model, runs, atol, seed, buffers).checks()
    strength = "" if program.current is None else program.current.describe_scales()
    return VerifyReport.from_checks(checks, (r.shapes_text for r in runs), seed, raise_on_failure, strength)


class _ProgramVerifier(Verifier):
    def __init__(
        self,
        program: AdaptedProgram,
        model: Any,
        runs: list[CallInputs],
        atol: float | None,
        seed: int,
        buffers: BufferSnapshot,
    ) -> None:
        super().__init__(runs, atol, seed, buffers)
        self.program, self.model = program, model
        self.has_adapter = bool(program.adaptation.attachments)
        #: names of inputs that the base does not take
        self.adapter_inputs = adapter_input_names(program.adaptation.attachments)
        self.adapter_inputs |= {n.name for n in added_inputs(LiftedProgram(program, edit=False))}
        self._base_outputs: list[Leaves] | None = None

    def checks(self) -> list[Check]:
        return [
            self.run_check("base equals model", self._base_equals_model),
            self.run_check("identity equals base", self._identity_equals_base),
            self.run_check("merged equals adapted", self._merged_equals_adapted),
            self.run_check("unmerge is bitwise", self._unmerge_is_bitwise),
        ]

    # -- the four claims -------------------------------------------------------------------------------------------

    def _base_equals_model(self, name: str) -> Check:
        if self.model is None:
            return Check(name, None, note="no model was given")
        if self.program.adaptation.residual:
            return Check(name, None, note=NO_BASE)
        call = self.model.module() if isinstance(self.model, ExportedProgram) else self.model
        with GRAPH_LOCK:  # a capture in another thread patches torch's module calls for all threads
            expected = self.run_all(call, self.adapter_inputs)
        return self._compare(name, expected, self.base_outputs())

    def _identity_equals_base(self, name: str) -> Check:
        if not self.has_adapter:
            return Check(name, None, note=NO_ADAPTER)
        if self.program.adaptation.residual:
            return Check(name, None, note=NO_BASE)
        identity = initial_values(self.program.spec(), self.program.binding.config, methods_by_id={})
        # Of all sites, or calls would leave them out.
        identity = replace(identity, methods={a.id: a.method for a in self.program.adaptation.attachments})
        # Not program.bind: it has buffers of its own, which are not restored between calls.
        return self._compare(name, self.base_outputs(), self.run_all(self.program.with_binding(identity)))

    def _merged_equals_adapted(self, name: str) -> Check:
        if reason := self._reason_not_mergeable():
            return Check(name, None, note=reason)
        program, adapted, note = self.program, self.run_all(self.program), ""
        if not self.program.adaptation.residual and not any(map(differ, self.base_outputs(), adapted)):
            # An adapter that changes nothing would merge into the same weights, and the check could not fail.
            program, note = self._perturbed_program(), "with random values, since the current adapter changes nothing"
            adapted = self.run_all(program)
        check = self._compare(
            name,
            adapted,
            self.run_all(_with_eager_backend(merge_program(program, safe=False, quantized=self._way_to_merge())[0])),
        )
        return replace(check, note=check.note or note)

    def _way_to_merge(self) -> QuantizedMerge:
        """Return how to merge into quantised weights, so that the result computes what the adapted program does."""
        base: Mapping[str, Any] = self.program.base_tensors
        adapted = [base.get(a.fqn) for a in self.program.adaptation.attachments]
        rounds = any(isinstance(w, QuantizedTensor) and w.scheme.rounds_inputs for w in adapted)
        return QuantizedMerge.KEEP_RESIDUAL if rounds else QuantizedMerge.DEQUANTIZE

    def _perturbed_program(self) -> AdaptedProgram:
        """Return a copy of the program whose adapter is the current one plus noise."""
        program, binding = self.program, self.program.binding
        trainable_fqns = {
            a.slots[n]
            for a in program.adaptation.attachments
            if a.id in binding.methods
            for n, slot in binding.methods[a.id].slots(program.ops[a.id]).items()
            if slot.trainable
        }
        generator = torch.Generator().manual_seed(self.seed)
        values = dict(binding.values)
        for fqn in sorted(trainable_fqns):
            noise = torch.randn(values[fqn].shape, generator=generator) * 0.05
            values[fqn] = nn.Parameter(values[fqn].detach() + noise.to(values[fqn]), requires_grad=False)
        return _with_eager_backend(program.with_binding(replace(binding, values=values)))

    def _unmerge_is_bitwise(self, name: str) -> Check:
        if reason := self._reason_not_mergeable():
            return Check(name, None, note=reason)
        before = digests(self.program.state_dict)
        restored = unmerge_program(merge_program(self.program, safe=False, quantized=self._way_to_merge())[0])
        after = digests(restored.state_dict)
        changed = [k for k in before | after if before.get(k) != after.get(k)]
        if changed:
            return Check(name, False, note=f"{len(changed)} tensors are not what they were: {', '.join(changed[:3])}")
        check = compare(name, self.run_all(self.program), self.run_all(restored), 0.0)
        return replace(check, note=f"{len(before)} tensors equal bit for bit") if check.passed else check

    # -- outputs ---------------------------------------------------------------------------------------------------

    def base_outputs(self) -> list[Leaves]:
        if self._base_outputs is None:
            self._base_outputs = self.run_all(_with_eager_backend(unload_program(self.program)), self.adapter_inputs)
        return self._base_outputs

    def _reason_not_mergeable(self) -> str:
        if not self.has_adapter:
            return NO_ADAPTER
        for a in self.program.adaptation.attachments:
            if a.id in self.program.binding.methods and (reason := a.method.check_merge(self.program.ops[a.id])):
                return f"{a.fqn} cannot be merged: {reason}"
        return ""

    def _compare(self, name: str, expected: list[Leaves], found: list[Leaves]) -> Check:
        return compare(name, expected, found, TOLERANCE[self._coarsest_dtype()], self.atol)

    def _coarsest_dtype(self) -> torch.dtype:
        dtypes = [t.dtype for t in self.program.state_dict.values() if isinstance(t, nn.Parameter)]
        known_dtypes = [d for d in dtypes if d in TOLERANCE]
        return max(known_dtypes, key=TOLERANCE.__getitem__, default=torch.float32)


def _with_eager_backend(program: AdaptedProgram) -> AdaptedProgram:
    """Return ``program`` with the eager backend.

    The checks are about graphs, so programs that are only made for a check need not be compiled.
    """
    return program.with_options(backend="eager")


def _vocab_size(model: Any) -> int | None:
    config = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    return getattr(config if get is None else get(), "vocab_size", None)
