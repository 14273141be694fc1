"""Change the adapter that a program runs, and bind one to a callable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptc.packages.packaged_program import PackagedProgram
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.swap_report import SwapReport
from adaptc.program.wrapper import ProgramWrapper, check_program
from adaptc.state.runner import Runner


def swap(
    program: AdaptedProgram | PackagedProgram | ProgramWrapper,
    adapter: Any,
    *,
    config: Any = None,
    adapter_name: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    component: str | None = None,
    scale: float | Mapping[str, float] | None = None,
) -> SwapReport:
    """Make ``adapter`` the current adapter of ``program``, and return a report of what was found.

    The adapter may have any rank and alpha, and any subset of the program's sites; the other sites get identity values.
    Nothing is compiled, and only the adapter's own tensors are copied. The swap is atomic: calls that have begun finish
    with the adapter that they began with.

    Args:
        program: a program, a generator, or a package. In a package ranks have a limit, and adapters that change base
            weights need a package that holds these weights (see :meth:`PackagedProgram.swap`).
        adapter: a PEFT directory, a file or a state dict of any format that :func:`compile` takes, a binding, or a
            result of ``bind``. Or the name of an adapter in the file that the program was loaded from
            (``program.adapters``); a path of that name is given as a ``Path``.
        config: the config to use in place of the one in the file. For a bare state dict without it, the scale follows
            the program's alpha and the tensors' ranks.
        adapter_name: which of several adapters in a directory to take.
        key_mapping: regular expression -> replacement, applied to the keys (PEFT's rule), without their
            ``base_model.model.``. Where all keys differ by a prefix, the error has the mapping that fits.
        component: the part to take of a file that has several; see :func:`compile`.
        scale: a factor on the scale that the adapter was made with, as :meth:`AdaptedProgram.set_active` sets it.

    Returns:
        a report of the sites, the ranks and the time that it took.

    Raises:
        SwapError: the adapter needs a site that the program was not compiled for; the site is named. Or a text is
            neither the name of an adapter nor a path. The program is unchanged.
        CheckpointError: the file is damaged, or has wrong shapes, missing keys or NaN. The program is unchanged.

    Example:
        >>> config, tensors = lora_weights(seed=1)
        >>> report = adaptc.swap(prog, tensors, config=config)
        >>> prog(x).shape
        torch.Size([2, 3])
    """
    options: dict[str, Any] = {"config": config, "adapter_name": adapter_name, "key_mapping": key_mapping}
    options |= {"component": component, "scale": scale}
    inside = program.program if isinstance(program, ProgramWrapper) else program
    check_program(inside, "swap", PackagedProgram)
    return inside.swap(adapter, **options)


def bind(program: AdaptedProgram | PackagedProgram, adapter: Any, **options: Any) -> Runner:
    """Return a callable that keeps ``adapter`` whatever ``program`` is swapped to, for any thread; None gives the base.

    Args:
        program: a program, a generator, or a package.
        adapter: an adapter as :func:`swap` takes it, or None for the base.
        **options: the options of :meth:`AdaptedProgram.bind`, or of :meth:`PackagedProgram.bind`.

    Returns:
        the callable, with the inputs and outputs of the program.

    Raises:
        SwapError: the adapter needs a site that the program was not compiled for.
        CheckpointError: the file is damaged or does not fit.

    Example:
        >>> config, tensors = lora_weights(seed=1)
        >>> bound = adaptc.bind(prog, tensors, config=config)
        >>> bound(x).shape
        torch.Size([2, 3])
    """
    check_program(program, "bind", PackagedProgram, ProgramWrapper)
    return program.bind(adapter, **options)
