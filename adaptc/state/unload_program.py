"""Unload a program: give its base, without an adapter and with every base tensor the object it was before compile."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from adaptc.errors import MergeError
from adaptc.passes.adapt.unload import Unload
from adaptc.passes.graph.graph_lock import exclusive
from adaptc.passes.graph.pass_infra import Pass, PassManager
from adaptc.passes.train.set_mode import SetMode
from adaptc.state.core import ProgramCore

P = TypeVar("P", bound=ProgramCore)


@exclusive
def unloaded(program: P) -> P:
    """Return the base of ``program``; ``adaptc.unload`` tells more. Raises MergeError where the base is not known."""
    program = program.snapshot()
    a = program.adaptation
    if a.residual:
        raise MergeError(
            f"the file this program came from holds only the adapter's own version of {list(a.residual)[:3]} (its "
            "initialisation changed the base), so the base cannot be given back. Compile the original model instead."
        )
    base = program.base_tensors
    passes: list[Pass] = [Unload({k: base[k] for k in program.originals})]
    passes += [SetMode(training=False)] if a.training else []
    done = PassManager(passes)(program)
    bare = a.bare()
    adaptation = replace(bare, trail=(*bare.trail, *done.trail))
    return type(program)(done.output, adaptation, options=replace(program.options, fuse=False))
