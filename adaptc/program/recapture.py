"""Prepare the model and the adapter of a module to be captured once more.

The module is one of a program that was captured for training, whose source has a skeleton. The model is made on the
tensors that the module has now. The adapter is in a form that ``compile`` takes. The module does not change.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError
from adaptc.program.add_adapter import to_adapter_data
from adaptc.torch_typing import fork_rng
from adaptc.training.pretrained_module import PretrainedModule
from adaptc.training.sharded_tensors import mesh_of


def rebuild_model(module: PretrainedModule) -> nn.Module:
    """Return the model of ``module``, on the tensors that the module has now. Raises AdaptcError where it cannot be
    made again, and for a module whose tensors are held in parts, by FSDP2 or ``shard_tensors``."""
    shell = module.source.skeleton
    if shell is None or not module.can_recapture:
        raise module.recapture_error()
    own = module.tensors()
    if any(mesh_of(t) is not None for t in own.values()):
        raise AdaptcError(
            "a module that is held in parts (FSDP2, shard_tensors) cannot be captured again, which generation and "
            "packed sequences need: write the adapter with adaptc.save_adapter(module, path), and go on with a module "
            "of that"
        )
    program = module.program
    constants = {n: t for n, t in program.constants.items() if isinstance(t, Tensor)}
    # ``originals`` come last: an adapter that changes the base (PiSSA) does so again when it is compiled. One that
    # changed it by data cannot, and gets the base as it changed it.
    by_data = _changed_by_data(program.binding)
    originals = {n: t for n, t in program.originals.items() if n not in by_data}
    return shell.with_tensors({**constants, **program.base_tensors_or_empty(), **own, **originals})


def binding_on_rebuilt_model(module: PretrainedModule) -> Binding:
    """Return the current binding of ``module`` for a program of its rebuilt model, which has the base weights already
    that were changed by data."""
    binding = module.binding()
    return binding.without_changed_base(_changed_by_data(binding))


def _changed_by_data(binding: Binding) -> frozenset[str]:
    """Return the FQNs of the base weights that adapters in ``binding`` changed by data."""
    parts = (p.active_form or p for p in binding.adapters_by_name.values())
    return frozenset(n for p in parts if _needs_data(p) for n in p.changed_base)


def _needs_data(binding: Binding) -> bool:
    return any(m.base_needs_data() for m in binding.methods.values())


def adapter_in_memory(module: PretrainedModule) -> Any:
    """Return the current adapter of ``module`` as one that was loaded; several adapters that act together by name.

    Their configs ask for no layer replication, since the model has the repeated layers already. Raises as the binding
    of a module does.
    """
    binding = module.binding()
    parts = {n: p.active_form or p for n, p in binding.joint_adapters.items()}
    made: dict[str, Any] = {}
    for n, p in (parts or {binding.name: binding.active_form or binding}).items():
        own = replace(p, config=p.config.for_changed_base()) if _needs_data(p) else p
        data = to_adapter_data(module.program, n, own)
        made[n] = data.with_config({**(data.config or {}), "layer_replication": None})
    return made if parts else made[binding.name]


@contextmanager
def isolated_capture(module: PretrainedModule) -> Generator[None]:
    """Run the block so that captures in it neither depend on training nor change it: the random state is put back after
    it, and autocast is off, so that it is not written into a graph."""
    with fork_rng(), torch.autocast(module.device.type, enabled=False):
        yield
