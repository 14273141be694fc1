"""Hold what is known of a step program besides its graph, and the names that the installed transformers uses.

A step with an adapter such as X-LoRA reads the model's last hidden state first, so it computes each token in two
passes. Each pass keeps its own keys and values (:func:`spec_for_passes`). The same step without adapters has one pass.
A cache of another number of passes is refused: part of it was never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from adaptc.bank.row_adapters import RowSelection
from adaptc.generation.cache.cache_prefix import CachePrefix
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.cache.token_gates import readable_methods
from adaptc.generation.modes.all_modes import STATIC
from adaptc.generation.modes.cache_mode import CacheMode
from adaptc.generation.modes.prefill_part import captured_with_prefill, draw_prompt, part_outputs
from adaptc.generation.modes.static_step import StepSpec
from adaptc.generation.modes.step_draw import StepDraw
from adaptc.passes.analysis.cache_inputs import count_passes
from adaptc.passes.graph.lifted import user_inputs
from adaptc.state.core import ProgramCore
from adaptc.state.runner import Runner, program_of


class StepRunner(Protocol):
    """A runner of steps: a program, a package of one, an adapter bound to either, or a bank."""

    @property
    def binding(self) -> Any:
        """Return the adapter that calls use."""
        ...

    @property
    def device(self) -> torch.device: ...

    def snapshot_call(self) -> Runner:
        """Return a runner that keeps the current adapter."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True, eq=False, kw_only=True)
class GenerationSpec(StepSpec):
    """The spec of a step program: what its graph does not hold.

    ``config`` and ``generation_config`` are copies of the model's. ``tokenizer`` returns the tokenizer that came with
    the program; None for none. ``cache_mode`` says what a step keeps of earlier tokens. ``main_input_name`` is the name
    of the prompts that are read first.
    """

    config: Any
    generation_config: Any
    tokenizer: Callable[[], Any] | None = None
    cache_mode: CacheMode = STATIC
    main_input_name: str = "input_ids"
    #: whether padding counts as tokens do in position_ids, as in the model's own generation
    counts_padding: bool = False
    #: the position of the first token, in the model's own generation
    first_position: int = 0
    #: number of passes -> the spec of the same step with so many
    specs_by_passes: dict[int, Any] = field(default_factory=dict[int, Any], init=False, repr=False)

    def with_passes(self, passes: int) -> Self:
        """Return the spec of the same step with ``passes`` passes in it (see :class:`CacheLayout`).

        The same number gives the same object each time, because a cache belongs to the spec that it was made for.
        """
        if passes == self.layout.passes:
            return self
        found = self.specs_by_passes.get(passes)
        if found is None:
            made = replace(self, layout=self.layout.with_passes(passes))
            made.specs_by_passes[self.layout.passes] = self
            found = self.specs_by_passes.setdefault(passes, made)
        return found

    @property
    def part_outputs(self) -> Mapping[str, Sequence[str]] | None:
        """Return the outputs of each part of the program, by the part's name; None for a program of one part."""
        return part_outputs(self.layout) if self.has_prefill else None

    def capture(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Return a context in which ``model`` has the forward with which the program was captured."""
        layout = self.layout.with_passes(1)
        step = partial(self.cache_mode.capture, model, layout, token_gate_inputs=self.token_gate_inputs)
        return captured_with_prefill(model, layout, step) if self.has_prefill else step()

    def new_cache(self, device: torch.device, prefix: CachePrefix | None = None) -> StepCache:
        """Return a cache that holds nothing but ``prefix``."""
        return self.cache_mode.new_cache(self, device, prefix)

    def draw_inputs(self, draw: StepDraw, rows: int | None = None) -> dict[str, Tensor]:
        """Draw inputs of the program, with ``rows`` rows; None for any number of them."""
        step = self.cache_mode.draw_step(self, draw, rows)
        return {**draw_prompt(self, draw, step), **step} if self.has_prefill else step

    def notes(self) -> list[str]:
        """Return the lines of a report about the cache."""
        return self.cache_mode.describe(self)


@cache
def cache_argument_name() -> str:
    """Return the name that the installed transformers gives to a cache: "cache" or "past_key_values"."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def spec_for_passes(spec: GenerationSpec, runner: StepRunner) -> GenerationSpec:
    """Return the spec with the cache layout that ``runner`` needs: a program, a package, or what is bound to
    either."""
    program = program_of(runner)
    if not isinstance(program, ProgramCore):
        return spec
    selection = getattr(runner, "selection", None)
    if isinstance(selection, RowSelection) and not selection.has_adapter:
        return spec.with_passes(1)  # a bank runs rows without any adapter on the base
    return spec.with_passes(count_passes(user_inputs(program)))


def base_pass_method_name(adapters: Sequence[Any]) -> str:
    """Return the name of a method among ``adapters`` that reads a duplicated base pass; '' where there is none.

    An adapter whose config cannot be read here is passed over.
    """
    for method in readable_methods(adapters):
        if any(c.base_pass is not None for c in method.extra_inputs.coefficients().values()):
            return method.name
    return ""
