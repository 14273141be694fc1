"""Make example inputs for a transformers model from its config, so that capturing it needs nothing but the model.

The inputs are keyword inputs that the model's ``forward`` accepts, on its device and in its dtype. Each tensor's free
dimensions are given by name. Equal names mean equal sizes. Sizes of different names differ in the example, so that
torch does not take two dimensions for one. This file never imports transformers.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcWarning, CaptureError

BATCH, SEQUENCE, DECODER_SEQUENCE, IMAGES = "batch", "sequence", "decoder_sequence", "images"
_SIZES = {BATCH: 3, SEQUENCE: 7, DECODER_SEQUENCE: 11, IMAGES: 5}

_LABEL_PER_ROW = ("SequenceClassification", "ImageClassification", "AudioClassification", "VideoClassification")
_LABEL_PER_TOKEN = ("CausalLM", "LMHeadModel", "MaskedLM", "ConditionalGeneration")


@dataclass(frozen=True)
class ExampleInputs:
    """Keyword inputs for one call of a model, and the names of their free dimensions.

    ``dims[name][i]`` names the free dimension ``i`` of input ``name``. None leaves that dimension's constraints to
    torch. The tensors of an input that is a dict are called ``name.key``, and of a tuple ``name.0``.
    """

    kwargs: dict[str, Any]
    free_dims: dict[str, dict[int, str | None]]

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors, by the names that ``free_dims`` uses."""
        out: dict[str, Tensor] = {}
        for name, value in self.kwargs.items():
            inside: Any = dict(enumerate(value)) if isinstance(value, (list, tuple)) else value
            if isinstance(inside, dict):
                out |= {f"{name}.{k}": t for k, t in inside.items()}
            else:
                out[name] = inside
        return out

    def dims_of(self, tensor: Tensor) -> dict[int, str | None]:
        """Return the free dimensions of ``tensor``, which must be one of the example's tensors."""
        return next(self.free_dims.get(name, {}) for name, t in self.tensors().items() if t is tensor)


def is_pretrained_model(model: object) -> bool:
    """Return whether ``model`` is a transformers model, told by the names of its classes."""
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(model).__mro__
    )


def pretrained_example(model: Any, *, training: bool) -> ExampleInputs:
    """Return example inputs for ``model``, with labels where ``training`` is set and ``forward`` takes them.

    With labels the loss is captured. May write the problem type of the labels to the config, which the caller restores.
    Raises :class:`CaptureError` when the config does not tell what the model takes.
    """
    parameters = inspect.signature(model.forward).parameters
    main_input = getattr(model, "main_input_name", "input_ids")
    builders = {"input_ids": _add_text, "pixel_values": _add_images, "input_features": _add_audio}
    if main_input not in builders or main_input not in parameters:
        raise CaptureError(
            f"{type(model).__name__} takes {main_input!r}, and its config does not tell its shape: pass "
            f"example_inputs, a dict of keyword inputs (its forward takes {', '.join(parameters)})"
        )
    kwargs: dict[str, Tensor] = {}
    free_dims: dict[str, dict[int, str | None]] = {}
    builders[main_input](model, parameters, kwargs, free_dims)
    if main_input == "input_ids" and "pixel_values" in parameters and _is_dual_encoder(model):
        _add_images(model, parameters, kwargs, free_dims, IMAGES)
    if training:
        _add_labels(model, parameters, kwargs, free_dims)
    # Given such labels, the model makes decoder_input_ids by shifting them, as a trainer expects.
    shifted = free_dims.get("labels", {}).get(1) == DECODER_SEQUENCE
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters and not shifted:
        _add_input(
            kwargs, free_dims, "decoder_input_ids", _make_ids(model, BATCH, DECODER_SEQUENCE), (BATCH, DECODER_SEQUENCE)
        )
    return ExampleInputs(kwargs, free_dims)


def text_encoder_example(model: Any) -> ExampleInputs:
    """Return example inputs for ``model`` as the text encoder of a pipeline, which asks for all hidden states.

    The mask is an input only where the config says ``use_attention_mask``, as pipelines have it.
    """
    kwargs: dict[str, Any] = {}
    free_dims: dict[str, dict[int, str | None]] = {}
    ids = _make_ids(model, BATCH, SEQUENCE)
    _add_input(kwargs, free_dims, "input_ids", ids, (BATCH, SEQUENCE))
    if getattr(model.config, "use_attention_mask", False):
        _add_input(kwargs, free_dims, "attention_mask", torch.ones_like(ids), (BATCH, SEQUENCE))
    return ExampleInputs({**kwargs, "output_hidden_states": True}, free_dims)


def _is_dual_encoder(model: Any) -> bool:
    """Return whether the model encodes texts and images apart and compares them, as CLIP and SigLIP do.

    Its ``forward`` needs both, and takes any number of each. Where images are part of the text (LLaVA), there is no
    separate text encoder.
    """
    return all(hasattr(model, f"get_{kind}_features") for kind in ("text", "image"))


def _add_input(kwargs: dict, free_dims: dict, name: str, value: Tensor, names: tuple[str, ...]) -> None:
    kwargs[name] = value
    free_dims[name] = dict(enumerate(names))


def _text_config(model: Any) -> Any:
    get = getattr(model.config, "get_text_config", None)
    return get() if get is not None else model.config


def _make_ids(model: Any, *names: str) -> Tensor:
    vocab = getattr(_text_config(model), "vocab_size", None)
    if not vocab:
        raise CaptureError(f"the config of {type(model).__name__} has no vocab_size: pass example_inputs")
    shape = [_SIZES[n] for n in names]
    return (torch.arange(shape[0] * shape[1], device=model.device) % int(vocab)).reshape(shape)


def _add_text(model: Any, parameters: Any, kwargs: dict, free_dims: dict) -> None:
    ids = _make_ids(model, BATCH, SEQUENCE)
    _add_input(kwargs, free_dims, "input_ids", ids, (BATCH, SEQUENCE))
    if "attention_mask" in parameters:
        _add_input(kwargs, free_dims, "attention_mask", torch.ones_like(ids), (BATCH, SEQUENCE))


def _add_images(model: Any, parameters: Any, kwargs: dict, free_dims: dict, batch: str = BATCH) -> None:
    config = getattr(model.config, "vision_config", None) or model.config
    size = getattr(config, "image_size", None)
    # Without an image size the model is convolutional and takes any. Height and width differ, or torch would take them
    # for one size.
    height, width = (size if isinstance(size, (list, tuple)) else (size, size)) if size else (64, 96)
    channels = getattr(config, "num_channels", None) or 3
    shape = (_SIZES[batch], int(channels), int(height), int(width))
    kwargs["pixel_values"] = (
        torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape).to(model.device, model.dtype)
    )
    free_dims["pixel_values"] = {0: batch} if size else {0: batch, 2: None, 3: None}


def _add_audio(model: Any, parameters: Any, kwargs: dict, free_dims: dict) -> None:
    mels, positions = (getattr(model.config, k, None) for k in ("num_mel_bins", "max_source_positions"))
    if not mels or not positions:
        raise CaptureError(
            f"the config of {type(model).__name__} does not tell the shape of its audio: pass example_inputs"
        )
    # The frames are fixed: the encoder halves them once and then wants exactly its number of positions.
    features = torch.zeros(_SIZES[BATCH], int(mels), 2 * int(positions), device=model.device, dtype=model.dtype)
    _add_input(kwargs, free_dims, "input_features", features, (BATCH,))


def _add_labels(model: Any, parameters: Any, kwargs: dict, free_dims: dict) -> None:
    """Add the inputs of the model's loss, with the shape and dtype that its task class asks for."""
    batch, device = _SIZES[BATCH], model.device
    rows = torch.zeros(batch, dtype=torch.long, device=device)
    classes = [c.__name__ for c in type(model).__mro__]

    def is_a(*tasks: str) -> bool:
        return any(task in name for task in tasks for name in classes)

    if "labels" not in parameters:
        if "return_loss" in parameters:
            warnings.warn(
                f"{type(model).__name__} computes its loss when return_loss=True is passed with as many texts as "
                "images, so the captured program has no loss: pass example_inputs with all of these to capture it",
                AdaptcWarning,
                stacklevel=4,
            )
        if {"start_positions", "end_positions"} <= set(parameters):
            for name in ("start_positions", "end_positions"):
                _add_input(kwargs, free_dims, name, rows.clone(), (BATCH,))
        return
    if is_a("TokenClassification") and "input_ids" in kwargs:
        _add_input(kwargs, free_dims, "labels", torch.zeros_like(kwargs["input_ids"]), (BATCH, SEQUENCE))
    elif is_a(*_LABEL_PER_ROW):
        count = int(getattr(model.config, "num_labels", 0) or 0)
        problem = getattr(model.config, "problem_type", None)
        if problem == "multi_label_classification" or (problem == "regression" and count > 1):
            rows = torch.zeros(batch, count, dtype=model.dtype, device=device)
        elif problem == "regression" or (problem is None and count == 1):
            rows = rows.to(model.dtype)
        elif problem is None:
            # The model would infer this from the labels, and some models (DeBERTa) by reading their values, which
            # cannot be traced.
            model.config.problem_type = "single_label_classification"
        _add_input(kwargs, free_dims, "labels", rows, (BATCH,))
    elif is_a(*_LABEL_PER_TOKEN):
        axis = DECODER_SEQUENCE if getattr(model.config, "is_encoder_decoder", False) else SEQUENCE
        _add_input(kwargs, free_dims, "labels", _make_ids(model, BATCH, axis), (BATCH, axis))
    else:
        warnings.warn(
            f"{type(model).__name__} takes labels of a shape its config does not tell, so the captured program has no "
            "loss: pass example_inputs with labels to capture it",
            AdaptcWarning,
            stacklevel=4,
        )
