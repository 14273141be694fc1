"""Convert the factors of one layer of loralib to PEFT's LoRA, whose product is the same.

    Linear         A (r, in), B (out, r): as they are
    Embedding      A (r, rows), B (width, r): as they are, under PEFT's names for embeddings
    MergedLinear   g groups, A (g r, in) and B (out, r): group i of A's rows goes to block i of B's. The rank is g r
    Conv2d         A (r k, in k) and B (out k, r k): their product, read row by row, is the weight. The rank is r k k

Values are copied, and zeros added. Only for convolutions with groups are the factors multiplied, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from adaptc.adapter_files.formats.file_layer import FileLayer, TargetModule
from adaptc.adapter_files.formats.full_rank import full_rank_factors
from adaptc.adapter_files.formats.parts import LORALIB_A, LORALIB_B
from adaptc.errors import CheckpointError
from adaptc.torch_typing import block_diag


def convert_loralib(location: str, slots: Mapping[str, Tensor], module: TargetModule) -> FileLayer:
    """Return the layer that loralib's factors make at ``module``. Raises CheckpointError where they make none."""
    if missing := [n for n in (LORALIB_A, LORALIB_B) if n not in slots]:
        names = [n.replace("loralib", "lora") for n in (*slots, *missing)]
        raise CheckpointError(f"{location} has {names[0]} and no {names[-1]}; the file is not complete")
    a, b = slots[LORALIB_A], slots[LORALIB_B]
    if a.ndim != 2 or b.ndim != 2 or not b.shape[1]:
        raise CheckpointError(
            f"{location}: lora_A has shape {tuple(a.shape)} and lora_B {tuple(b.shape)}, expected two matrices"
        )
    if len(module.shape) > 2:
        return _convert_convolution(location, a, b, module)
    rank, groups = b.shape[1], a.shape[0] // b.shape[1]
    if groups * rank != a.shape[0] or not groups:
        raise CheckpointError(
            f"{location}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} are not of one rank, or of one rank for "
            "each group of a MergedLinear; the file is damaged"
        )
    if groups == 1 and (b.shape[0], a.shape[1]) == module.shape[::-1] and _is_embedding(module):
        return FileLayer("LORA", {"lora_embedding_A": a, "lora_embedding_B": b}, rank, None)
    _check_rows(location, a, b, groups, module)
    if groups > 1:
        b = block_diag(*b.chunk(groups))
    return FileLayer("LORA", {"lora_A.weight": a, "lora_B.weight": b}, a.shape[0], None, file_rank=rank)


def _is_embedding(module: TargetModule) -> bool:
    op = module.find_op()
    return op is not None and op.kind == "embedding"


def _check_rows(location: str, a: Tensor, b: Tensor, groups: int, module: TargetModule) -> None:
    """Raise CheckpointError where B has other rows than the layer; without some blocks nobody knows which."""
    sizes = set(module.shape) if a.shape[1] in module.shape else set[int]()
    outputs = next(iter(sizes - {a.shape[1]}), a.shape[1])
    if b.shape[0] == outputs and sizes and not b.shape[0] % groups:
        return
    block = b.shape[0] // groups
    if sizes and 0 < b.shape[0] < outputs and block * groups == b.shape[0] and not outputs % block:
        count, r = outputs // block, b.shape[1]
        raise CheckpointError(
            f"{location}: lora_B has {b.shape[0]} of the layer's {outputs} rows, so {groups} of {count} blocks are "
            "adapted, and the file does not say which (loralib's enable_lora is not in it). Give a state dict with all "
            f"blocks: lora_A of {count * r} rows and lora_B of {outputs}, with zeros at the blocks that enable_lora "
            "leaves out."
        )
    raise CheckpointError(
        f"{location}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not go with a weight of shape "
        f"{module.shape}. The adapter was made for another model."
    )


def _convert_convolution(location: str, a: Tensor, b: Tensor, module: TargetModule) -> FileLayer:
    """Return the factors of a convolution, with their product read row by row as the weight.

    Each filter is k rows of the product. So B's rows for a filter stand side by side, before k copies of A.
    """
    shape = module.shape
    out, into, *kernel = shape
    k = kernel[0]
    rank, groups = a.shape[0] // k, a.shape[1] // (into * k)
    has_rank = rank > 0 and a.shape[0] == b.shape[1] == rank * k
    has_kernel = kernel in ([k, k], [1] * len(kernel))
    if not has_rank or not has_kernel or (b.shape[0] * groups, a.shape[1]) != (out * k, groups * into * k):
        raise CheckpointError(
            f"{location}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not go with a kernel of shape "
            f"{shape}; expected (r k, in k) and (out k, r k). The adapter was made for another model."
        )
    if groups > 1:  # filters are no whole rows of the product
        factors = full_rank_factors((b.float() @ a.float()).reshape(shape), groups)
        return FileLayer("LORA", factors, factors["lora_A.weight"].shape[0], None, file_rank=rank)
    down = block_diag(*[a] * k).reshape(-1, into, *kernel)
    up = b.reshape(out, -1, *[1] * len(kernel))
    return FileLayer("LORA", {"lora_A.weight": down, "lora_B.weight": up}, down.shape[0], None, file_rank=rank)
