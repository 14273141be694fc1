"""Draw random inputs of a program that generates, as a generation would give them.

Verification and banks use them. A cache mode says which inputs a step has, and draws them with a :class:`StepDraw`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.generation.modes.static_step import StepSpec

#: the most rows, and the most tokens of a step
_MAX_SIZE = 7


@dataclass(frozen=True)
class StepDraw:
    """Random generators for a step: ``sizes`` draws its sizes, ``values`` all else; None for the generator ``sizes``.

    Two draws with equal ``sizes`` and different ``values`` have tensors of equal shapes.
    """

    sizes: torch.Generator
    values: torch.Generator | None = None
    #: the most rows or tokens that are drawn
    max_size: int = field(default=_MAX_SIZE, kw_only=True)

    def size(self, low: int, high: int) -> int:
        """Return a whole number from ``low`` to ``high``; ``low`` where ``high`` is less."""
        return int(torch.randint(low, max(low, high) + 1, (), generator=self.sizes))

    def rows(self, max_batch: int) -> int:
        return self.size(1, min(max_batch, self.max_size))

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        """Return int64 values from 0 up to ``high``, which is not among them."""
        return torch.randint(0, high, tuple(shape), generator=self.values or self.sizes)

    def booleans(self, shape: Sequence[int]) -> Tensor:
        return self.integers(2, shape).bool()

    def normal(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.randn(tuple(shape), generator=self.values or self.sizes).to(dtype)

    def text(self, vocab_size: int, rows: int, tokens: int, length: int, padding: int) -> dict[str, Tensor]:
        """Return tokens, the mask of all ``length`` positions, and the tokens whose logits are kept.

        The first row begins with ``padding`` positions of padding.
        """
        mask = torch.ones(rows, length, dtype=torch.int64)
        mask[0, :padding] = 0
        ids = self.integers(vocab_size, (rows, tokens))
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "keep": torch.arange(tokens - self.size(1, tokens), tokens),
        }

    def embeddings(self, spec: StepSpec, rows: int, tokens: int) -> dict[str, Tensor]:
        """Return the embedding inputs that go with tokens; {} where the step takes no embeddings."""
        if not spec.takes_inputs_embeds:
            return {}
        drawn = self.normal((rows, tokens, spec.hidden_size), spec.embeds_dtype)
        inputs = {"inputs_embeds": drawn, "embedded": self.booleans(())}
        for name in spec.image_inputs:
            zeros = spec.image_zeros(name, rows, tokens, torch.device("cpu"))
            inputs[name] = self.normal(zeros.shape, zeros.dtype) if zeros.is_floating_point() else zeros.contiguous()
        return inputs


#: draws the inputs of a program, with so many rows; None for any number of them
DrawInputs = Callable[[StepDraw, int | None], dict[str, Tensor]]


def draw_examples(draw_inputs: DrawInputs, device: torch.device, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``options`` of verify with drawn ``inputs`` in the place of the number ``shapes``.

    They are prompts of several sizes for caches with tokens in them: compiled code does not record that tokens go to
    free positions of a cache. Given ``inputs`` stay. Raises AdaptcError where ``shapes`` is not a number of at least
    one.
    """
    options = dict(options)
    if options.get("inputs") is not None:
        return options
    count = options.pop("shapes", None)
    if count is None:
        count = 3
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise AdaptcError("shapes: of what generates they are drawn; give how many, or complete inputs with inputs=")
    draw = StepDraw(torch.Generator().manual_seed(options.get("seed") or 0))
    made = [draw_inputs(draw, None) for _ in range(count)]
    options["inputs"] = [{name: value.to(device) for name, value in inputs.items()} for inputs in made]
    return options


def draw_probe_steps(draw_inputs: DrawInputs, device: torch.device) -> list[dict[str, Tensor]]:
    """Draw the inputs of two steps of three rows, with equal sizes but different tokens and cache contents."""
    out: list[dict[str, Tensor]] = []
    for seed in (1, 2):
        draw = StepDraw(torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed))
        made = draw_inputs(draw, 3)
        if "embedded" in made:
            made["embedded"] = torch.tensor(False)
        out.append({name: value.to(device) for name, value in made.items()})
    return out
