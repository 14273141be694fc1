"""Make example inputs for a model that came without any, by the library that its class is from."""

from __future__ import annotations

from typing import Any

from adaptc.capture.inputs.diffusion_inputs import example_for_diffusion, is_diffusion_model
from adaptc.capture.inputs.example_inputs import Example, example_for, is_pretrained_model
from adaptc.errors import CaptureError


def example_of(model: Any, *, training: bool) -> Example:
    """Return example inputs that the model's ``forward`` accepts, with their free dimensions.

    Raises CaptureError where the model has no config, or the config does not tell what the model takes.
    """
    if is_pretrained_model(model):
        return example_for(model, training=training)
    if is_diffusion_model(model):
        return example_for_diffusion(model, training=training)
    raise CaptureError(
        f"{type(model).__name__} is not a transformers model, so its inputs cannot be made up: pass "
        "example_inputs, a tensor, a tuple of positional inputs or a dict of keyword inputs"
    )
