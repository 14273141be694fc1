"""The model of a module, captured once more: what for, and with which adapter.

Before: a module of a program that was captured for training, whose source has a shell. After: the model on the tensors
that the module has now, and its adapter as ``compile`` takes it; the module is as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.errors import AdaptcError
from adaptc.program.add import InMemory, as_file
from adaptc.program.in_parts import mesh_of
from adaptc.program.pretrained_module import PretrainedModule


def model_of(module: PretrainedModule) -> nn.Module:
    """The model, on the tensors that the module has now. Raises AdaptcError where it cannot be made again, and for a
    module that is held in parts."""
    shell = module.source.shell
    if shell is None or not module.again:
        raise AdaptcError(
            "the model of this module cannot be captured again, which generation and packed sequences need: that of "
            "adaptc.compile(model, config, training=True) can, of a model that generates"
        )
    own = module.tensors()
    if any(mesh_of(t) is not None for t in own.values()):
        raise AdaptcError(
            "a module that is held in parts (FSDP2) cannot be captured again, which generation and packed sequences "
            "need: write the adapter with adaptc.save_adapter(module, path), and go on with a module of that"
        )
    program = module.program
    constants = {n: t for n, t in program.constants.items() if isinstance(t, Tensor)}
    # An adapter that changed the base does so again, from what it was before.
    return shell.filled({**constants, **program.bare_state(), **own, **program.originals})


def adapter_of(module: PretrainedModule) -> Any:
    """The adapter as it is now, in memory, or adapters by name. Layers that the model repeats are not repeated again.

    Raises as the binding of a module does."""
    binding = module.binding()
    parts = {n: p.idle or p for n, p in binding.parts.items()}
    files = {n: as_file(module.program, n, p) for n, p in (parts or {binding.name: binding.idle or binding}).items()}
    made = {n: InMemory(replace(f, config={**f.config, "layer_replication": None})) for n, f in files.items()}
    return made if parts else made[binding.name]


@contextmanager
def aside(module: PretrainedModule) -> Iterator[None]:
    """A block whose captures are those of any other time: nothing that is drawn there changes what the training draws,
    and no autocast is written into a graph."""
    with torch.random.fork_rng(), torch.autocast(module.device.type, enabled=False):
        yield
