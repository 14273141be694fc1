"""Define what an adapter file has for one module, in PEFT's shapes, and what is known of the module beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from adaptc.passes.graph.ops import Op


@dataclass(frozen=True)
class TargetModule:
    """A module of the model that a file adapts.

    ``shape`` is that of its weight. ``find_op`` returns the op that reads the weight, which takes a search of the
    program; None where it reads none there.
    """

    name: str
    shape: tuple[int, ...]
    has_bias: bool = False
    find_op: Callable[[], Op | None] = field(default=lambda: None, repr=False)


@dataclass(frozen=True)
class FileLayer:
    """The tensors of one module as PEFT has them.

    ``peft_type`` is PEFT's name of the method, '' for a module of which only parameters are trained. ``alpha`` is None
    where the file has none for this module.

    Attributes:
        file_rank: the rank in the file's own count, by which its scale is defined; None where that is ``rank``.
        has_own_scale: whether the scale is alpha over rank, whatever a config says.
        differences: parameter -> a change that is added to the base's.
        whole: parameter -> a value that replaces the base's.
        scales_input: of IA3, whether the factors are those of the input.
    """

    peft_type: str
    tensors: Mapping[str, Tensor]
    rank: int
    alpha: float | None
    file_rank: int | None = None
    has_own_scale: bool = False
    differences: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    whole: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    scales_input: bool = False
