"""Change the adapter that a program runs, and bind one to a callable."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from adaptc.packages.packaged_program import BoundPackage, PackagedProgram
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.swap import swap_adapter
from adaptc.program.wrapper import ProgramWrapper, accepts_wrappers, check_program
from adaptc.reports.results import SwapReport
from adaptc.state.bound import BoundProgram


@accepts_wrappers
def swap(
    program: AdaptedProgram | PackagedProgram,
    adapter: Any,
    *,
    config: Any = None,
    adapter_name: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    component: str | None = None,
    scale: float | Mapping[str, float] | None = None,
) -> SwapReport:
    """Make ``adapter`` the current adapter of ``program``, and return a report of what was found.

    ``adapter``: a PEFT directory, a file or a state dict of any format that :func:`compile` takes, a binding, or a
    result of ``prog.bind``. ``component`` and ``config``: see :func:`compile`. ``scale``: a factor on the scale that
    the adapter was made with, as ``prog.set_scale`` sets it. ``key_mapping``: regular expression -> replacement,
    applied to the keys (PEFT's rule), without their ``base_model.model.``. Where all
    keys differ from the program's by a prefix, the error has the mapping that fits.

    The adapter may have any rank and alpha, and any subset of the program's sites; the other sites get identity values.
    Nothing is compiled, and only the adapter's own tensors are copied. For a bare state dict the scale follows
    ``config`` if given, else the program's alpha and the tensors' ranks. The swap is atomic: calls that have begun
    finish with the adapter that they began with.

    Raises SwapError, which names the site, where the adapter needs a site that the program was not compiled for. Raises
    CheckpointError for damaged files, wrong shapes, missing keys or NaN. The program is then unchanged.

    ``program`` may be a package of :func:`load_package`. Then ranks have a limit, and adapters that change base weights
    need a package that holds these weights (see :meth:`PackagedProgram.swap`).
    """
    options: dict[str, Any] = {"config": config, "adapter_name": adapter_name, "key_mapping": key_mapping}
    options |= {"component": component, "scale": scale}
    if isinstance(program, PackagedProgram):
        return program.swap(adapter, **options)
    check_program(program, "swap")
    start = time.perf_counter()
    binding = swap_adapter(program, adapter, **options)
    return SwapReport.from_binding(program.adaptation.attachments, binding, time.perf_counter() - start)


def bind(program: AdaptedProgram | PackagedProgram, adapter: Any, **options: Any) -> BoundProgram | BoundPackage:
    """Return a callable that keeps ``adapter`` whatever ``program`` is swapped to, for any thread; None gives the base.

    :meth:`AdaptedProgram.bind`, and for packages :meth:`PackagedProgram.bind`, document the ``options`` and errors.
    """
    check_program(program, "bind", PackagedProgram, ProgramWrapper)
    return program.bind(adapter, **options)
