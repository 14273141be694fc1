"""Let a module that is being trained generate, by a step program on the same tensors.

The module belongs to a program that was captured for training from a transformers model that generates. The step
program is captured once, when it is first needed. Each generation binds the adapter anew to the module's current
parameters, so no value that was computed from older ones is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from adaptc.generation.compile_generation import compile_for_generation
from adaptc.generation.generator import Generator
from adaptc.generation.seq2seq.seq2seq_spec import decoder_length
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.program.recapture import adapter_in_memory, binding_on_rebuilt_model, isolated_capture, rebuild_model
from adaptc.training.pretrained_module import PretrainedModule

#: the most rows, and the most positions where the model numbers none: only memory limits them, as caches grow with a
#: call
_UNLIMITED = 2**24

W = TypeVar("W")


def generate_with_module(module: PretrainedModule, inputs: Tensor | None, generation_config: Any, **kwargs: Any) -> Any:
    """Generate with the parameters that ``module`` has now, in eval mode and its own dtype, whatever its mode and
    autocast are.

    Raises AdaptcError for a module that cannot generate, and the errors of :meth:`Generator.generate`.
    """
    kwargs.pop("labels", None)  # Trainer passes labels, which change nothing in generation
    with torch.autocast(module.device.type, enabled=False):
        return _generator_for(module).generate(inputs, generation_config, **kwargs)


@with_graph_lock
def _generator_for(module: PretrainedModule) -> Generator:
    """Return a generator with the module's current adapter; each thread that asks gets one of its own."""
    return captured_for_module(module, "generator", _capture_generator)


def captured_for_module(module: PretrainedModule, kind: str, capture: Callable[[PretrainedModule], W]) -> W:
    """Return what ``capture`` makes of the module, with the module's current adapter and generation config.

    It is captured once, and kept on the module as its ``kind``. The caller holds the graph lock.
    """
    frozen = [t for t in module.parameters() if not t.requires_grad]
    known = vars(module).get(kind)
    # A frozen weight that was replaced must be captured anew, as the program holds the old tensor.
    if known is None or [*map(id, known[0])] != [*map(id, frozen)]:
        with isolated_capture(module):
            known = vars(module)[kind] = frozen, capture(module)
    made: Any = known[1]
    binding = binding_on_rebuilt_model(module)
    # Adapters of a module may have different sites; the program has the sites of the current one only.
    made.program.swap_adapter(
        binding if binding.values.keys() == made.program.binding_plans.tensor_names else adapter_in_memory(module)
    )
    new = made.shallow_copy()
    new.generation_config = module.generation_config
    return new


def _capture_generator(module: PretrainedModule) -> Generator:
    program, config = module.program, module.config
    text = config if config.is_encoder_decoder else config.get_text_config(decoder=True)
    positions = decoder_length(text)
    return compile_for_generation(
        rebuild_model(module),
        adapter_in_memory(module),
        max_batch=_UNLIMITED,
        max_length=None if positions is not None else _UNLIMITED,
        adapter_name=module.binding().name,
        autocast_adapter_dtype=program.adaptation.autocast,
        fuse=bool(program.options.fuse),
        hoist_limit=program.options.hoist_limit,
    )
