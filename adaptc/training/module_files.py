"""Write the adapter that a module has now, and refuse to write its program's where that is out of date.

The parameters of a module may have been replaced since the module was made: FSDP2 puts sharded tensors in their place.
What is trained then is in the module alone, and the program still has the tensors from before.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError, shown
from adaptc.state.adapter_output import linked_for_trainer, without_link, write_current
from adaptc.state.core import ProgramCore
from adaptc.training.program_module import ProgramModule
from adaptc.training.sharded_tensors import first_of, mesh_of, reshard, whole


def write_module(
    module: ProgramModule,
    path: str | os.PathLike[str],
    binding: Binding | None = None,
    *,
    here: bool = True,
    for_trainer: bool = False,
    **options: Any,
) -> Path:
    """Write the adapter of ``module``; returns the directory.

    ``binding``: a binding to write instead, None for the module's. ``here``: whether this process writes, where every
    process has whole tensors. ``for_trainer``: write the weights under the name that Trainer looks for, too.
    ``options``: those of :func:`write_current`.

    All processes call it where the module is sharded. The first of them writes, and all return when it has. Raises as
    :func:`write_current` does, and CheckpointError where another process could not write.
    """
    mesh = None
    if binding is None:
        reshard(module)
        binding = module.binding()
        mesh = next((m for t in binding.values.values() if (m := mesh_of(t)) is not None), None)
        binding = replace(binding, values={k: whole(t) for k, t in binding.values.items()})
    written = Path(path)
    with first_of(mesh) as first:
        if first and (here or mesh is not None):
            with linked_for_trainer(written) if for_trainer else without_link(written):
                written = write_current(module.program, path, binding, **options)
    return written


def check_followed(program: ProgramCore) -> None:
    """Raise AdaptcError where a module of the program trains other tensors than the program has.

    The program then lacks what these tensors learn. A file or a merged program would have the adapter from before.
    """
    if program.current is None:
        return
    now = program.current.values
    for module in list(program.memory.modules):
        own = module.tensors()
        # Trainable tensors only: scales are buffers, which torch replaces whenever a module is moved.
        trained = {k: t for k, t in module.program.binding.values.items() if t.requires_grad and k in own}
        known = [k for k, t in trained.items() if now.get(k) is t]
        lost = [k for k in known if own[k] is not now[k]]
        if lost:
            parts = mesh_of(own[lost[0]]) is not None
            how = "parts of them, in several processes" if parts else "others in their place"
            raise AdaptcError(
                f"the program does not have what was trained: it was made with {shown(lost[0])} and {len(lost) - 1} "
                f"more tensors, and its module has {how}. Write the adapter with adaptc.save_adapter(module, path)"
                f"{', called in every process' if parts else ''}; adaptc.swap(program, path) then gives the program it"
            )
