"""Write a whole change of a weight as LoRA of full rank, exactly: one factor is the change, the other the identity.

As an adapter's factors the change has a scale, acts beside other adapters, and goes into any program with LoRA.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from adaptc.adapter_files.formats.file_layer import FileLayer, TargetModule
from adaptc.errors import CheckpointError
from adaptc.torch_typing import block_diag


def with_low_rank_change(layer: FileLayer, module: TargetModule, source: str) -> FileLayer:
    """Return ``layer``, which changes a whole weight, with the change as LoRA. A layer without a change of a matrix is
    returned as it is. Raises CheckpointError for a change of another shape than the weight's."""
    change = layer.differences.get("weight")
    if change is None or len(module.shape) < 2:
        return layer
    check_shape(f"{source}: module {module.name!r}", "weight", change, module.shape)
    op = module.find_op()
    # Contiguous, as torch.export.save takes no tensors that are views of others.
    change = change if op is None else op.canonical(change).contiguous()
    factors = full_rank_factors(change, 1 if op is None else op.groups)
    rank = factors["lora_A.weight"].shape[0]
    if op is not None and op.kind == "embedding":
        factors = {n.replace("lora_", "lora_embedding_").removesuffix(".weight"): t for n, t in factors.items()}
    rest = {param: t for param, t in layer.differences.items() if param != "weight"}
    return replace(
        layer, peft_type="LORA", tensors=factors, rank=rank, alpha=rank, has_own_scale=True, differences=rest
    )


def full_rank_factors(change: Tensor, groups: int = 1) -> dict[str, Tensor]:
    """Return LoRA's two factors, whose product is ``change`` (out, in / groups, *kernel) to the bit, by PEFT's slots.

    The identity is on the side where it is smaller; at a convolution it comes behind the change. With ``groups``, each
    group has one of its own, and the change is zero at the channels of the others.
    """
    out, into, *kernel = change.shape
    if not kernel and into < out:
        return {"lora_A.weight": torch.eye(into, dtype=change.dtype), "lora_B.weight": change}
    identity = torch.eye(out // groups, dtype=change.dtype).repeat(groups, 1)
    if groups > 1:
        blocks = block_diag(*change.flatten(1).reshape(groups, -1, into * prod(kernel)))
        change = blocks.reshape(out, groups * into, *kernel)
    return {"lora_A.weight": change, "lora_B.weight": identity.reshape(*identity.shape, *[1] * len(kernel))}


def check_shape(location: str, param: str, t: Tensor, shape: tuple[int, ...]) -> None:
    """Raise CheckpointError for a tensor of a file that has not the shape of the model's parameter."""
    if tuple(t.shape) != shape:
        raise CheckpointError(
            f"{location}: what the file has for its {param} has shape {tuple(t.shape)}, and the model's {param} has "
            f"{shape}. The adapter was made for another model."
        )
