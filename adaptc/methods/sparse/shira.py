"""SHiRA: W' = W + s D, where D has r (rows + columns) entries at chosen places and zeros elsewhere
(Bhardwaj et al., arXiv 2406.13175).

Slots: ``shira_weight`` (n,), float, and ``shira_indices`` (2, n), int32, the row and column of each entry in the weight
as one matrix. Both are in files.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.errors import CheckpointError, ConfigError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import check_integers, check_matrix
from adaptc.methods.sparse.sparse import draw_distinct
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.method_part import SiteDescription
from adaptc.passes.protocol.parts.size_rule import SizeRule

WEIGHT, INDICES = "shira_weight", "shira_indices"


@dataclass
class ShiraConfig(TargetedConfig):
    """PEFT's ``ShiraConfig``: same names, same defaults. ``fan_in_fan_out`` follows from the layer.

    With ``mask_type="random"`` places are drawn from ``random_seed`` (None: always the same ones). To choose places
    yourself, set the attribute ``mask_fn``, which is in no file. It is called as ``mask_fn(layer, r)`` and returns a
    mask of the weight's shape with r (rows + columns) ones. ``layer`` has ``weight``, ``in_features`` and
    ``out_features``; for any layer it is a linear layer with the weight as one matrix. With ``mask_type="random"`` the
    function also gets ``random_seed``, if it takes an argument of that name.

    Raises ConfigError for an r that is no positive integer.

    Attributes:
        r: the number of trained entries, as the rank of a LoRA with as many parameters.
        mask_type: "random" draws the places; any other name needs ``mask_fn``.
        random_seed: the seed of the places; None for always the same ones.

    Example:
        >>> config = adaptc.ShiraConfig(r=8, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "SHIRA"
    unsaved_attributes: ClassVar[tuple[str, ...]] = ("mask_fn",)

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mask_fn: Callable[..., Tensor] | None = None
        check_integers(self, {"r": self.r})

    def method(self, name: str, kind: str) -> Shira:
        return Shira(self.r, self.random_seed, self.mask_type, self.init_weights, self.mask_fn)


class ShiraFiles(FileFormat):
    method: Shira

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        indices = found.get(INDICES)
        if indices is None or indices.ndim != 2 or indices.shape[0] != 2:
            return dict(found)
        indices = indices.to(torch.int32)  # written as floats on Windows
        for axis, size, values in zip(("row", "column"), op.matrix_shape, indices, strict=True):
            outside = values[(values < 0) | (values >= size)]
            if outside.numel():
                raise CheckpointError(
                    f"shira_indices holds {axis} {int(outside[0])}, and the matrix has shape {op.matrix_shape}"
                )
        return {**found, INDICES: indices}


class ShiraSizes(SizeRule):
    method: Shira

    def specialized_for(self, op: Op) -> Shira:
        rows, columns = op.matrix_shape
        most = rows * columns // (rows + columns)
        r = self.method.r
        if r > most:
            fits = f"r={most} is the most that fits" if most else "no r fits: leave this layer out"
            raise ConfigError(
                f"r={r} means {r * (rows + columns)} entries, more than the {rows * columns} of a matrix of "
                f"shape {op.matrix_shape}; {fits}"
            )
        return self.method

    def minimal(self, op: Op) -> Shira:
        return dataclasses.replace(self.method, r=2 * op.groups)

    def with_sizes_of(self, op: Op, slots: Slots) -> Shira:
        found = slots.get(WEIGHT)
        return (
            self.method if found is None else dataclasses.replace(self.method, r=found.shape[0] // sum(op.matrix_shape))
        )


@dataclass(frozen=True)
class Shira(Method):
    """SHiRA at one site, with r (rows + columns) entries. ``zeros``: first values are zeros, else random."""

    name: ClassVar[str] = "shira"
    swappable: ClassVar[frozenset[str]] = Method.swappable | {"seed", "mask_type", "zeros", "mask_fn"}
    files = ShiraFiles()
    sizes = ShiraSizes()

    r: int = 32
    seed: int | None = None
    mask_type: str = "random"
    zeros: bool = True
    mask_fn: Callable[..., Tensor] | None = field(default=None, compare=False, repr=False)

    def options(self) -> dict[str, Any]:
        return {k: v for k, v in super().options().items() if k != "mask_fn"}

    def rebind(self, config: Any, place: SiteDescription) -> Method:
        new = super().rebind(config, place)
        return self if new == self and new is not self else new

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("SHiRA", op)
        n = self.r * sum(op.matrix_shape)
        return {
            WEIGHT: Slot((n,), free=(0,)),
            INDICES: Slot((2, n), free=(1,), dtype=torch.int32, trainable=False),
        }

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        rows, columns = op.matrix_shape
        n = self.r * (rows + columns)
        # The mask comes before the values, as in PEFT: a mask_fn may read the global generator, so the order matters.
        at = self._draw_flat_indices(op, W, n)
        values = torch.zeros(n) if self.zeros else torch.randn(n, generator=generator)
        indices = torch.stack([at // columns, at % columns]).to(torch.int32)
        return InitialValues({WEIGHT: values.to(W.device, dtype), INDICES: indices.to(W.device)})

    def _draw_flat_indices(self, op: Op, W: Tensor, n: int) -> Tensor:
        """Return the ``n`` flat places of the entries, in ascending order.

        Raises ConfigError for an unknown ``mask_type`` without a ``mask_fn``, and for a mask of another shape or count.
        """
        if self.mask_fn is None:
            if self.mask_type != "random":
                raise ConfigError(
                    f"mask_type={self.mask_type!r} is not 'random', and the config has no mask_fn: set config.mask_fn "
                    "to a function of a layer and r that gives a mask"
                )
            return draw_distinct(prod(op.matrix_shape), self.seed, n).sort().values
        layer = torch.nn.Linear(*reversed(op.matrix_shape), bias=False, device="meta")
        layer.weight = torch.nn.Parameter(op.matrix(W).detach().clone(), requires_grad=False)
        takes = inspect.signature(self.mask_fn).parameters
        takes_seed = "random_seed" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values())
        seed = {"random_seed": self.seed} if self.mask_type == "random" and takes_seed else {}
        mask = self.mask_fn(layer, self.r, **seed)
        shape = tuple(getattr(mask, "shape", ()))
        ones = int((mask == 1).sum()) if shape == op.matrix_shape else 0
        if ones != n or bool(((mask != 0) & (mask != 1)).any()):
            gave = f"shape {shape}" + (f" with {ones} ones" if shape == op.matrix_shape else "")
            raise ConfigError(
                f"mask_fn must give a tensor of shape {op.matrix_shape} with {n} ones (r={self.r}) and zeros "
                f"elsewhere; it gave {gave}"
            )
        return mask.flatten().nonzero().squeeze(1)

    def scale(self, op: Op) -> float:
        return 1.0

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        wide = torch.promote_types(W.dtype, slots[WEIGHT].dtype)
        rows, columns = slots[INDICES].long()
        values = cast(slots[WEIGHT], wide) * cast(scale, wide)
        flat = cast(op.matrix(W).flatten(), wide)
        return cast(op.unmatrix(flat.index_add(0, rows * op.matrix_shape[1] + columns, values)), W.dtype)
