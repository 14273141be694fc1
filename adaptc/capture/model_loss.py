"""What a transformers model's loss is: whether it is the mean over the labels that count, each of the next token.

Trainers that take several batches a step divide the sum over all of them by the labels of all of them, which a module
can only do where it knows what its loss was divided by.
"""

from __future__ import annotations

import inspect

from torch import nn


def means_over_next_labels(model: nn.Module) -> bool:
    """Whether the model's ``forward`` takes its loss from transformers' ``loss_function``, and that is the one of
    causal language models. What classes without a known loss have (``GPT2LMHeadModel``) is that one too."""
    from transformers import PreTrainedModel
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    if not isinstance(model, PreTrainedModel) or hasattr(model, "_loss_function"):
        return False  # the latter: a function of the user's
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    if code is None or "loss_function" not in code.co_names:
        return False
    if type(model).loss_function is not PreTrainedModel.loss_function:
        return False
    return LOSS_MAPPING.get(loss_type(model) or "", ForCausalLMLoss) is ForCausalLMLoss


def loss_type(model: nn.Module) -> str | None:
    """transformers' name of the loss, which Trainer asks for; None where there is none."""
    found = getattr(model, "loss_type", None)
    return found if isinstance(found, str) else None
