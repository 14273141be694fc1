"""Make the certificate of a program's file, and check whether a file is still what its certificate says.

Every function that writes a file calls :func:`certifier`; the file's writer knows the hash of the graph or the code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import nan
from typing import Any

from torch.export import ExportedProgram

from adaptc.adapter_files.format import CONFIG_NAME
from adaptc.archives.added_files import ADAPTERS_FOLDER, ADAPTERS_INDEX
from adaptc.archives.certificate import Certificate, hash_files, installed_versions
from adaptc.binding.binding import Binding
from adaptc.program.files.base_fingerprint import base_fingerprints, changed_weights, fingerprints_of, joint_fingerprint
from adaptc.state.core import ProgramCore
from adaptc.tables import to_json_value
from adaptc.verification.report import Check, VerifyReport


def certifier(
    program: ExportedProgram, fingerprints: Mapping[str, str], files: Mapping[str, bytes]
) -> Callable[[Mapping[str, str]], bytes]:
    """Return a function that makes the certificate of a file of ``program`` from the hash of what is in the file.

    ``fingerprints`` are those of the base, and ``files`` the added files with adapters by name.
    """
    facts: dict[str, Any] = {
        "versions": installed_versions(),
        "base": {
            "sha256": joint_fingerprint(fingerprints),
            "weights": len(fingerprints),
            "changed": changed_weights(program),
        },
        "current": _current_adapters(program),
        "adapters": _stored_adapters(files),
    }
    return partial(_make_certificate, facts)


def _make_certificate(facts: Mapping[str, Any], graph: Mapping[str, str]) -> bytes:
    return Certificate(**facts, graph=graph).to_bytes()


def with_measured(certificate: Certificate, report: VerifyReport, shapes: int, atol: float | None) -> Certificate:
    """Return ``certificate`` with the checks of ``report``, and the options that repeat them."""
    measured: dict[str, Any] = {"seed": report.seed, "shapes": shapes, "atol": atol, "runs": list(report.runs)}
    measured["checks"] = report.to_dict()["checks"]
    return replace(certificate, measured=measured, versions=installed_versions())


def _current_adapters(program: ExportedProgram) -> dict[str, Any]:
    current = program.current if isinstance(program, ProgramCore) else None
    return {} if current is None else {name: _adapter(b) for name, b in current.adapters_by_name.items()}


def _adapter(binding: Binding) -> dict[str, Any]:
    own = binding.active_form or binding
    return {
        "config": to_json_value(own.config.to_dict()),
        "sha256": joint_fingerprint(fingerprints_of({n: t.detach() for n, t in own.values.items()})),
    }


def _stored_adapters(files: Mapping[str, bytes]) -> dict[str, Any]:
    index = json.loads(files.get(ADAPTERS_INDEX, b"{}"))
    found: dict[str, Any] = {}
    for name, entry in index.items():
        prefix = f"{ADAPTERS_FOLDER}{name}/"
        own = {n.removeprefix(prefix): data for n, data in files.items() if n.startswith(prefix)}
        config = "/".join(part for part in (entry["directory"], CONFIG_NAME) if part)
        found[name] = {"config": json.loads(own[config]), "sha256": hash_files(own), "base": entry["base"]}
    return found


# -- whether it still holds --------------------------------------------------------------------------------------------


def check_facts(
    certificate: Certificate,
    graph: Mapping[str, str],
    files: Mapping[str, bytes],
    program: ExportedProgram | None,
    base_program: ExportedProgram | None,
) -> list[Check]:
    """Return a check for each fact of the certificate: graph, base and adapters.

    ``graph`` and ``files`` are those of the file now. ``program`` is what was loaded from it, None for a package, whose
    current adapter is in its code. ``base_program`` has its base, None where no program is given that has.
    """
    graph_is_same = dict(graph) == dict(certificate.graph)
    found = [_fact("certificate: graph", graph_is_same, f"the {certificate.graph['of']} is another one")]
    if base_program is None:
        found.append(Check("certificate: base", None, note="it is in the compiled code; give the program to compare"))
    else:
        sha256 = joint_fingerprint(base_fingerprints(base_program))
        found.append(_fact("certificate: base", sha256 == certificate.base["sha256"], "the base is another one"))
    changed = _names_that_differ(_stored_adapters(files), certificate.adapters)
    if program is not None:
        changed += _names_that_differ(_current_adapters(program), certificate.current)
    note = f"not as certified: {', '.join(map(repr, sorted(changed)))}"
    return [*found, _fact("certificate: adapters", not changed, note)]


def _names_that_differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def _fact(name: str, holds: bool, problem: str) -> Check:
    return Check(name, holds, note="" if holds else problem)


def check_measured(certificate: Certificate, report: VerifyReport) -> list[Check]:
    """Return a check for each certified check that ``report`` repeats: differences are within the certified limits."""
    if certificate.measured is None:
        return [Check("certificate: measured", None, note="nothing was measured: adaptc certify does")]
    now = {c.name: c for c in report.checks}
    found: list[Check] = []
    for then in certificate.measured["checks"]:
        check = now.get(then["name"])
        if then["passed"] and check is not None and check.passed is not None:
            limit, note = then["limit"] or 0.0, f"{then['error'] or 0.0:.3g} when it was certified"
            holds = check.passed and check.error <= limit
            found.append(Check(f"certificate: {check.name}", holds, check.error, nan, limit, check.where, note))
    return found
