"""Tell whether a transformers model's loss is the mean over next-token labels.

A trainer that accumulates gradients divides the summed loss of several batches by the number of labels in all of them.
A module can do that only where it knows what its loss was divided by.
"""

from __future__ import annotations

import inspect

from torch import nn


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
