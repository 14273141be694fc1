"""Capture how a model turns a prompt with images or audio into embeddings, as a part of its step program.

Most multimodal models of transformers put features of images, or of audio, in the place of placeholder tokens. Then
they hand the embeddings to a language model, which divides the model into two parts:

    prompt   prompt_input_ids (prompts, tokens), prompt_attention_mask, the inputs of images or audio
             -> prompt_embeds (prompts, tokens, width); prompt_positions (prompts, tokens, axes) where the model
             numbers tokens along several axes (M-RoPE); prompt_deepstack (prompts, tokens, layers, width) where its
             first layers add features of images, zero at text; prompt_last_keys (prompts, tokens) where tokens of
             images attend to those after them
    step     the inputs of a step (see ``static_step``) -> logits

The first part is what the model's own ``forward`` does until it calls its language model. A generation runs it once.
Its embeddings are then the first tokens of the step, so texts without images never run it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.export import Dim

from adaptc.capture.check_size_one import run_without_effects
from adaptc.capture.given_inputs import bind_arguments
from adaptc.capture.model_state import keyword_only_parameter, patch_forward
from adaptc.capture.vision.tower_facts import with_blank_image, with_free_images
from adaptc.errors import CaptureError
from adaptc.generation.modes.static_step import DEEPSTACK, LAST_KEYS, StepExample, equate_sizes
from adaptc.generation.multimodal.read_images import (
    IMAGE_FEATURES,
    IMAGE_MASK,
    attends_around_keys,
    last_keys_of_mask,
    reading_images,
)

EMBEDS, POSITIONS = "prompt_embeds", "prompt_positions"
#: an input of a step that images have -> the output of the prompt part that it takes
PROMPT_OUTPUTS = {DEEPSTACK: "prompt_deepstack", LAST_KEYS: "prompt_last_keys"}
#: the inputs of the prompt part that the step has, too, under their names there
_SHARED_INPUTS = ("input_ids", "attention_mask")
_PREFIX = "prompt_"
T = TypeVar("T")
#: what a language model is called with that is no tensor of its tokens
_OTHER_ARGUMENTS = ("cache", "past_key_values", "use_cache", "return_dict", "logits_to_keep", "attention_mask")


@dataclass(frozen=True, eq=False, kw_only=True)
class PromptDescription:
    """A description of the prompts with images or audio that a program takes.

    ``prompt_inputs`` are the names of a prompt's inputs beside ``input_ids`` and ``attention_mask``. ``token_inputs``
    are those of them with a value for each token, such as mm_token_type_ids. ``position_axes`` is the number of axes
    along which tokens are numbered, 3 for M-RoPE; 0 where they have one number each. ``deepstack_layers`` is the number
    of layers that add features of images. ``looks_ahead`` says whether tokens of images attend to those after them.
    """

    prompt_inputs: tuple[str, ...]
    token_inputs: tuple[str, ...]
    position_axes: int
    deepstack_layers: int
    looks_ahead: bool

    @property
    def prompt_outputs(self) -> list[str]:
        """Return the names of the prompt part's outputs."""
        further = {POSITIONS: self.position_axes, PROMPT_OUTPUTS[DEEPSTACK]: self.deepstack_layers}
        further[PROMPT_OUTPUTS[LAST_KEYS]] = self.looks_ahead
        return [EMBEDS, *(name for name, has in further.items() if has)]

    @classmethod
    def from_example(cls, model: nn.Module, example: Mapping[str, Tensor]) -> PromptDescription:
        """Return the description of prompts like ``example``, the inputs of the model by name.

        Raises CaptureError for a model that gives its language model more than embeddings and positions.
        """
        name, ids = type(model).__name__, example["input_ids"]
        with torch.no_grad():
            found = _language_model_arguments(model, model.forward, dict(example))
        embeds, positions = found["inputs_embeds"], found.get("position_ids")
        if embeds.shape[:2] != ids.shape:
            raise CaptureError(
                f"{name} makes {tuple(embeds.shape[:2])} embeddings of {tuple(ids.shape)} tokens, and a generation "
                "counts one for each: generate texts, without example_inputs"
            )
        if attends_around_keys(found.get("attention_mask"), example["attention_mask"]):
            raise CaptureError(
                f"in this example {name} lets tokens attend to tokens after them and not to all between, which no step "
                "here has: give what the model's processor returns for a prompt, or generate texts, without "
                "example_inputs"
            )
        last_keys = last_keys_of_mask(found.get("attention_mask"))
        ahead = last_keys is not None and bool((last_keys > torch.arange(ids.shape[1], device=ids.device)).any())
        axes = positions.shape[0] if isinstance(positions, Tensor) and positions.ndim == 3 else 0
        features: list[Tensor] = []
        if IMAGE_MASK in found and IMAGE_FEATURES in found:
            features = found.pop(IMAGE_FEATURES)
            del found[IMAGE_MASK]
        extra = [
            n
            for n, v in found.items()
            if n not in ("inputs_embeds", "position_ids", *_OTHER_ARGUMENTS)
            and (isinstance(v, list) or (isinstance(v, Tensor) and not any(v is given for given in example.values())))
        ]
        if extra or axes not in (0, 3):
            what = ", ".join(extra) or f"positions along {axes} axes"
            raise CaptureError(
                f"the language model of {name} takes {what} beside a prompt's embeddings, which no step here has: "
                "generate texts, without example_inputs"
            )
        own = [n for n in example if n not in _SHARED_INPUTS]
        return cls(
            prompt_inputs=tuple(own),
            token_inputs=tuple(n for n in own if example[n].shape == ids.shape),
            position_axes=axes,
            deepstack_layers=len(features),
            looks_ahead=ahead,
        )

    def part_inputs(self, prompt: Mapping[str, T]) -> dict[str, T]:
        """Return the inputs of a prompt, or what belongs to them, under their names in the prompt part."""
        names = (*_SHARED_INPUTS, *self.token_inputs)
        return {f"{_PREFIX}{n}" if n in names else n: t for n, t in prompt.items()}

    def split_inputs(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the inputs of the prompt part, under the model's names, and those of the step."""
        model_names = {n: n.removeprefix(_PREFIX) for n in inputs if n.startswith(_PREFIX)}
        model_names |= {n: n for n in self.prompt_inputs if n not in self.token_inputs}
        prompt = {own: inputs[n] for n, own in model_names.items()}
        return prompt, {n: v for n, v in inputs.items() if n not in model_names}

    def embed(self, model: nn.Module, forward: Callable[..., Any], prompt: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the outputs of the prompt part, computed by ``forward``, the model's own."""
        found = _language_model_arguments(model, forward, dict(prompt))
        embeds = found["inputs_embeds"]
        made = {EMBEDS: embeds}
        if self.position_axes:
            made[POSITIONS] = found["position_ids"].permute(1, 2, 0)
        if self.deepstack_layers:
            mask = found[IMAGE_MASK].unsqueeze(-1).expand_as(embeds)
            zeros = torch.zeros_like(embeds)
            dense = [zeros.masked_scatter(mask, f.to(embeds)) for f in found[IMAGE_FEATURES]]
            made[PROMPT_OUTPUTS[DEEPSTACK]] = torch.stack(dense, 2)
        if self.looks_ahead:
            made[PROMPT_OUTPUTS[LAST_KEYS]] = last_keys_of_mask(found["attention_mask"])
        return made


def example_prompt(model: Any, example_inputs: Any) -> dict[str, Tensor]:
    """Return the inputs of ``model`` that a user gave as an example of a prompt, by name, for at least two prompts.

    One prompt is doubled, because torch would take a size of one for a constant. Raises CaptureError for inputs without
    tokens, or with anything but tensors.
    """
    args, kwargs = bind_arguments(model, example_inputs)
    given = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
    example: dict[str, Any] = {n: v for n, v in given.items() if v is not None}
    if strange := [n for n, v in example.items() if not isinstance(v, Tensor)]:
        raise CaptureError(
            f"example_inputs has {strange[0]!r}, a {type(example[strange[0]]).__name__}: give the tensors that the "
            "model's processor returns with return_tensors='pt'"
        )
    if (ids := example.get("input_ids")) is None or ids.ndim != 2:
        raise CaptureError(
            "example_inputs needs input_ids (prompts, tokens), with the placeholders of its images or audio"
        )
    example.setdefault("attention_mask", torch.ones_like(ids))
    if any(v.ndim and v.shape[0] == 1 for v in example.values()):
        example = {n: torch.cat([v, v]) for n, v in example.items()}
    return {n: v.to(model.device) for n, v in with_blank_image(model, example).items()}


@dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts with images or audio that a program is captured with.

    ``example`` are the inputs of the model of at least two prompts, by name.
    """

    description: PromptDescription
    example: Mapping[str, Tensor]

    def spec_fields(self) -> dict[str, Any]:
        """Return the fields of the program's spec that are about prompts."""
        return {**vars(self.description), "example": self.example}

    def captured(
        self, model: nn.Module, capture_step: Callable[[], AbstractContextManager[StepExample]]
    ) -> AbstractContextManager[StepExample]:
        """Return the context of :func:`captured_with_prompts`."""
        return captured_with_prompts(model, self.description, self.example, capture_step)


def describe_prompts(model: nn.Module, example_inputs: Any) -> Prompts:
    """Return the prompts that a user's example stands for. Raises CaptureError where the model cannot take them so."""
    example = example_prompt(model, example_inputs)
    with run_without_effects(model):
        return Prompts(PromptDescription.from_example(model, example), example)


@contextlib.contextmanager
def captured_with_prompts(
    model: nn.Module,
    description: PromptDescription,
    example: Mapping[str, Tensor],
    capture_step: Callable[[], AbstractContextManager[StepExample]],
) -> Generator[StepExample]:
    """Run the block with ``model`` as the two parts of its program; its own forward is restored afterwards.

    ``capture_step()`` is the context of the step alone.
    """
    original, parameters = model.forward, list(inspect.signature(model.forward).parameters.values())
    with contextlib.ExitStack() as stack:
        if description.position_axes:
            stack.enter_context(patch_forward(model, _forward_with_axes_last(original), parameters))
        step = stack.enter_context(capture_step())
        step_forward = model.forward
        if description.position_axes:
            positions = step.example_inputs["position_ids"]
            step.example_inputs["position_ids"] = positions.unsqueeze(-1).repeat(1, 1, description.position_axes)
        inputs, shapes = description.part_inputs(example), _free_sizes(model, description, example)
        prompt_shapes = {n: axes for n, axes in shapes.items() if n.startswith(_PREFIX)}
        if description.deepstack_layers:
            embeds = step.example_inputs["inputs_embeds"]
            inputs[DEEPSTACK] = embeds.unsqueeze(2).repeat(1, 1, description.deepstack_layers, 1)
            shapes[DEEPSTACK] = step.dynamic_shapes["inputs_embeds"]
        if description.looks_ahead:
            inputs[LAST_KEYS] = torch.zeros_like(step.example_inputs["input_ids"])
            shapes[LAST_KEYS] = step.dynamic_shapes["input_ids"]
        both = StepExample({**inputs, **step.example_inputs}, {**shapes, **step.dynamic_shapes})

        def forward(**inputs: Any) -> dict[str, Tensor]:
            prompt, others = description.split_inputs(inputs)
            equate_sizes(inputs, prompt_shapes)
            made = description.embed(model, original, prompt)
            images = {n: others.pop(n) for n in PROMPT_OUTPUTS if n in others}
            with reading_images(model, images, others["slots"]):
                return {**made, "logits": step_forward(**others)}

        stack.enter_context(patch_forward(model, forward, list(map(keyword_only_parameter, both.example_inputs))))
        yield both


def _forward_with_axes_last(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that takes position_ids (rows, tokens, axes), where ``original`` takes (axes, rows, tokens)."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if (positions := kwargs.get("position_ids")) is not None and positions.ndim == 3:
            kwargs["position_ids"] = positions.permute(2, 0, 1)
        return original(*args, **kwargs)

    return forward


def _free_sizes(
    model: nn.Module, description: PromptDescription, example: Mapping[str, Tensor]
) -> dict[str, dict[int, Any]]:
    prompts, tokens = Dim("prompts"), Dim("prompt_tokens")
    free = with_free_images(model, example, lambda t: dict.fromkeys(range(t.ndim)))
    dims: dict[str, Any] = {}
    shapes: dict[str, dict[int, Any]] = {}
    for name, value in example.items():
        if name in _SHARED_INPUTS or name in description.token_inputs:
            axes: dict[int, Any] = {0: prompts, 1: tokens}
        else:
            axes = {i: dims.setdefault(n, Dim(n)) if n else Dim.AUTO for i, n in free(value).items()}
        shapes |= description.part_inputs({name: axes})
    return shapes


def _language_model_arguments(model: nn.Module, forward: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with which ``forward``, the model's own, calls the language model.

    Raises CaptureError for a model without a language model of its own, or one that it does not call.
    """
    untyped: Any = model
    language_model: Any = untyped.get_decoder()
    name = type(model).__name__
    if language_model is model:
        raise CaptureError(f"{name} has no language model that could be told from the rest of it")

    parameters = inspect.signature(language_model.forward).parameters
    calls: list[dict[str, Any]] = []

    def note_call(*args: Any, **kwargs: Any) -> Any:
        calls.append(dict(zip(parameters, args, strict=False)) | kwargs)
        if (embeds := calls[-1].get("inputs_embeds")) is None:
            raise CaptureError(
                f"{name} hands no embeddings of its prompt to its language model, so {_short_list(inputs)} cannot be "
                "read ahead of the steps: generate texts, without example_inputs"
            )
        return _output_class()(last_hidden_state=embeds)

    with patch_forward(language_model, note_call, list(parameters.values())):
        forward(**inputs, use_cache=False)
    if len(calls) == 1:
        return {n: v for n, v in calls[0].items() if v is not None}
    raise CaptureError(f"{name} does not call its language model for such a prompt")


def _short_list(example: Mapping[str, Any]) -> str:
    return ", ".join(n for n in example if n not in _SHARED_INPUTS) or "text"


@cache
def _output_class() -> Any:
    """Return a class of outputs whose fields are None but for the hidden state, in the place of any model's output.

    The model goes on with such an output to its head, and nothing reads what that gives. An error that left the model
    early would confuse torch, which counts the modules that a trace is in.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class LanguageModelOutput(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return LanguageModelOutput
