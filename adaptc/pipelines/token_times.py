"""Let each token of a video have a time step of its own, as pipelines that continue an image give them.

The tokens of the given image are at time 0, and those that are drawn at the time of the step. Which pipelines give such
times is told by their class or their config. The program of their transformer takes a time for each token. That of
another pipeline takes one for each row, so that it computes the embedding of a time once.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from adaptc.capture.model_state import patch_forward
from adaptc.pipelines.tensor_calls import ProgramCall, TensorCalls

#: the input of a transformer that has the times
TIMES = "timestep"
_PIPELINES = ("LTXImageToVideoPipeline", "LTXConditionPipeline")


def gives_token_times(pipeline: Any) -> bool:
    """Return whether ``pipeline`` calls its transformer with a time for each token, (batch, tokens)."""
    if bool(getattr(pipeline.config, "expand_timesteps", False)):  # Wan 2.2 from text and image
        return True
    return any(kind.__name__ in _PIPELINES for kind in type(pipeline).__mro__)


def _ltx_axes(module: Any, hidden: Any) -> Sequence[int]:
    return hidden.shape[1:2]


def _wan_axes(module: Any, hidden: Any) -> Sequence[int]:
    return [size // patch for size, patch in zip(hidden.shape[2:], module.config.patch_size, strict=True)]


#: class of transformer -> the sizes of the axes of tokens, for ``hidden_states``. A program has them apart, because
#: torch.export knows no size that is a product of others
TOKEN_AXES: dict[str, Callable[[Any, Any], Sequence[int]]] = {
    "LTXVideoTransformer3DModel": _ltx_axes,
    "WanTransformer3DModel": _wan_axes,
}


class TokenTimeCalls(TensorCalls):
    """The calls of a transformer that takes a time for each row, or for each token; ``calls`` has the rest of them."""

    def __init__(self, module: nn.Module, calls: TensorCalls, axes: Callable[[Any, Any], Sequence[int]]) -> None:
        super().__init__(module)
        self._calls, self._axes, self.needs = calls, axes, (*calls.needs, TIMES, "hidden_states")

    @contextlib.contextmanager
    def traced(self) -> Iterator[None]:
        """Run the block with a module that takes the times of tokens along the axes of a program."""
        forward = self.module.forward

        def flattened(**given: Any) -> Any:
            times = given[TIMES]
            return forward(**{**given, TIMES: times.flatten(1) if times.ndim > 1 else times})

        parameters = inspect.signature(forward).parameters.values()
        named = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters if p.kind is not p.VAR_KEYWORD]
        with self._calls.traced(), patch_forward(self.module, flattened, named):
            yield

    def encode(self, given: Mapping[str, Any]) -> ProgramCall:
        """Return the program's inputs, with the times of tokens along their axes."""
        found, restore = self._calls.encode(given)
        times = found[TIMES]
        if getattr(times, "ndim", 0) == 2:
            rows, axes = times.shape[0], self._axes(self.module, found["hidden_states"])
            found[TIMES] = times.expand(rows, math.prod(axes)).reshape(rows, *axes)
        return found, restore
