"""Let a module that is being trained generate for many prompts at once, by a paged step program on the same tensors.

The program is captured once, when it is first needed. Each call binds the adapter anew to the module's current
parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from adaptc.generation.of_module import captured_for_module
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.program.recapture import adapter_in_memory, rebuild_model
from adaptc.serving.compile_for_serving import compile_for_serving
from adaptc.serving.serving_model import ServingModel
from adaptc.training.pretrained_module import PretrainedModule


def generate_batch_with_module(
    module: PretrainedModule,
    inputs: Sequence[Sequence[int]],
    generation_config: Any = None,
    continuous_batching_config: Any = None,
    **kwargs: Any,
) -> Any:
    """Generate with the parameters that ``module`` has now, in eval mode and its own dtype.

    The pool has room for all prompts, unless ``continuous_batching_config`` says how large it is. Raises as
    :meth:`ServingModel.generate_batch` does.
    """
    with torch.autocast(module.device.type, enabled=False):
        serving = _serving_for(module)
        options = generation_config or serving.generation_config
        batching = copy.copy(continuous_batching_config or serving.batching_config(num_blocks=None))
        if batching.num_blocks is None and batching.max_memory_percent is None:
            new = kwargs.get("max_new_tokens") or options.max_new_tokens or 0
            answers = options.num_return_sequences or 1
            pages = sum(-(-(len(prompt) + new) // batching.page_size) for prompt in inputs)
            batching.num_blocks = 2 * answers * pages + 1
        return serving.generate_batch(inputs, generation_config, batching, **kwargs)


@with_graph_lock
def _serving_for(module: PretrainedModule) -> ServingModel:
    return captured_for_module(module, "serving", _capture_serving)


def _capture_serving(module: PretrainedModule) -> ServingModel:
    program = module.program
    return compile_for_serving(
        rebuild_model(module),
        adapter_in_memory(module),
        autocast_adapter_dtype=program.adaptation.autocast,
        hoist_limit=program.options.hoist_limit,
    )
