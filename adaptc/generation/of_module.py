"""A module that trains generates, by a step program on the same tensors.

Before: a module of a program that was captured for training from a transformers model that generates. After: a
generator for it, captured once, when it is first asked for. Its adapter is bound anew for each generation, to the
parameters that the module has then, so nothing that was computed of older values is used again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaptc.generation.compile import compile_for_generation
from adaptc.generation.cross_facts import decoder_positions
from adaptc.generation.generator import Generator
from adaptc.passes.ir.exclusive import exclusive
from adaptc.program.pretrained_module import PretrainedModule
from adaptc.program.recapture import adapter_of, aside, model_of
from adaptc.program.swap import swapped

#: rows, and positions of a model that numbers none: memory is the only limit, for a cache is as large as its call
_MANY = 2**24


def generate(module: PretrainedModule, inputs: Tensor | None, generation_config: Any, **kwargs: Any) -> Any:
    """What ``module`` generates with the parameters that it has now, in eval mode and in its own dtype whatever mode
    and autocast are. Raises AdaptcError for a module that cannot, and as :meth:`Generator.generate` does."""
    kwargs.pop("labels", None)  # Trainer gives them, and models generate the same with them
    with torch.autocast(module.device.type, enabled=False):
        return _bound(module).generate(inputs, generation_config, **kwargs)


@exclusive
def _bound(module: PretrainedModule) -> Generator:
    """A generator whose adapter is the module's as it is now; several threads may have one at once."""
    frozen = [t for t in module.parameters() if not t.requires_grad]
    known = vars(module).get("generator")
    # Whoever replaces a weight wants that one.
    if known is None or [*map(id, known[0])] != [*map(id, frozen)]:
        with aside(module):
            known = vars(module)["generator"] = frozen, _captured(module)
    made: Generator = known[1]
    binding = module.binding()
    # Of adapters for several sets of sites the generator has those of the current one.
    swapped(made.program, binding if binding.values.keys() == made.program.recipes.needed else adapter_of(module))
    new = made.twin()
    new.generation_config = module.generation_config
    return new


def _captured(module: PretrainedModule) -> Generator:
    program, config = module.program, module.config
    text = config if config.is_encoder_decoder else config.get_text_config(decoder=True)
    positions = decoder_positions(text)
    return compile_for_generation(
        model_of(module),
        adapter_of(module),
        max_batch=_MANY,
        max_length=None if positions is not None else _MANY,
        adapter_name=module.binding().name,
        autocast_adapter_dtype=program.adaptation.autocast,
        fuse=bool(program.options.fuse),
        hoist_limit=program.options.hoist_limit,
    )
