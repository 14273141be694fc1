"""Small attention modules, and the names of what makes their operands, for the tests that look for them in graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from adaptc.passes.analysis.attention.attention_targets import find_attention

#: the operands of one attention with a projection for each
SEPARATE = [(("q",), ("k",), ("v",))]
sdpa = F.scaled_dot_product_attention
WIDTH, HEADS, SIZE = 6, 2, 4  # of the stream, of heads, of each head
INNER = HEADS * SIZE


class Net(nn.Module):
    """Named layers, and a forward that is a function of them and the inputs."""

    def __init__(self, forward: Callable[..., Tensor], **layers: Any) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self, *inputs)


class Scale(nn.Module):
    """A norm by hand, as decoders have it: through a mean and casts."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        y = x.double()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def qkv(**more: Any) -> dict[str, Any]:
    return {n: nn.Linear(WIDTH, INNER) for n in "qkv"} | {"o": nn.Linear(INNER, WIDTH)} | more


def heads(x: Tensor, n: int = HEADS) -> Tensor:
    return x.view(x.shape[0], x.shape[1], n, -1).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def manual(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    return F.softmax(q @ k.transpose(-1, -2) / 2 + bias, dim=-1) @ v


def rotate(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[-2])[:, None] / torch.arange(1, x.shape[-1] + 1)
    a, b = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()


def capture(model: nn.Module, *inputs: Tensor, dynamic: bool = True) -> ExportedProgram:
    inputs = inputs or (torch.randn(3, 5, WIDTH),)
    shapes = {"inputs": tuple({0: Dim.AUTO, 1: Dim.AUTO} for _ in inputs)} if isinstance(model, Net) else None
    return torch.export.export(model.eval(), inputs, dynamic_shapes=shapes if dynamic else None)


def operands(program: ExportedProgram) -> list[tuple[tuple[str, ...], ...]]:
    return [(a.query, a.key, a.value) for a in find_attention(program)]


def causal_attention(m: Any, x: Tensor) -> Tensor:
    return m.o(join(sdpa(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)), is_causal=True)))


class Block(nn.Module):
    def __init__(self, forward: Callable[..., Tensor] = causal_attention) -> None:
        super().__init__()
        self.attn = Net(forward, **qkv())
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + F.gelu(self.mlp(x))
