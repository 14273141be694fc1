"""Convert the tensors of one module to PEFT's shapes, with its rank and alpha.

Input is a module's tensors by slot, and what is known of the module. Values are as in the file. Only where a
convolution has three factors are two of them multiplied, in float32. A CheckpointError names the module and what is
missing or odd.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite, prod

import torch
from torch import Tensor

from adaptc.adapter_files.formats.file_layer import FileLayer, TargetModule
from adaptc.adapter_files.formats.loralib_layers import convert_loralib
from adaptc.adapter_files.formats.parts import (
    ALPHA,
    CHANNELS,
    DIFF,
    DIFF_BIAS,
    DORA_SCALE,
    LORA_MID,
    MAGNITUDE,
    ON_INPUT,
    WHOLE_BIAS,
    WHOLE_WEIGHT,
)
from adaptc.errors import CheckpointError

#: slots of parameters -> the parameter's name
_DIFFERENCES = {DIFF: "weight", DIFF_BIAS: "bias"}
_WHOLE = {WHOLE_WEIGHT: "weight", WHOLE_BIAS: "bias"}


def convert_layer(module: TargetModule, tensors: Mapping[str, Tensor], source: str) -> FileLayer:
    """Return the layer that ``tensors``, by slot, make at ``module``. Raises CheckpointError where they make none."""
    slots, shape = dict(tensors), module.shape
    alpha = _scalar_value(slots.pop(ALPHA), f"{source}: the alpha of {module.name!r}") if ALPHA in slots else None
    location = f"{source}: module {module.name!r}"
    differences = {param: slots.pop(slot) for slot, param in _DIFFERENCES.items() if slot in slots}
    whole = {param: slots.pop(slot) for slot, param in _WHOLE.items() if slot in slots}
    if "weight" in differences:
        differences["weight"] = _match_axes(differences["weight"], len(shape))
    if slots and ("weight" in differences or "weight" in whole):
        raise CheckpointError(
            f"{location} has a whole weight beside the tensors of a method, {', '.join(slots)}; drop one of the two"
        )
    if differences.keys() & whole.keys():
        raise CheckpointError(f"{location} has a whole parameter and a change of it; drop one of the two")
    if not slots and (differences or whole):
        # LyCORIS scales no whole difference, whatever the alpha.
        return FileLayer("", {}, 0, None, differences=differences, whole=whole)
    return replace(_convert_method(location, slots, module, alpha), differences=differences, whole=whole)


def _convert_method(location: str, slots: dict[str, Tensor], module: TargetModule, alpha: float | None) -> FileLayer:
    shape = module.shape
    families = dict.fromkeys(n.partition("_")[0] for n in slots if n != DORA_SCALE and n != MAGNITUDE)
    if len(families) > 1:
        raise CheckpointError(
            f"{location} has tensors of several methods: {', '.join(slots)}; drop those of all but one"
        )
    if "lora" in families:
        return FileLayer("LORA", *_convert_lora(location, slots, shape), alpha)
    if "loralib" in families:
        return convert_loralib(location, slots, module)
    if DORA_SCALE in slots or MAGNITUDE in slots:
        raise CheckpointError(
            f"{location} has dora_scale, lengths of rows, and no LoRA beside them; PEFT has these for LoRA alone, and "
            "so has adaptc"
        )
    if "ia3" in families:
        return _convert_ia3(location, slots, module)
    if "hada" in families:
        need = (
            "hada_w1_a",
            "hada_w1_b",
            "hada_w2_a",
            "hada_w2_b",
            *(("hada_t1", "hada_t2") if "hada_t1" in slots else ()),
        )
        _check_complete(location, slots, need)
        return FileLayer("LOHA", slots, _axis_size(location, slots, "hada_w1_b", 0), alpha)
    if not slots:
        raise CheckpointError(f"{location} has an alpha and nothing else; drop it, or complete the file")
    return FileLayer("LOKR", slots, *_lokr_rank_alpha(location, slots, alpha))


def _convert_lora(location: str, slots: dict[str, Tensor], shape: Sequence[int]) -> tuple[dict[str, Tensor], int]:
    _check_complete(location, slots, ("lora_A.weight", "lora_B.weight"))
    a, b = slots["lora_A.weight"], slots["lora_B.weight"]
    if LORA_MID in slots:
        a = _merge_mid_factor(location, slots.pop(LORA_MID), a, shape)
    # A kernel of one position may be left out: files are exchanged between models with linear layers and with
    # convolutions.
    a, b = (_match_axes(t, len(shape)) for t in (a, b))
    slots |= {"lora_A.weight": a, "lora_B.weight": b}
    if DORA_SCALE in slots:
        slots[MAGNITUDE] = _convert_magnitudes(location, slots.pop(DORA_SCALE), b.shape[0] if b.ndim else 0, len(shape))
    return slots, _axis_size(location, slots, "lora_A.weight", 0)


def _convert_ia3(location: str, slots: Mapping[str, Tensor], module: TargetModule) -> FileLayer:
    """Return LyCORIS's IA3 as PEFT's: the factor of each channel is one more than the file's number.

    LyCORIS leaves the layer's bias as it is where the channels are those of the output, and PEFT's IA3 scales it. So
    only layers without a bias mean the same there.
    """
    if len(slots) == 1:
        here, missing = ("weight", "on_input") if CHANNELS in slots else ("on_input", "weight")
        raise CheckpointError(f"{location} has {here} and no {missing}; the file is not complete")
    on_input = bool(_scalar_value(slots[ON_INPUT], f"{location}: on_input"))
    if not on_input and module.has_bias:
        raise CheckpointError(
            f"{location} has LyCORIS's IA3 on the outputs of a layer with a bias. LyCORIS leaves the bias as it "
            "is, and PEFT's IA3 scales it with the outputs. Merge the file with LyCORIS, and make LoRA of the merged "
            "model: adaptc.subtract_adapter(merged, model, rank=r)."
        )
    factors = slots[CHANNELS]
    factors = 1 + (factors if factors.dtype.itemsize > 2 else factors.float())
    if len(module.shape) > 2:
        factors = factors.reshape(1, -1, *[1] * (len(module.shape) - 2))
    else:
        factors = factors.reshape(1, -1) if on_input else factors.reshape(-1, 1)
    return FileLayer("IA3", {"ia3_l": factors}, 0, None, scales_input=on_input)


def _lokr_rank_alpha(location: str, slots: Mapping[str, Tensor], alpha: float | None) -> tuple[int, float | None]:
    """Return (rank, alpha) of a LoKr.

    Where both factors are whole, LyCORIS scales by 1, whatever the alpha. PEFT has whole factors where the rank is
    large.
    """
    for i in ("1", "2"):
        if f"lokr_w{i}" not in slots:
            _check_complete(location, slots, (f"lokr_w{i}_a", f"lokr_w{i}_b"))
    for n, t in slots.items():
        if t.ndim < 2 or not t.numel():
            raise CheckpointError(f"{location}: {n!r} has shape {tuple(t.shape)}, expected a matrix")
    ranked = next((n for n in ("lokr_w2_b", "lokr_w1_b") if n in slots), None)
    if ranked is not None:
        return slots[ranked].shape[0], alpha
    rank = max(slots["lokr_w2"].shape[:2])
    return rank, rank


def _merge_mid_factor(location: str, mid: Tensor, down: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the first two of three factors as one: ``mid`` (r, i, *kernel) applied to ``down`` (i, in, 1...).

    The result (r, in, *kernel) is larger than they are. So a rank that no weight of this shape needs is refused first.
    """
    whole = mid.ndim >= 3 and down.ndim >= 2 and all(n == 1 for n in down.shape[2:])
    if not whole or mid.shape[1] != down.shape[0] or (down.shape[1], *mid.shape[2:]) != tuple(shape[1:]):
        raise CheckpointError(
            f"{location}: lora_mid {tuple(mid.shape)} does not go with lora_down {tuple(down.shape)} at a weight of "
            f"shape {tuple(shape)}; expected (r, i, *kernel) and (i, in, 1...)"
        )
    if mid.shape[0] > (most := max(shape[0], prod(shape[1:]))):
        raise CheckpointError(
            f"{location}: lora_mid has the rank {mid.shape[0]}, and no change of a weight of shape {tuple(shape)} has "
            f"one above {most}"
        )
    return torch.einsum("ri...,ij->rj...", mid.float(), down.flatten(1).float()).contiguous()


def _match_axes(t: Tensor, axes: int) -> Tensor:
    while t.ndim > axes and t.ndim > 2 and t.shape[-1] == 1:
        t = t.squeeze(-1)
    return t.reshape(*t.shape, *[1] * (axes - t.ndim)) if 2 <= t.ndim < axes else t


def _convert_magnitudes(location: str, t: Tensor, rows: int, axes: int) -> Tensor:
    """Return the magnitudes in PEFT's shape, from (rows, 1...): (rows,), or (1, rows, 1...) for a convolution.

    Raises CheckpointError for another shape, such as LyCORIS's magnitudes of columns.
    """
    if t.shape[:1] != (rows,) or t.numel() != rows:
        raise CheckpointError(
            f"{location}: dora_scale has shape {tuple(t.shape)}, expected one length for each of {rows} rows. LyCORIS "
            "has lengths of columns too (wd_on_output=False), which are another method than DoRA, and adaptc does not "
            "have it."
        )
    return t.reshape(1, rows, *[1] * (axes - 2)) if axes > 2 else t.reshape(rows)


def _check_complete(location: str, slots: Mapping[str, Tensor], names: Sequence[str]) -> None:
    if missing := [n for n in names if n not in slots]:
        raise CheckpointError(
            f"{location} has {', '.join(slots)} and no {', '.join(missing)}; the file is not complete"
        )


def _axis_size(location: str, slots: Mapping[str, Tensor], name: str, axis: int) -> int:
    if slots[name].ndim < 2:
        raise CheckpointError(f"{location}: {name!r} has shape {tuple(slots[name].shape)}, expected a matrix")
    return slots[name].shape[axis]


def _scalar_value(t: Tensor, description: str) -> float:
    """Return the number that a tensor holds, as an int where it is whole. Raises CheckpointError for anything else."""
    value = t.item() if t.numel() == 1 and not t.is_complex() and t.dtype is not torch.bool else None
    if value is None or not isfinite(value):
        raise CheckpointError(f"{description} is no finite number, but a tensor {tuple(t.shape)} of {t.dtype}: {value}")
    return int(value) if float(value).is_integer() else float(value)
