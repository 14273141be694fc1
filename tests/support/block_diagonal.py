"""PEFT's BOFT computes with a CUDA extension and, where that does not compile, with one butterfly factor instead of
those asked for. Importing this gives PEFT the extension's two functions in plain PyTorch, so that it is an oracle for
any number of factors."""

from __future__ import annotations

import peft.tuners.boft.layer
import torch
from torch import Tensor


def forward(blocks: Tensor) -> list[Tensor]:
    """(m, k, b, b) -> [(m, k b, k b)], block-diagonal."""
    return [torch.stack([torch.block_diag(*b) for b in blocks])]


def backward(grad: Tensor, blocks: Tensor) -> list[Tensor]:
    m, k, b, _ = blocks.shape
    return [grad.reshape(m, k, b, k, b).diagonal(dim1=1, dim2=3).movedim(-1, 1).contiguous()]


class Extension:
    forward = staticmethod(forward)
    backward = staticmethod(backward)


peft.tuners.boft.layer._FBD_CUDA = Extension()
