"""Make a module that takes ``position_ids``, for rows that hold several packed sequences.

The first module was captured with tokens and a mask, as trainers that pad call it. The second one is of the same model,
captured with ``position_ids`` as well. Without a mask, transformers then lets each token attend to its own sequence
alone. The second module reads the first one's parameters, whoever replaces them.

Trainers also pass the bounds of sequences to kernels that need them (``cu_seq_lens_q`` and its like). They are accepted
where the model itself computes the same without them. One run of the model tells whether it does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from adaptc.errors import AdaptcError
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.train.recomputed import RecomputedSegment
from adaptc.program.compile_program import compile_model
from adaptc.program.recapture import adapter_in_memory, isolated_capture, rebuild_model
from adaptc.torch_typing import manual_seed, named_modules
from adaptc.training.packed_calls import SEQUENCE_BOUNDS
from adaptc.training.pretrained_module import PretrainedModule

#: position_ids of three packed sequences in one row
_POSITIONS = (0, 1, 2, 0, 1, 0, 1, 2, 3)


@with_graph_lock
def make_packed_module(module: PretrainedModule, has_mask: bool) -> PretrainedModule:
    """Return a module of the same model and adapter as ``module`` that takes ``position_ids``, and an
    ``attention_mask`` where ``has_mask``. Raises AdaptcError where the program has sites that the current adapter
    lacks."""
    program, binding = module.program, module.binding()
    with isolated_capture(module):
        rows, count = 3, 7
        ids = torch.arange(rows * count, device=module.device).reshape(rows, count) % module.config.vocab_size
        inputs = {"input_ids": ids, "position_ids": torch.arange(count, device=ids.device).repeat(rows, 1)}
        inputs |= {"labels": ids.clone()} if "labels" in module.inputs.names else {}
        inputs |= {"attention_mask": torch.ones_like(ids)} if has_mask else {}
        compiled_program = compile_model(
            type(program),
            rebuild_model(module),
            adapter_in_memory(module),
            program.options,
            example_inputs=inputs,
            training=program.adaptation.training,
            adapter_name=binding.name,
            autocast=program.adaptation.autocast,
        )
    if compiled_program.binding_plans.tensor_names != binding.values.keys():
        raise AdaptcError("position_ids: the program has sites of adapters that are not the current one's")
    new: PretrainedModule = module.factory(bound := compiled_program.with_binding(binding), bound)  # type: ignore[assignment]
    _share_tensors(module, new)
    return new


def _share_tensors(module: PretrainedModule, new: PretrainedModule) -> None:
    """Let ``new`` read the parameters and buffers of ``module``, and run the hooks on its input embeddings."""
    for path, holder in [("", module), *named_modules(module)]:
        theirs = _find_submodule(new, path)
        if theirs is not None:
            for own in (theirs, new.graph_module) if not path else (theirs,):
                vars(own)["_parameters"] = vars(holder)["_parameters"]
                if path:  # the root's buffers include constants of its own graph, which differ between the two
                    vars(own)["_buffers"] = vars(holder)["_buffers"]
    port = vars(module)["port"]
    children = vars(new)["_modules"]
    children |= {n: port for n, m in children.items() if m is vars(new)["port"]}
    vars(new)["port"] = port


def _find_submodule(new: nn.Module, path: str) -> nn.Module | None:
    try:
        found = new.get_submodule(path)
    except AttributeError:
        return None
    return None if path and isinstance(found, (fx.GraphModule, RecomputedSegment)) else found


@with_graph_lock
def find_bounds_read(module: PretrainedModule) -> list[str]:
    """Return which of :data:`SEQUENCE_BOUNDS` the model reads: those that change its logits when they are given beside
    ``position_ids``.

    Returns all of them where only several at once change the logits, and where the model refuses them.
    """
    model, device = rebuild_model(module).train(), module.device
    positions = torch.tensor([_POSITIONS], device=device)
    ids = torch.arange(len(_POSITIONS), device=device)[None] % module.config.vocab_size
    starts = (positions[0] == 0).nonzero().flatten()
    ends = torch.cat([starts, starts.new_tensor([len(_POSITIONS)])]).int()
    index = ((positions == 0).cumsum(-1) - 1).int()
    longest = int(ends.diff().max())
    bounds: dict[str, Any] = dict(zip(SEQUENCE_BOUNDS, (ends, ends, longest, longest, index), strict=True))

    def logits(**more: Any) -> Tensor:
        manual_seed(0)  # both runs draw the same dropout
        return model(input_ids=ids, position_ids=positions, use_cache=False, **more).logits

    with isolated_capture(module), torch.no_grad():
        plain = logits()
        try:
            if torch.equal(plain, logits(**bounds)):
                return []
            return [n for n, value in bounds.items() if not torch.equal(plain, logits(**{n: value}))] or list(
                SEQUENCE_BOUNDS
            )
        except (TypeError, ValueError, RuntimeError):
            return list(SEQUENCE_BOUNDS)  # the model does not take them, or not one alone
