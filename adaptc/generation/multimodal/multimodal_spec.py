"""Hold what is known of a program that reads prompts with images or audio, besides its graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from adaptc.errors import AdaptcError, CaptureError
from adaptc.generation.modes.step_draw import StepDraw
from adaptc.generation.multimodal.prompt_part import PromptDescription, captured_with_prompts
from adaptc.generation.spec import GenerationSpec


@dataclass(frozen=True, eq=False, kw_only=True)
class MultimodalSpec(GenerationSpec, PromptDescription):
    """The spec of a program with a part for prompts with images or audio: what its graph does not hold.

    ``example`` is the prompt that the model was captured with, by the names of the model's inputs; None for a program
    from a file.
    """

    example: Mapping[str, Tensor] | None = field(default=None, repr=False)

    @property
    def part_outputs(self) -> Mapping[str, Sequence[str]]:
        return {"prompt": self.prompt_outputs, "step": ["logits"]}

    def capture(self, model: nn.Module) -> AbstractContextManager[Any]:
        if self.example is None:
            raise CaptureError(
                "a program that reads images or audio is captured with an example of a prompt, which its file does not "
                "hold: compile the model again, with adaptc.compile_for_generation(..., example_inputs=...)"
            )
        return captured_with_prompts(model, self, self.example, partial(super().capture, model))

    def draw_inputs(self, draw: StepDraw, rows: int | None = None) -> dict[str, Tensor]:
        """Draw the inputs of a step. Those of the prompt part are the example's, whose images fit its placeholders."""
        if self.example is None:
            raise AdaptcError(
                "images and audio must fit their prompt, so they are not drawn: give inputs=, a list of complete inputs"
            )
        return {**self.part_inputs(self.example), **super().draw_inputs(draw, rows)}

    def notes(self) -> list[str]:
        return [*super().notes(), f"prompts: {', '.join(self.prompt_inputs)} beside text, read once per generation"]
