"""Measure files of other runtimes in their runtime, and keep a certificate beside each.

A file for ONNX Runtime, OpenVINO or ExecuTorch is opened as users open it. Its base and the program's adapter are
compared with the program, from which the file was exported. A file that has its adapter merged in is compared as it is.
The certificate is the JSON file ``<name>.certificate.json``.

Outputs at padding are not compared. A token that no other token is shown to gives what each runtime makes of it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter_files.atomic_write import atomic_replace, explain_write_errors
from adaptc.archives.certificate import Certificate
from adaptc.archives.refusal import UnsafeFile
from adaptc.capture.inputs import random_inputs
from adaptc.capture.inputs.random_inputs import CallInputs
from adaptc.errors import AdaptcError, CheckpointError, ConfigError
from adaptc.exporters.runtime_session import RuntimeSession
from adaptc.exporters.to_executorch.executorch_adapter import executorch_model
from adaptc.exporters.to_onnx.onnx_adapter import onnx_session
from adaptc.exporters.to_openvino.openvino_adapter import openvino_model
from adaptc.passes.graph.pytree import pytree
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.files.base_fingerprint import base_fingerprints
from adaptc.verification.certified_facts import certifier, check_facts, check_measured, with_measured
from adaptc.verification.checks import Verifier
from adaptc.verification.compare import Leaves, compare
from adaptc.verification.preserve_state import BufferSnapshot
from adaptc.verification.report import Check, VerifyReport
from adaptc.verification.verify import TOLERANCE

#: the end of a file's name -> what opens it, the package whose version counts, and the ends of the files beside it
_FORMATS: Mapping[str, tuple[Callable[[Any], RuntimeSession], str, Sequence[str]]] = {
    ".onnx": (onnx_session, "onnxruntime", (".onnx.data",)),
    ".xml": (openvino_model, "openvino", (".bin", ".base.safetensors")),
    ".pte": (executorch_model, "executorch", ()),
}
_ADAPTER = "certified"


def is_exported(file: Path) -> bool:
    """Return whether the name of ``file`` is that of a file of another runtime."""
    return file.suffix in _FORMATS


def certificate_path(file: Path) -> Path:
    """Return the path of the certificate of ``file``."""
    return file.with_name(file.name + ".certificate.json")


def certify_exported(file: Path, program: Any, seed: int, shapes: int, atol: float | None) -> Certificate:
    """Measure ``file`` in its runtime, and write the certificate beside it. The arguments are those of ``certify``.

    Raises AdaptcError where a check failed, ConfigError without a program, and CheckpointError for a damaged file.
    """
    program = _require_program(file, program)
    report = _measure(file, program, seed, shapes, atol)
    if not report.ok:
        raise AdaptcError(str(report))
    certificate = Certificate.parse(certifier(program, base_fingerprints(program), {})(_hash_of(file)))
    certificate = with_measured(certificate, report, shapes, atol)
    package = _FORMATS[file.suffix][1]
    versions = {**certificate.versions, package: importlib.metadata.version(package)}
    certificate = replace(certificate, versions=versions)
    path = certificate_path(file)
    with explain_write_errors(path), atomic_replace(path, path.name) as new:
        new.write_bytes(certificate.to_bytes())
    return certificate


def verify_exported(file: Path, program: Any, options: Mapping[str, Any]) -> VerifyReport:
    """Measure ``file`` again, and check whether its certificate holds. ``options`` are those of ``verify``.

    Without a program, the files alone are compared with the certificate. Raises ConfigError where there is neither.
    """
    certificate = _read(file)
    given = {n: v for n, v in options.items() if v is not None}
    raises = bool(given.pop("raise_on_failure", False))
    if program is None:
        if certificate is None:
            raise _no_program(file)
        facts = check_facts(certificate, _hash_of(file), {}, None, None)
        unmeasured = Check("certificate: measured", None, note="give the program that the file was exported from")
        return VerifyReport.from_checks([*facts[:1], unmeasured], (), 0, raises)
    program = _require_program(file, program)
    measured = {} if certificate is None or certificate.measured is None else certificate.measured
    options = {"seed": 0, "shapes": 3, "atol": None}
    options |= {n: v for n, v in measured.items() if n in options} | given
    report = _measure(file, program, **options)
    checks = list(report.checks)
    if certificate is not None:
        checks += check_facts(certificate, _hash_of(file), {}, program, program)
        checks += check_measured(certificate, report)
    return VerifyReport.from_checks(checks, report.runs, report.seed, raises)


def _read(file: Path) -> Certificate | None:
    """Return the certificate beside ``file``; None where there is none."""
    path = certificate_path(file)
    if not path.is_file():
        return None
    try:
        return Certificate.parse(path.read_bytes())
    except (UnsafeFile, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Write another one with adaptc certify") from error


def _require_program(file: Path, program: Any) -> AdaptedProgram:
    if program is None:
        raise _no_program(file)
    if not isinstance(program, AdaptedProgram):
        raise ConfigError(
            f"{file} is compared with the program that it was exported from, not a {type(program).__name__}"
        )
    return program.snapshot()


def _no_program(file: Path) -> ConfigError:
    return ConfigError(
        f"{file} is compared with the program that it was exported from: give that as the model, or --program PROG.pt2"
    )


def _measure(file: Path, program: AdaptedProgram, seed: int, shapes: int, atol: float | None) -> VerifyReport:
    session = _FORMATS[file.suffix][0](file)
    if not session.is_merged:
        session.load_adapter(_ADAPTER, program)
    runs = random_inputs.draw_inputs(program, shapes=shapes, seed=seed)
    with torch.no_grad(), BufferSnapshot(program, None) as buffers:
        verifier = _SessionVerifier(session, program, runs, atol, seed, buffers)
        if session.is_merged:
            measured = {"merged": verifier.merged_equals_program}
        else:
            measured = {"base": verifier.base_equals_program, "adapter": verifier.adapter_equals_program}
        checks = [verifier.run_check(f"{n} in {session.runtime}", check) for n, check in measured.items()]
    return VerifyReport.from_checks(checks, (r.shapes_text for r in runs), seed, False)


class _SessionVerifier(Verifier):
    def __init__(
        self,
        session: RuntimeSession,
        program: AdaptedProgram,
        runs: list[CallInputs],
        atol: float | None,
        seed: int,
        buffers: BufferSnapshot,
    ) -> None:
        super().__init__(runs, atol, seed, buffers)
        self.session, self.program = session, program

    def base_equals_program(self, name: str) -> Check:
        return self._compare(name, self.program.base, None)

    def adapter_equals_program(self, name: str) -> Check:
        return self._compare(name, self.program, _ADAPTER)

    def merged_equals_program(self, name: str) -> Check:
        return self._compare(name, self.program, None)

    def _compare(self, name: str, call: Callable[..., Any], adapter: str | None) -> Check:
        names = self.session.output_names
        outputs = [[v for v in run.values() if isinstance(v, Tensor)] for run in self.run_all(call)]
        expected: list[Leaves] = [dict(zip(names, tensors, strict=True)) for tensors in outputs]
        found = [self._outputs(run, adapter) for run in self.runs]
        expected, found = ([*map(_without_padding, side, self.runs)] for side in (expected, found))
        dtypes = [t.dtype for t in self.program.base_tensors.values() if t.dtype in TOLERANCE]
        coarsest = max(dtypes, key=TOLERANCE.__getitem__, default=torch.float32)
        return compare(name, expected, found, TOLERANCE[coarsest], self.atol)

    def _outputs(self, run: CallInputs, adapter: str | None) -> Leaves:
        tensors = [t for t in pytree.tree_leaves((run.args, run.kwargs)) if isinstance(t, Tensor)]
        names = self.session.input_names
        by_name = (
            run.kwargs if not run.args and set(names) <= run.kwargs.keys() else dict(zip(names, tensors, strict=True))
        )
        found = self.session.run({n: by_name[n].cpu().numpy() for n in names}, adapter)
        untyped: Any = torch
        return {n: v if isinstance(v, Tensor) else untyped.from_numpy(v) for n, v in found.items()}


def _without_padding(outputs: Leaves, run: CallInputs) -> Leaves:
    """Return the outputs of a call, those of its tokens without the ones that ``attention_mask`` hides."""
    mask: Any = run.kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return outputs
    return {n: t[mask.bool()] if t.shape[:2] == mask.shape else t for n, t in outputs.items()}


def _hash_of(file: Path) -> dict[str, str]:
    """Return the hash of a file and of those that belong to it. Raises CheckpointError where there is no such file.

    A merged file lacks some of the others, and a hash without one that is missing is another hash.
    """
    if not file.is_file():
        raise CheckpointError(f"there is no file {file}")
    hashed = hashlib.sha256()
    others = [file.with_name(file.stem + end) for end in _FORMATS[file.suffix][2]]
    for path in (file, *(p for p in others if p.is_file())):
        with path.open("rb") as stream:
            hashed.update(hashlib.file_digest(stream, "sha256").digest())
    return {"sha256": hashed.hexdigest(), "of": "file"}
