"""Verify programs and their files on random inputs, and write what was measured into the certificates of files."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from adaptc.adapter_files.atomic_write import atomic_replace
from adaptc.api.certify_exported import certify_exported, is_exported, verify_exported
from adaptc.archives.added_files import (
    ADDED_FOLDER,
    CERTIFICATE_FILE,
    AddedFiles,
    copy_records,
    read_added_files,
    write_added_files,
)
from adaptc.archives.archive import is_package, open_archive
from adaptc.archives.certificate import Certificate, hash_code, hash_graph, read_certificate
from adaptc.archives.checksum import CHECKSUM_RECORD, add_checksum
from adaptc.archives.refusal import raises_checkpoint_error
from adaptc.bank.bank import Bank
from adaptc.errors import AdaptcError, CheckpointError, ConfigError
from adaptc.packages import manifest as _package_file
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.files.base_fingerprint import base_fingerprints
from adaptc.program.files.program_file import load_program
from adaptc.program.wrapper import ProgramWrapper
from adaptc.runtime.options import RunOptions
from adaptc.serving.serving_file import load_package_contents, wrapper_of_file
from adaptc.torch_typing import is_path
from adaptc.verification.certified_facts import certifier, check_facts, check_measured, with_measured
from adaptc.verification.package import verify_package
from adaptc.verification.report import VerifyReport
from adaptc.verification.verify import verify_program


def verify(
    program: AdaptedProgram | PackagedProgram | ProgramWrapper | str | os.PathLike[str],
    model: nn.Module | AdaptedProgram | None = None,
    **options: Any,
) -> VerifyReport:
    """Compare the program with the model it came from on random inputs of several shapes, and return a report.

    Args:
        program: a program, a generator, or a package. A package is compared with the program it was made from, or with
            the model. Or the path of a file of one of these: its certificate is checked, too, and what the certificate
            measured is measured again. A package runs as it is loaded. A file of another runtime (``.onnx``, ``.xml``
            or ``.pte``) with the adapter as inputs runs in that runtime, and is compared with the program ``model``.
        model: the base that the program was made from, as an nn.Module or a program. Without it the program is
            compared with itself alone: merged, unmerged, and with identity values.
        **options: ``shapes``, the number of input shapes to draw or a list of {input name: shape}; ``inputs``, inputs
            of your own instead; ``seed``; ``atol``, the largest absolute difference; ``raise_on_failure``. Of a file
            that was saved by reference, ``base`` as for :func:`load`.

    Returns:
        a report of each check with the largest difference and where it was. ``report.ok`` sums up.

    Raises:
        AdaptcError: the program cannot take the inputs, or a check failed and ``raise_on_failure`` is set.

    Example:
        >>> adaptc.verify(prog, model, shapes=1).ok
        True
    """
    if is_path(program):
        if is_exported(Path(program)):
            _refuse_base(options.pop("base", None), Path(program))
            return verify_exported(Path(program), model, options)
        return _verify_file(Path(program), model, **options)
    if "base" in options:
        raise ConfigError("base= is for the path of a program that was saved by reference")
    if isinstance(program, PackagedProgram):
        return verify_package(program, model, **options)
    if isinstance(program, ProgramWrapper):
        with program.as_program(model) as base_model:
            inside = program.program
            if isinstance(inside, PackagedProgram) or program.draws_own_inputs:
                options = program.example_inputs(options)
            return verify(inside, base_model, **options)
    checked: Any = program  # anything else is refused there
    return verify_program(checked, model, **options)


def _verify_file(file: Path, model: Any, *, base: Any = None, **options: Any) -> VerifyReport:
    """Verify the file of a program or a package, and check whether its certificate still holds.

    The measurement of the certificate is repeated, with its seed and shapes, unless ``options`` say others. A file
    without a certificate is verified alone.
    """
    certificate = read_certificate(file)
    program = _load(file, base)
    measured = None if certificate is None else certificate.measured
    if measured is not None:
        same = {name: measured[name] for name in ("seed", "shapes", "atol")}
        options = {**same, **{n: v for n, v in options.items() if v is not None}}
    raises = options.pop("raise_on_failure", False)
    report = verify(program, model, **{n: v for n, v in options.items() if v is not None})
    checks = list(report.checks)
    if certificate is not None:
        graph, files = _contents(file)
        inside = None if is_package(file) else _inside(program)
        given = _inside(model) if isinstance(_inside(model), AdaptedProgram) else None
        facts = check_facts(certificate, graph, files, inside, given if inside is None else inside)
        checks += [*facts, *check_measured(certificate, report)]
    return VerifyReport.from_checks(checks, report.runs, report.seed, raises, report.strength)


def certify(
    path: str | os.PathLike[str],
    model: Any = None,
    *,
    base: Any = None,
    seed: int = 0,
    shapes: int = 3,
    atol: float | None = None,
) -> Certificate:
    """Verify the file of a program or a package on random inputs, and write the result into its certificate.

    Every file that :func:`save` and :func:`package` write has a certificate. It has the fingerprint of the base, the
    hash of the graph, the adapters and the versions. This adds what was measured. A package runs as it is loaded.

    The certificate of a file of another runtime lies beside it, as ``<name>.certificate.json``. It has what was
    measured in that runtime.

    Args:
        path: the file; it is replaced as a whole, or stays as it was.
        model: the model or program that the file was made from, to compare with; see :func:`verify`. A file of another
            runtime needs the program.
        base: the base of a program that was saved by reference, as for :func:`load`.
        seed: the seed of the inputs.
        shapes: how many input shapes to draw.
        atol: the largest absolute difference; None follows from the dtype of the weights.

    Returns:
        the certificate, which prints as a table; ``to_dict()`` is its JSON.

    Raises:
        AdaptcError: a check failed. The file is as it was.
        CheckpointError: the file is damaged, or cannot be written.
        ConfigError: the file is the package of a bank, which has no adapter to compare.

    Example:
        >>> certificate = adaptc.certify(adaptc.save(prog, "model.pt2"), model)
        >>> certificate.measured["seed"]
        0
    """
    file = Path(path)
    if is_exported(file):
        _refuse_base(base, file)
        return certify_exported(file, model, seed, shapes, atol)
    known = read_certificate(file)
    program = _load(file, base)
    report = verify(program, model, seed=seed, shapes=shapes, atol=atol)
    if not report.ok:
        raise AdaptcError(str(report))
    certificate = known or _new_certificate(file, program)
    certificate = with_measured(certificate, report, shapes, atol)
    _write_certificate(file, certificate)
    return certificate


def _refuse_base(base: Any, file: Path) -> None:
    if base is not None:
        raise ConfigError(f"{file} holds its base: leave base= out")


def _load(file: Path, base: Any) -> Any:
    if not is_package(file):
        loaded = load_program(AdaptedProgram, file, RunOptions("eager", None, True), None, base)
        return wrapper_of_file(file, loaded) or loaded
    if base is not None:
        raise ConfigError(f"{file} is a package, which holds its base: leave base= out")
    program = load_package_contents(file)
    if isinstance(program, Bank):
        raise ConfigError(
            f"{file} is the package of a bank, which has no adapter of its own to compare; certify the package of a "
            "program, and its certificate without measured differences is there already"
        )
    return program


def _inside(program: Any) -> Any:
    return program.program if isinstance(program, ProgramWrapper) else program


def _new_certificate(file: Path, program: Any) -> Certificate:
    """Return the certificate of a file that has none, such as one of torch.export.save."""
    if is_package(file):
        raise CheckpointError(f"{file} has no certificate: package the program again")
    inside, (graph, files) = _inside(program), _contents(file)
    return Certificate.parse(certifier(inside, base_fingerprints(inside), files)(graph))


def _contents(file: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Return the hash of the graph or the code in ``file``, and its added files."""
    with raises_checkpoint_error(file), open_archive(file) as archive:
        files = read_added_files(archive)
        if not is_package(file):
            return hash_graph(archive), files
        return hash_code({name: archive.sha256(name) for name in archive.records}), files


def _write_certificate(file: Path, certificate: Certificate) -> None:
    """Replace the certificate in ``file``."""
    data = {CERTIFICATE_FILE: certificate.to_bytes()}
    own = ADDED_FOLDER + CERTIFICATE_FILE
    with raises_checkpoint_error(file), atomic_replace(file, "certified.pt2") as new:
        if is_package(file):
            contents = _package_file.read(file)
            with open_archive(file) as archive:
                copy_records(archive, new, lambda n: n != _package_file.MANIFEST and not n.startswith(ADDED_FOLDER))
            _package_file.write(new, replace(contents, added=AddedFiles({**contents.added.files, **data})))
        else:
            with open_archive(file) as archive:
                copy_records(archive, new, lambda n: n not in (own, CHECKSUM_RECORD))
            write_added_files(new, data)
            add_checksum(new)
