"""Make example inputs for a model that came without any, by the library that its class is from."""

from __future__ import annotations

from typing import Any

from adaptc.capture.inputs.diffusion_inputs import diffusion_example, is_diffusion_model
from adaptc.capture.inputs.example_inputs import ExampleInputs, is_pretrained_model, pretrained_example
from adaptc.errors import CaptureError


def make_example_inputs(model: Any, *, training: bool) -> ExampleInputs:
    """Return example inputs that the model's ``forward`` accepts, with their free dimensions.

    Raises CaptureError where the model has no config, or the config does not tell what the model takes.
    """
    if is_pretrained_model(model):
        return pretrained_example(model, training=training)
    if is_diffusion_model(model):
        return diffusion_example(model, training=training)
    raise CaptureError(
        f"{type(model).__name__} is not a transformers model, so its inputs cannot be made up: pass "
        "example_inputs, a tensor, a tuple of positional inputs or a dict of keyword inputs"
    )
