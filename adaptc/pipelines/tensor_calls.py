"""Turn calls of modules that take lists and sizes into calls of programs, which take tensors alone.

Positions that a transformer computes from sizes are inputs of its program: the module that computes them is called
before the program, and while the transformer is traced it returns what it is given. So one program serves all sizes.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adaptc.capture.model_state import own_attribute
from adaptc.passes.graph.pytree import pytree

#: the inputs of a program, and what makes the module's output of the program's
ProgramCall = tuple[dict[str, Any], Callable[[Any], Any]]


class TensorCalls:
    """The calls of a module whose inputs are tensors: its program takes them as they are."""

    #: the inputs that :meth:`encode` reads, which a call must have
    needs: Sequence[str] = ()

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def traced(self) -> contextlib.AbstractContextManager[None]:
        """Run the block, a capture, with a module that takes what the program will take."""
        return contextlib.nullcontext()

    def encode(self, given: Mapping[str, Any]) -> ProgramCall:
        """Return the program's inputs for the keyword inputs of a call, and what turns its output into the module's.

        Raises ConfigError for a call that no program can follow.
        """
        return dict(given), lambda output: output


#: class of transformer -> inputs of which pipelines give a copy for each row, and the model takes the first
FIRST_ROWS = {"Flux2Transformer2DModel": ("img_ids", "txt_ids")}


class FirstRowCalls(TensorCalls):
    """The calls of a transformer that takes some inputs from the first row alone."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__(module)
        self.needs = names

    def encode(self, given: Mapping[str, Any]) -> ProgramCall:
        """Return the program's inputs, which are not of rows where the module takes the first row's alone."""
        return {n: v[0] if n in self.needs and v.ndim > 2 else v for n, v in given.items()}, lambda output: output


@dataclass(frozen=True)
class PositionModule:
    """A module of a transformer that computes positions from sizes.

    Attributes:
        path: its attribute of the transformer.
        carrier: its own argument that the transformer passes on as it is, and which carries the positions to a program.
        name: the transformer's argument of that.
        sizes: the transformer's other arguments that it reads.
        needs: its inputs that a call must have for that.
        arguments: what it is called with, by the arguments of a call of the transformer.
        mask: the mask of the text that a call may leave out where nothing is padded; "" where there is none.
        is_complex: whether the positions are complex numbers, which a program takes as pairs of real ones.
    """

    path: str
    carrier: str
    name: str
    sizes: tuple[str, ...]
    needs: tuple[str, ...]
    arguments: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    mask: str = ""
    is_complex: bool = False


def _qwen_arguments(given: Mapping[str, Any]) -> Mapping[str, Any]:
    text = given["encoder_hidden_states"]
    return {
        "video_fhw": given["img_shapes"],
        "max_txt_seq_len": text.shape[1],
        "device": given["hidden_states"].device,
    }


def _ltx_arguments(given: Mapping[str, Any]) -> Mapping[str, Any]:
    names = ("hidden_states", "num_frames", "height", "width", "rope_interpolation_scale", "video_coords")
    return {n: given[n] for n in names if n in given}


POSITION_MODULES = {
    "QwenImageTransformer2DModel": PositionModule(
        path="pos_embed",
        carrier="video_fhw",
        name="img_shapes",
        sizes=(),
        needs=("img_shapes", "hidden_states", "encoder_hidden_states"),
        arguments=_qwen_arguments,
        mask="encoder_hidden_states_mask",
        is_complex=True,
    ),
    "LTXVideoTransformer3DModel": PositionModule(
        path="rope",
        carrier="video_coords",
        name="video_coords",
        sizes=("num_frames", "height", "width", "rope_interpolation_scale"),
        needs=("hidden_states", "encoder_hidden_states"),
        arguments=_ltx_arguments,
        mask="encoder_attention_mask",
    ),
}


class PositionCalls(TensorCalls):
    """The calls of a transformer whose positions follow from sizes, which are numbers or lists of numbers."""

    def __init__(self, module: nn.Module, positions: PositionModule) -> None:
        super().__init__(module)
        self.positions, self.needs = positions, positions.needs

    @contextlib.contextmanager
    def traced(self) -> Iterator[None]:
        """Run the block with a module whose positions are what its argument for them is given."""
        part = getattr(self.module, self.positions.path)
        signature = inspect.signature(part.forward)

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments[self.positions.carrier]
            return pytree.tree_map(torch.view_as_complex, given) if self.positions.is_complex else given

        with own_attribute(part, "forward", forward):
            yield

    def encode(self, given: Mapping[str, Any]) -> ProgramCall:
        """Return the program's inputs, with positions that the module computes from the call's sizes."""
        spec = self.positions
        found = {n: v for n, v in given.items() if n not in spec.sizes}
        positions = getattr(self.module, spec.path)(**spec.arguments(given))
        found[spec.name] = pytree.tree_map(torch.view_as_real, positions) if spec.is_complex else positions
        if spec.mask and spec.mask not in found:
            text = found["encoder_hidden_states"]
            found[spec.mask] = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        return found, lambda output: output
