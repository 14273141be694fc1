"""Prepare the example inputs that a user gives: bind them to ``forward``, and find their free sizes.

torch's tracer takes a size of 1 for a constant. So this file also makes copies of the inputs in which such sizes are
larger.

``is_causal_lm_loss`` tells whether a transformers model's loss is the mean over next-token labels. A trainer that
accumulates gradients divides the summed loss of several batches by the number of labels in all of them. A module can
do that only where it knows what its loss was divided by.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.capture.dynamic_shapes import FreeDims
from adaptc.capture.inputs.example_inputs import BATCH
from adaptc.errors import CaptureError
from adaptc.passes.graph.pytree import pytree


def bind_arguments(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Tensor):
        args, kwargs = (example_inputs,), {}
    elif isinstance(example_inputs, tuple):
        args, kwargs = example_inputs, {}
    elif isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    else:
        raise CaptureError(
            f"example_inputs is a {type(example_inputs).__name__}: give a tensor, a tuple of positional inputs or a "
            "dict of keyword inputs"
        )
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        names = ", ".join(inspect.signature(model.forward).parameters)
        raise CaptureError(f"example_inputs do not fit {type(model).__name__}.forward({names}): {error}") from error
    return args, kwargs


def all_dims_free(inputs: tuple[tuple, Mapping[str, Any]]) -> FreeDims:
    """Return a function that names every dimension of a tensor as free.

    A dimension 0 of the first tensor's batch size is called "batch". All others are None, so that torch relates them.
    """
    batch = next((t.shape[0] for t in collect_tensors(inputs)), None)

    def free_dims(tensor: Tensor) -> dict[int, str | None]:
        return {i: BATCH if i == 0 and size == batch else None for i, size in enumerate(tensor.shape)}

    return free_dims


def collect_tensors(inputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim > 0]


def enlarge_sizes_of_one(args: tuple, kwargs: Mapping[str, Any]) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """Yield copies of the inputs whose dimensions of size 1 are larger, since torch takes a size of 1 for a constant.

    The first copy enlarges all such dimensions, and the second only the batch.
    """
    tensors = collect_tensors((args, kwargs))
    single = bool(tensors) and all(t.shape[0] == 1 for t in tensors)
    inner = any(size == 1 for t in tensors for size in t.shape[1:])
    for axes in ([True] if inner else []) + ([False] if single else []):

        def grow(t: Tensor, inside: bool = axes) -> Tensor:
            for i, size in enumerate(t.shape):
                # Inner sizes grow to 3, since torch would take another 2 for the batch.
                times = (2 if single else 1) if i == 0 else 3 if inside and size == 1 else 1
                t = torch.cat([t] * times, i)
            return t

        yield pytree.tree_map_only(Tensor, grow, (args, dict(kwargs)))


def is_causal_lm_loss(model: nn.Module) -> bool:
    """Return whether ``forward`` takes its loss from transformers' ``loss_function``, and that is the causal LM loss.

    Classes without a known loss (``GPT2LMHeadModel``) use the causal LM loss, too.
    """
    from transformers import PreTrainedModel
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    if not isinstance(model, PreTrainedModel) or hasattr(model, "_loss_function"):
        return False  # a user's own loss function is in ``_loss_function``
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    if code is None or "loss_function" not in code.co_names:
        return False
    if type(model).loss_function is not PreTrainedModel.loss_function:
        return False
    return LOSS_MAPPING.get(loss_type(model) or "", ForCausalLMLoss) is ForCausalLMLoss


def loss_type(model: nn.Module) -> str | None:
    """Return transformers' name of the model's loss, which Trainer reads, or None where it has none."""
    found = getattr(model, "loss_type", None)
    return found if isinstance(found, str) else None
