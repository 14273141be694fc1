"""Small modules that consume their weights in every way there is.

All sizes are odd or prime and no weight is square, so that a transposed or mislabelled axis cannot go unnoticed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OneLayer(nn.Module):
    """One layer, with something nonlinear behind it so that gradients depend on the outputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


class LayerAfterTanh(nn.Module):
    """A layer, and a linear one behind it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed = layer
        self.mid = nn.Linear(7, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.mid(torch.tanh(self.embed(x)))


class SharedLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(7, 11)
        self.down = nn.Linear(11, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(torch.tanh(self.up(x)))
        return self.down(torch.tanh(self.up(x)))


class Tied(nn.Module):
    """An embedding whose weight is also the head's, each read by its own module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(29, 7)
        self.mid = nn.Linear(7, 7)
        self.head = nn.Linear(7, 29, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(self.embed(x))))


class DirectTiedHead(nn.Module):
    """A tied head right behind its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(29, 7)
        self.head = nn.Linear(7, 29, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


class CastTied(nn.Module):
    """A float32 parameter read in bfloat16 by an embedding and by a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = CastEmbedding(29, 7)
        self.mid = nn.Linear(7, 7, dtype=torch.bfloat16)
        self.head = CastLinear(7, 29, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(self.embed(x)))).float()


class CastEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight.to(torch.bfloat16))


class CastLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), None if self.bias is None else self.bias.to(input.dtype))


class Autocast(nn.Module):
    """Two layers in one autocast region, which an exported program holds as one op."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(7, 11)
        self.down = nn.Linear(11, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.down(torch.tanh(self.up(x)))
        return x.float()


class FunctionalHead(nn.Module):
    """An embedding whose weight the parent reads again, as a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(29, 7)
        self.mid = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.mid(self.embed(x))), self.embed.weight)


class Shared(nn.Module):
    """Two linear layers over one Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 11)
        self.second = nn.Linear(7, 11)
        self.second.weight = self.first.weight
        self.back = nn.Linear(11, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.back(torch.tanh(self.first(x)))))


class Recurrent(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(5, 7, 11)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.layer(x, y))


class Attention(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(15, 3, bias=bias, batch_first=True)
        self.out = nn.Linear(15, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.self_attn(x, x, x, need_weights=False)[0])


class SplitAttention(nn.Module):
    """Keys and values of another size than queries, so three weights instead of one."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(15, 3, kdim=7, vdim=11, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.self_attn(x, x[..., :7], x[..., :11])[0]


class Experts(nn.Module):
    """Stacked experts as transformers stores them: (experts, out, in), or (experts, in, out) when ``is_transposed``."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = ((3, 7, 11), (3, 11, 7)) if transposed else ((3, 11, 7), (3, 7, 11))
        self.up = nn.Parameter(torch.randn(up))
        self.down = nn.Parameter(torch.randn(down))

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return torch.bmm(torch.tanh(torch.bmm(x.expand(3, -1, -1), up)), down).sum(0)


class Mixture(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.experts = Experts(transposed)
        self.gate = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.gate(x))


class Functions(nn.Module):
    """Parameters read by functions: matmul, a transposed use, einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.by_matmul = nn.Parameter(torch.randn(7, 11))
        self.by_t = nn.Parameter(torch.randn(13, 11))
        self.by_einsum = nn.Parameter(torch.randn(13, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(torch.matmul(x, self.by_matmul))
        x = torch.tanh(x @ self.by_t.t())
        return torch.einsum("bi,io->bo", x, self.by_einsum)


class WeightInsideBlock(nn.Module):
    """A module that owns functions' parameters, one level down."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Functions()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Bagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.EmbeddingBag(29, 7, mode="mean")

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


class Strides(nn.Conv1d):
    """One layer, called with three strides and two paddings."""

    def forward(self, input: Tensor) -> Tensor:
        x = F.conv1d(input, self.weight, self.bias, stride=2)[..., :3]
        x = x + F.conv1d(input, self.weight, self.bias, stride=3, padding=1)[..., :3]
        return x + F.conv1d(input, self.weight, None, padding="same")[..., :3]


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(11, 5)
        self.norm = nn.LayerNorm(5)
        self.out = nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.norm(self.dense(x))))


class Net(nn.Module):
    """Layers with and without bias, norms with and without running statistics, and a head of several modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(29, 7)
        self.up = nn.Linear(7, 13)
        self.norm = nn.LayerNorm(13)
        self.down = nn.Linear(13, 11, bias=False)
        self.batch = nn.BatchNorm1d(11)
        self.classifier = Classifier()
        for p in self.parameters():
            nn.init.normal_(p)
        nn.init.normal_(self.batch.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(self.batch.running_var, 0.5, 2.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(torch.tanh(self.norm(self.up(self.embed(x)))))
        return self.classifier(torch.tanh(self.batch(x.mean(1))))


class UpDown(nn.Module):
    """Two linear layers, one on the other."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())
