"""Verify packages, files of compiled code, on random inputs of several shapes.

There are three claims, each measured:

- With a program's adapter, the package computes what the program computes.
- With identity values in every slot, the package computes the base.
- Another adapter changes the outputs, and swapping back restores every bit.

The package's current adapter, the program, the model and torch's random state stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from adaptc.capture.inputs import random_inputs
from adaptc.capture.inputs.random_inputs import CallInputs
from adaptc.capture.model_state import preserve_state
from adaptc.errors import SwapError
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.passes.graph.graph_lock import GRAPH_LOCK
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.verification import package_inputs
from adaptc.verification.checks import Verifier, adapter_input_names
from adaptc.verification.compare import Leaves, compare, differ
from adaptc.verification.preserve_state import BufferSnapshot
from adaptc.verification.report import Check, VerifyReport
from adaptc.verification.verify import NO_BASE, TOLERANCE

NO_SITES = "the package has no adapter"


def verify_package(
    package: PackagedProgram,
    model: Any = None,
    *,
    shapes: int | Sequence[Mapping[str, Sequence[int]]] | None = None,
    seed: int = 0,
    atol: float | None = None,
    inputs: Any = None,
    raise_on_failure: bool = False,
) -> VerifyReport:
    """Check ``package`` against ``model``, and against itself; return the report.

    ``model``: the program that the package was made from, or only the base: an nn.Module, an ExportedProgram or any
    callable. Of a program, the current adapter is compared, and its base serves as the model. The other arguments are
    those of :func:`adaptc.verification.verify.verify_program`.

    Where ``model`` is no ExportedProgram, sizes are drawn from the package's ranges. Token ids are then below the
    number of rows of the smallest embedding of ``model`` and of the package's sites, or below 2 without any.

    Raises AdaptcError for inputs that the package cannot take, and for sizes that depend on others, which need
    ``inputs``. With ``raise_on_failure``, raises AdaptcError where a check failed.
    """
    program = None
    if isinstance(model, AdaptedProgram):
        model.executor()  # made here, so that the program keeps it: a snapshot's own would be lost with the snapshot
        program = model = model.snapshot()
    requested_shapes = 3 if shapes is None else shapes
    if inputs is not None:
        runs = random_inputs.calls_from_inputs(inputs)
    elif isinstance(model, ExportedProgram):
        runs = random_inputs.draw_inputs(model, shapes=requested_shapes, seed=seed)
    else:
        runs = package_inputs.draw(package, requested_shapes, seed, model)
    exported = model if isinstance(model, ExportedProgram) else None
    with (
        torch.no_grad(),
        preserve_state(model, training=False, only_traced=True),
        BufferSnapshot(exported, model) as buffers,
    ):
        verifier = _PackageVerifier(package, model, program, runs, atol, seed, buffers)
        checks = [
            verifier.run_check("package equals program", verifier.package_equals_program),
            verifier.run_check("base equals model", verifier.base_equals_model),
            verifier.run_check("swap and back is bitwise", verifier.swap_and_back),
        ]
    strength = "" if package.current is None else package.current.describe_scales()
    return VerifyReport.from_checks(checks, (r.shapes_text for r in runs), seed, raise_on_failure, strength)


class _PackageVerifier(Verifier):
    def __init__(
        self,
        package: PackagedProgram,
        model: Any,
        program: AdaptedProgram | None,
        runs: list[CallInputs],
        atol: float | None,
        seed: int,
        buffers: BufferSnapshot,
    ) -> None:
        super().__init__(runs, atol, seed, buffers)
        self.package, self.model, self.program = package, model, program
        self.current = package.current  # kept, so that a swap by another thread does not change what is verified

    def package_equals_program(self, name: str) -> Check:
        if self.program is None:
            return Check(name, None, note="no program was given")
        both_adapted = self.current is not None and self.program.current is not None
        call = self.package.bind(self.program.binding) if both_adapted else self._call_with(self.current)
        return self._compare(name, self.run_all(self.program), self.run_all(call))

    def base_equals_model(self, name: str) -> Check:
        if self.model is None:
            return Check(name, None, note="no model was given")
        if self.current is None:
            return Check(name, None, note=NO_SITES)
        if self.package.adaptation.residual or (self.program and self.program.adaptation.residual):
            return Check(name, None, note=NO_BASE)
        try:
            base = self.package.base
        except SwapError as error:  # some slots have no identity values in the package's sizes
            return Check(name, None, note=str(error))
        call = self.model
        if self.program is not None:
            call = self.program.base
        elif isinstance(call, ExportedProgram):
            call = call.module()
        with GRAPH_LOCK:  # a capture in another thread patches torch's module calls for all threads
            expected = self.run_all(call, adapter_input_names(self.package.adaptation.attachments))
        return self._compare(name, expected, self.run_all(base))

    def swap_and_back(self, name: str) -> Check:
        if self.current is None:
            return Check(name, None, note=NO_SITES)
        current = self._call_with(self.current)
        if not self.current.constants:
            return Check(name, None, note="no code reads its slots")
        before, perturbed, after = self.run_all(current), self.run_all(self._perturbed_call()), self.run_all(current)
        if not any(map(differ, before, perturbed)):
            return Check(name, False, note="an adapter of other values gives the same outputs: its slots are not read")
        return compare(name, before, after, 0.0)

    def _call_with(self, fitted: Any) -> Any:
        return lambda *args, **kwargs: self.package.run(fitted, args, kwargs)

    def _perturbed_call(self) -> Any:
        """Return a call of the package with its current adapter plus noise."""
        assert self.current is not None
        generator = torch.Generator().manual_seed(self.seed)
        values = dict(self.current.constants)
        for s in self.package.manifest.sites:
            for slot, spec in s.attachment.method.slots(s.op).items():
                value = values.get(s.attachment.slots[slot])  # None for slots that no code reads
                if value is not None and spec.trainable and value.is_floating_point():
                    noise = torch.randn(value.shape, generator=generator) * 0.05
                    values[s.attachment.slots[slot]] = value + noise.to(value)
        return self._call_with(replace(self.current, constants=values))

    def _compare(self, name: str, expected: list[Leaves], found: list[Leaves]) -> Check:
        dtypes = [s.dtype for s in self.package.manifest.sites]
        if isinstance(self.model, ExportedProgram):
            dtypes += [t.dtype for t in self.model.state_dict.values() if isinstance(t, nn.Parameter)]
        elif isinstance(self.model, nn.Module):
            dtypes += [p.dtype for p in self.model.parameters()]
        coarsest = max((d for d in dtypes if d in TOLERANCE), key=TOLERANCE.__getitem__, default=torch.float32)
        return compare(name, expected, found, TOLERANCE[coarsest], self.atol)
