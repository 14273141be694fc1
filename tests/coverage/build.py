"""Builds the tiny model of a row, and finds inputs of two sizes that it takes."""

from __future__ import annotations

from typing import Any

import torch

from tests.coverage.configs.tiny_configs import tiny_config
from tests.coverage.model_inputs import SIZES, makers
from tests.coverage.outputs import Call, Outputs, run
from tests.coverage.rows import Row
from tests.support.families import perturb


def build(row: Row) -> Any:
    """Return the model of a row, in eval mode and float32, from a fixed seed, with no value that is zero."""
    import transformers

    model_class = getattr(transformers, row.model_class)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(tiny_config(row.family, model_class)).float()
    perturb(model)
    generation = getattr(model, "generation_config", None)
    if generation is not None and getattr(model.config, "is_encoder_decoder", False):
        generation.decoder_start_token_id = generation.decoder_start_token_id or 1
    if hasattr(model, "set_default_language"):
        model.set_default_language(model.config.languages[0])
    return model.eval()


def build_and_run(row: Row) -> tuple[Any, list[Call]]:
    """Return the model and its inputs of both sizes. Where none fit, raise the error of the likeliest."""
    model = build(row)
    errors: list[Exception] = []
    for maker in makers(model, row.task):
        try:
            calls = [maker(*size) for size in SIZES]
            for call in calls:
                outputs = run(model, call)
                if not any(bool(values.isfinite().any()) for values in outputs.values()):
                    raise ValueError("the model has no finite output")
                _check_images(model, call, outputs)
        except Exception as error:
            errors.append(error)
            continue
        return model, calls
    raise errors[0] if errors else ValueError("no inputs are known for it")


def _check_images(model: Any, call: Call, outputs: Outputs) -> None:
    """Raise ValueError where other images give the same output beside a text: they were not read."""
    names = [name for name in call if name.startswith(("pixel_values", "flattened_patches")) and "input_ids" in call]
    if names:
        other = run(model, {k: v.flip(0) * 0.7 + 0.2 if k in names else v for k, v in call.items()})
        if all(k in other and torch.equal(v, other[k]) for k, v in outputs.items()):
            raise ValueError("the images change nothing")
