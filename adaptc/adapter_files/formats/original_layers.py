"""Say which layers of diffusers a layer of a model's original code is, and split an adapter's tensors between them.

The original code of FLUX and SD3 computes q, k and v by one layer, and has the halves of some layers in another order.
Files of kohya, ComfyUI and others have an adapter for that layer. It is divided by its rows: LoRA's second factor is
cut, and its first factor belongs to each part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptc.adapter_files.formats.parts import DIFF, DIFF_BIAS, DORA_SCALE, LORA_MID, MAGNITUDE
from adaptc.errors import CheckpointError

#: slots whose first axis is the rows of the weight; the others belong to each part as they are
_ROW_SLOTS = frozenset(
    {"lora_B.weight", "lora_B.bias", MAGNITUDE, DORA_SCALE, "hada_w1_a", "hada_w2_a", DIFF, DIFF_BIAS}
)
#: slots of convolution kernels with more than one position, which none of these layers has
_KERNEL_SLOTS = frozenset({LORA_MID, "hada_t1", "hada_t2", "lokr_t2"})


@dataclass(frozen=True)
class LayerPart:
    """The part of an original layer that a module of diffusers is: ranges of its rows, in the module's order."""

    module: str
    rows: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class OriginalLayer:
    """A layer of the original code: the shape of its weight, and its parts."""

    shape: tuple[int, ...]
    parts: Sequence[LayerPart]

    @property
    def only_module(self) -> str | None:
        """Return the module that is this layer as it is, or None where there are several parts, or another order."""
        part, *others = self.parts
        return part.module if not others and len(part.rows) == 1 else None


def joined_layer(modules: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> OriginalLayer | None:
    """Return the layer whose rows are those of ``modules``, one after the other; None where the model lacks one."""
    if not all(m in shapes and len(shapes[m]) for m in modules):
        return None
    parts: list[LayerPart] = []
    start = 0
    for module in modules:
        stop = start + shapes[module][0]
        parts.append(LayerPart(module, [(start, stop)]))
        start = stop
    return OriginalLayer((start, *shapes[modules[0]][1:]), parts)


def layer_with_swapped_halves(module: str, shapes: Mapping[str, tuple[int, ...]]) -> OriginalLayer | None:
    """Return the layer that has the rows of ``module`` with its halves exchanged; None where the model lacks it."""
    if module not in shapes:
        return None
    shape = shapes[module]
    half = shape[0] // 2
    return OriginalLayer(shape, [LayerPart(module, [(half, shape[0]), (0, half)])])


def split_slots(location: str, slots: Mapping[str, Tensor], layer: OriginalLayer) -> dict[str, dict[str, Tensor]]:
    """Return, for each module of ``layer``, its tensors by slot, made of those of the whole layer.

    No two modules share memory. Raises CheckpointError for tensors that do not have the layer's rows, and for those
    that cannot be divided.
    """
    if odd := sorted(slots.keys() & _KERNEL_SLOTS):
        raise CheckpointError(
            f"{location}: {odd[0]!r} is of a convolution kernel, and this layer, which is {_names(layer)} here, has "
            "none. Is the file for another model?"
        )
    rows = layer.shape[0]
    for slot in slots.keys() & _ROW_SLOTS:
        t = slots[slot]
        if not t.ndim or t.shape[0] != rows:
            raise CheckpointError(
                f"{location}: {slot!r} has shape {tuple(t.shape)}, expected {rows} rows: the layer is {_names(layer)} "
                "here. The adapter was made for another model."
            )
    block = _lokr_block(location, slots, layer)
    return {part.module: _part_of(slots, part, block) for part in layer.parts}


def _part_of(slots: Mapping[str, Tensor], part: LayerPart, lokr_block: int) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for slot, t in slots.items():
        if slot in _ROW_SLOTS:
            out[slot] = torch.cat([t[start:stop] for start, stop in part.rows])
        elif slot in ("lokr_w1", "lokr_w1_a"):
            out[slot] = torch.cat([t[start // lokr_block : stop // lokr_block] for start, stop in part.rows])
        else:
            out[slot] = t.clone()
    return out


def _lokr_block(location: str, slots: Mapping[str, Tensor], layer: OriginalLayer) -> int:
    """Return how many rows of the weight each row of a LoKr's first factor is for; 1 where there is no LoKr.

    Raises CheckpointError where a part does not begin or end between two of these blocks.
    """
    firsts = [slots[n] for n in ("lokr_w1", "lokr_w1_a") if n in slots]
    seconds = [slots[n] for n in ("lokr_w2", "lokr_w2_a") if n in slots]
    if not firsts or not seconds or not all(t.ndim >= 2 for t in (*firsts, *seconds)):
        return 1  # what is missing is told where the tensors are converted
    block = seconds[0].shape[0]
    bounds = [bound for part in layer.parts for rows in part.rows for bound in rows]
    if firsts[0].shape[0] * block != layer.shape[0] or any(bound % block for bound in bounds):
        starts = ", ".join(str(start) for part in layer.parts for start, _ in part.rows)
        raise CheckpointError(
            f"{location}: a LoKr with factors of {firsts[0].shape[0]} and {block} rows cannot be divided between "
            f"{_names(layer)}, whose rows begin at {starts}. Convert it to LoRA with the program that wrote it, or "
            "give a file for diffusers' layers."
        )
    return block


def _names(layer: OriginalLayer) -> str:
    return ", ".join(repr(part.module) for part in layer.parts)
