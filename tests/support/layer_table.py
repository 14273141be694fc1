"""The table of layers: one entry per kind, and the models of one layer, or of two, that tests adapt.

``tests.support.method_table`` crosses it with the methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.support.custom_models import OneLayer


@dataclass(frozen=True)
class Layer:
    """A kind of layer: ``build(inputs, outputs)`` makes one, ``shape(inputs)`` is that of one sample of its input."""

    build: Callable[[int, int], nn.Module]
    shape: Callable[[int], tuple[int, ...]]

    def model(self, widths: tuple[int, int]) -> nn.Module:
        torch.manual_seed(11)
        return OneLayer(self.build(*widths)).double().eval()

    def args(self, widths: tuple[int, int], batch: int) -> tuple[Tensor, ...]:
        torch.manual_seed(batch)
        shape = self.shape(widths[0])
        if isinstance(self.build(*widths), nn.Embedding):
            return (torch.randint(widths[0], (batch, *shape)),)
        return (torch.randn(batch, *shape, dtype=torch.float64),)


class Experts(nn.Module):
    """Three matrices in one parameter, each sample through all of them."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(3, o, i))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->beo", x, self.matrices)


class LinearAndExperts(nn.Module):
    """A linear layer, ``up``, before the experts of ``layer``, whose matrices have other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 15)
        self.layer = Experts(15, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.up(x)))


class Functional(nn.Module):
    """A matrix that no layer reads, but an op the table of kinds does not know."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(o, i))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,oi->bo", x, torch.sin(self.weight))


LAYERS: dict[str, Layer] = {
    "linear": Layer(nn.Linear, lambda i: (4, i)),
    "linear_nobias": Layer(lambda i, o: nn.Linear(i, o, bias=False), lambda i: (i,)),
    "addmm": Layer(lambda i, o: Conv1D(o, i), lambda i: (4, i)),
    "embedding": Layer(nn.Embedding, lambda i: (4,)),
    "conv1d": Layer(lambda i, o: nn.Conv1d(i, o, 3, stride=2, padding=1), lambda i: (i, 7)),
    "conv1d_same": Layer(lambda i, o: nn.Conv1d(i, o, 3, dilation=2, padding="same", bias=False), lambda i: (i, 7)),
    "conv2d": Layer(lambda i, o: nn.Conv2d(i, o, 3, stride=2, padding=1), lambda i: (i, 7, 9)),
    "conv2d_1x1": Layer(lambda i, o: nn.Conv2d(i, o, 1), lambda i: (i, 5, 3)),
    "conv2d_odd": Layer(lambda i, o: nn.Conv2d(i, o, (3, 5), dilation=2, padding="same"), lambda i: (i, 7, 9)),
    "conv2d_circular": Layer(lambda i, o: nn.Conv2d(i, o, 3, padding=1, padding_mode="circular"), lambda i: (i, 5, 7)),
    "conv2d_groups": Layer(lambda i, o: nn.Conv2d(i, o, 3, groups=3), lambda i: (i, 5, 7)),
    "conv3d": Layer(lambda i, o: nn.Conv3d(i, o, (1, 2, 3)), lambda i: (i, 2, 3, 4)),
    "conv_transpose": Layer(lambda i, o: nn.ConvTranspose1d(i, o, 3, stride=2), lambda i: (i, 5)),
    "functional": Layer(Functional, lambda i: (i,)),
    "experts": Layer(Experts, lambda i: (i,)),
}
