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
from adaptc.passes.graph.graph_lock import exclusive
from adaptc.passes.train.recomputed import Recomputed
from adaptc.program.compile_program import compiled
from adaptc.program.recapture import adapter_of, aside, model_of
from adaptc.training.packed_calls import BOUNDS
from adaptc.training.pretrained_module import PretrainedModule

#: position_ids of three packed sequences in one row
_POSITIONS = (0, 1, 2, 0, 1, 0, 1, 2, 3)


@exclusive
def packed(module: PretrainedModule, masked: bool) -> PretrainedModule:
    """Return a module of the same model and adapter as ``module`` that takes ``position_ids``, and an
    ``attention_mask`` where ``masked``. Raises AdaptcError where the program has sites that the current adapter
    lacks."""
    program, binding = module.program, module.binding()
    with aside(module):
        rows, count = 3, 7
        ids = torch.arange(rows * count, device=module.device).reshape(rows, count) % module.config.vocab_size
        inputs = {"input_ids": ids, "position_ids": torch.arange(count, device=ids.device).repeat(rows, 1)}
        inputs |= {"labels": ids.clone()} if "labels" in module.inputs.names else {}
        inputs |= {"attention_mask": torch.ones_like(ids)} if masked else {}
        made = compiled(
            model_of(module),
            adapter_of(module),
            program.options,
            example_inputs=inputs,
            training=program.adaptation.training,
            adapter_name=binding.name,
            autocast=program.adaptation.autocast,
        )
    if made.recipes.needed != binding.values.keys():
        raise AdaptcError("position_ids: the program has sites of adapters that are not the current one's")
    new: PretrainedModule = module.making(bound := made.with_binding(binding), bound)  # type: ignore[assignment]
    _share(module, new)
    return new


def _share(module: PretrainedModule, new: PretrainedModule) -> None:
    """Let ``new`` read the parameters and buffers of ``module``, and run the hooks on its input embeddings."""
    for path, holder in [("", module), *module.named_modules()]:
        theirs = _holder(new, path)
        if theirs is not None:
            for own in (theirs, new.graph_module) if not path else (theirs,):
                vars(own)["_parameters"] = vars(holder)["_parameters"]
                if path:  # the root's buffers include constants of its own graph, which differ between the two
                    vars(own)["_buffers"] = vars(holder)["_buffers"]
    port = vars(module)["port"]
    children = vars(new)["_modules"]
    children |= {n: port for n, m in children.items() if m is vars(new)["port"]}
    vars(new)["port"] = port


def _holder(new: nn.Module, path: str) -> nn.Module | None:
    try:
        found = new.get_submodule(path)
    except AttributeError:
        return None
    return None if path and isinstance(found, (fx.GraphModule, Recomputed)) else found


@exclusive
def read_bounds(module: PretrainedModule) -> list[str]:
    """Return which of :data:`BOUNDS` the model reads: those that change its logits when they are given beside
    ``position_ids``.

    Returns all of them where only several at once change the logits, and where the model refuses them.
    """
    model, device = model_of(module).train(), module.device
    positions = torch.tensor([_POSITIONS], device=device)
    ids = torch.arange(len(_POSITIONS), device=device)[None] % module.config.vocab_size
    starts = (positions[0] == 0).nonzero().flatten()
    ends = torch.cat([starts, starts.new_tensor([len(_POSITIONS)])]).int()
    index = ((positions == 0).cumsum(-1) - 1).int()
    longest = int(ends.diff().max())
    told: dict[str, Any] = dict(zip(BOUNDS, (ends, ends, longest, longest, index), strict=True))

    def found(**more: Any) -> Tensor:
        torch.manual_seed(0)  # both runs draw the same dropout
        return model(input_ids=ids, position_ids=positions, use_cache=False, **more).logits

    with aside(module), torch.no_grad():
        plain = found()
        try:
            if torch.equal(plain, found(**told)):
                return []
            return [n for n, value in told.items() if not torch.equal(plain, found(**{n: value}))] or list(BOUNDS)
        except (TypeError, ValueError, RuntimeError):
            return list(BOUNDS)  # the model does not take them, or not one alone
