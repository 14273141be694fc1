"""Small modules that consume their weights in every way there is, each with an adapter config: one entry per kind.

All sizes are odd or prime and no weight is square, so that a transposed or mislabelled axis cannot go unnoticed. Models
are float64 and random; the checks that run over the table are in ``tests.site_checks``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Hand:
    """A weight whose adapter is known by hand: its ``key`` in files and how its factors make a weight.

    ``layout``: "plain" (rows are outputs) or "swap" (axes 0 and 1 exchanged). ``times``: a factor on the scale.
    """

    key: str
    layout: str = "plain"
    times: float = 1


@dataclass(frozen=True)
class Case:
    """A model, its ``inputs`` for a batch size, a config, and how to know what is right.

    ``hand``: parameters for which PEFT is no oracle; with it, a model with these weights merged is one.
    ``merges``: where PEFT's merged weights come from, "whole" a merged model, "layers" each of its layers (a model with
    tied weights merges them into one another), "" nowhere. ``factors``: gradients PEFT gets wrong, by the end of their
    key, and by how much.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    config: Mapping[str, Any]
    hand: Mapping[str, Hand] = field(default_factory=dict)
    merges: str = "whole"
    factors: Mapping[str, float] = field(default_factory=dict)

    def model(self) -> nn.Module:
        torch.manual_seed(11)
        return self.build().double().eval()

    def args(self, batch: int) -> tuple[Tensor, ...]:
        torch.manual_seed(batch)
        return self.inputs(batch)


def floats(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randn(batch, *shape, dtype=torch.float64),)


def ids(length: int, vocabulary: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randint(vocabulary, (batch, length)),)


class One(nn.Module):
    """One layer, with something nonlinear behind it so that gradients depend on the outputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


class Behind(nn.Module):
    """A layer, and a linear one behind it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed = layer
        self.mid = nn.Linear(7, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.mid(torch.tanh(self.embed(x)))


class Twice(nn.Module):
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


class Direct(nn.Module):
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


class Within(nn.Module):
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


LORA = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}


def one(name: str, layer: Callable[[], nn.Module], inputs: Any, *, merges: str = "whole", **config: Any) -> Case:
    return Case(name, lambda: One(layer()), inputs, {**LORA, "target_modules": ["layer"], **config}, merges=merges)


def tied(name: str, build: Callable[[], nn.Module], inputs: Any, targets: list[str]) -> Case:
    return Case(name, build, inputs, {**LORA, "target_modules": targets}, merges="layers")


def by_hand(name: str, build: Callable[[], nn.Module], inputs: Any, hand: Mapping[str, Hand], **config: Any) -> Case:
    return Case(name, build, inputs, {**LORA, **config}, hand)


LINEAR = [
    one("linear", lambda: nn.Linear(7, 11), floats(7)),
    one("linear_nobias", lambda: nn.Linear(11, 7, bias=False), floats(5, 11)),
    one("linear_4d", lambda: nn.Linear(7, 11), floats(3, 5, 7), use_rslora=True),
    one("linear_large_rank", lambda: nn.Linear(7, 11), floats(7), r=13),
    one("linear_rank_one", lambda: nn.Linear(7, 11), floats(7), r=1),
    one("addmm", lambda: Conv1D(11, 7), floats(5, 7), fan_in_fan_out=True),
    one("embedding", lambda: nn.Embedding(29, 7), ids(5, 29)),
    one("embedding_padding", lambda: nn.Embedding(29, 7, padding_idx=3), ids(9, 5)),
    one("embedding_scaled", lambda: Gemma3TextScaledWordEmbedding(29, 7, 0, embed_scale=7**0.5), ids(5, 29)),
    Case("twice", Twice, floats(7), {**LORA, "target_modules": ["up", "down"]}),
    tied("tied_head", Tied, ids(5, 29), ["head"]),
    tied("tied_embedding", Tied, ids(5, 29), ["embed"]),
    tied("tied_both", Tied, ids(5, 29), ["embed", "head"]),
    tied("direct_head", Direct, ids(5, 29), ["head"]),
    tied("direct_both", Direct, ids(5, 29), ["embed", "head"]),
    tied("functional_head", FunctionalHead, ids(5, 29), ["embed", "mid"]),
    tied("shared_first", Shared, floats(7), ["first"]),
    tied("shared_second", Shared, floats(7), ["second", "back"]),
    tied("shared_both", Shared, floats(7), ["first", "second"]),
]

CONV = [
    one("conv1d", lambda: nn.Conv1d(5, 7, 3, stride=2, padding=1), floats(5, 13)),
    one("conv1d_one", lambda: nn.Conv1d(5, 7, 1, bias=False), floats(5, 13)),
    one("conv2d", lambda: nn.Conv2d(3, 7, (3, 5), stride=(2, 1), padding=(1, 2)), floats(3, 11, 13)),
    one("conv2d_one", lambda: nn.Conv2d(3, 7, 1), floats(3, 5, 7)),
    one("conv3d", lambda: nn.Conv3d(3, 5, (3, 1, 2), stride=(1, 2, 1)), floats(3, 5, 7, 5)),
    one("conv2d_same", lambda: nn.Conv2d(3, 7, (3, 5), padding="same"), floats(3, 7, 11)),
    one("conv1d_valid", lambda: nn.Conv1d(3, 7, 5, padding="valid"), floats(3, 11)),
    one("conv1d_groups", lambda: nn.Conv1d(6, 9, 3, groups=3), floats(6, 11), merges=""),
    one("conv2d_groups", lambda: nn.Conv2d(6, 10, (3, 1), groups=2, padding=1), floats(6, 7, 5), r=4, merges=""),
    one("conv2d_depthwise", lambda: nn.Conv2d(5, 10, 3, groups=5), floats(5, 7, 5), r=5, merges=""),
]

# Where PEFT drops an option of the layer: dilation, padding_mode.
WEIGHT = {"layer.weight": Hand("layer")}
LAYER = {"target_modules": ["layer"]}
CONV_BY_HAND = [
    by_hand("conv1d_dilation", lambda: One(nn.Conv1d(5, 7, 3, dilation=2, stride=2)), floats(5, 17), WEIGHT, **LAYER),
    by_hand(
        "conv2d_dilation", lambda: One(nn.Conv2d(3, 7, (3, 5), dilation=(2, 1))), floats(3, 11, 13), WEIGHT, **LAYER
    ),
    by_hand(
        "conv3d_dilation", lambda: One(nn.Conv3d(3, 5, (1, 2, 3), dilation=2)), floats(3, 5, 7, 7), WEIGHT, **LAYER
    ),
    by_hand(
        "conv2d_same_dilation",
        lambda: One(nn.Conv2d(3, 7, (3, 1), dilation=3, padding="same")),
        floats(3, 11, 13),
        WEIGHT,
        **LAYER,
    ),
    *[
        by_hand(
            f"conv{n}d_{mode}",
            lambda n=n, mode=mode: One(getattr(nn, f"Conv{n}d")(3, 7, (3, 5, 1)[:n], padding=1, padding_mode=mode)),
            floats(3, *(7, 9, 5)[:n]),
            WEIGHT,
            **LAYER,
        )
        for n, mode in [(1, "circular"), (2, "circular"), (2, "reflect"), (2, "replicate"), (3, "circular")]
    ],
]

CONV_BY_HAND.append(by_hand("conv1d_strides", lambda: One(Strides(3, 5, 5)), floats(3, 13), WEIGHT, **LAYER))

RNN = {"target_modules": ["rnn"]}
UNUSUAL = [
    by_hand(
        "lstm",
        lambda: Recurrent(nn.LSTM(7, 5, num_layers=2, bidirectional=True, batch_first=True)),
        floats(3, 7),
        {
            f"rnn.weight_{w}_l{n}{d}": Hand(f"rnn.weight_{w}_l{n}{d}")
            for w in ("ih", "hh")
            for n in (0, 1)
            for d in ("", "_reverse")
        },
        **RNN,
    ),
    by_hand(
        "gru",
        lambda: Recurrent(nn.GRU(7, 5, batch_first=True, bias=False)),
        floats(3, 7),
        {f"rnn.weight_{w}_l0": Hand(f"rnn.weight_{w}_l0") for w in ("ih", "hh")},
        **RNN,
    ),
    by_hand(
        "conv_transpose1d",
        lambda: One(nn.ConvTranspose1d(5, 7, 3, stride=2)),
        floats(5, 11),
        {"layer.weight": Hand("layer", "swap")},
        **LAYER,
    ),
    by_hand(
        "conv_transpose2d",
        lambda: One(nn.ConvTranspose2d(6, 10, (3, 2), stride=2, groups=2, dilation=2)),
        floats(6, 5, 7),
        {"layer.weight": Hand("layer", "swap")},
        **LAYER,
    ),
    by_hand(
        "bilinear",
        Bilinear,
        lambda b: (torch.randn(b, 5, dtype=torch.float64), torch.randn(b, 7, dtype=torch.float64)),
        WEIGHT,
        **LAYER,
    ),
    by_hand("embedding_bag", Bagged, ids(5, 29), WEIGHT, **LAYER),
    by_hand(
        "functions",
        Within,
        floats(7),
        {
            "inner.by_matmul": Hand("inner.base_layer.base_layer"),
            "inner.by_t": Hand("inner.base_layer"),
            "inner.by_einsum": Hand("inner"),
        },
        target_modules=[],
        target_parameters=["inner.by_matmul", "by_t", "by_einsum"],
    ),
]

PARAMETERS = [
    Case("functions_peft", Within, floats(7), {**LORA, "target_modules": [], "target_parameters": ["inner.by_t"]}),
    Case(
        "linear_parameter",
        lambda: One(nn.Linear(7, 11)),
        floats(7),
        {**LORA, "target_modules": [], "target_parameters": ["layer.weight"]},
    ),
    *[
        Case(
            f"experts_{name}{'_t' if transposed else ''}",
            lambda transposed=transposed: Mixture(transposed),
            floats(7),
            {**LORA, "target_modules": [], "target_parameters": parameters, **more},
        )
        for transposed in (False, True)
        for name, parameters, more in [
            ("one", ["experts.up"], {}),
            ("both", ["experts.up", "experts.down"], {"use_rslora": True}),
        ]
    ],
    Case(
        "experts_and_gate",
        lambda: Mixture(False),
        floats(7),
        {**LORA, "target_modules": ["gate"], "target_parameters": ["experts.down"]},
    ),
]

# PEFT adds the change of out_proj to the weight twice, once of them outside of autograd.
TWICE = {f"out_proj.lora_{x}.weight": 2.0 for x in "AB"}
ATTENTION = [
    Case("mha", Attention, floats(5, 15), {**LORA, "target_modules": ["self_attn"]}, factors=TWICE),
    Case(
        "mha_nobias",
        lambda: Attention(bias=False),
        floats(5, 15),
        {**LORA, "target_modules": ["self_attn", "out"]},
        factors=TWICE,
    ),
    Case(
        "encoder_layer",
        lambda: nn.TransformerEncoderLayer(15, 3, 11, dropout=0.0, batch_first=True),
        floats(5, 15),
        {**LORA, "target_modules": ["self_attn", "linear1"]},
        factors=TWICE,
    ),
    by_hand(
        "mha_split",
        SplitAttention,
        floats(5, 15),
        {f"self_attn.{x}_proj_weight": Hand(f"self_attn.{x}_proj_weight") for x in "qkv"}
        | {"self_attn.out_proj.weight": Hand("self_attn.base_layer.out_proj", times=2)},
        target_modules=["self_attn"],
    ),
]


def net(name: str, *targets: str, merges: str = "whole", **config: Any) -> Case:
    return Case(name, Net, ids(5, 29), {**LORA, "target_modules": list(targets), **config}, merges=merges)


BIASES = [
    net("bias_lora_only", "up", "dense", bias="lora_only"),
    net("bias_all", "up", "dense", bias="all"),
    net("lora_bias", "up", "dense", lora_bias=True),
    net("lora_bias_without_base_bias", "up", "down", lora_bias=True, merges=""),
    net("lora_bias_and_bias", "up", "dense", lora_bias=True, bias="all"),
    one("lora_bias_conv", lambda: nn.Conv2d(3, 7, (3, 5)), floats(3, 7, 11), lora_bias=True),
    one("lora_bias_groups", lambda: nn.Conv1d(6, 9, 3, groups=3), floats(6, 11), merges="", lora_bias=True),
    one("lora_bias_addmm", lambda: Conv1D(11, 7), floats(5, 7), fan_in_fan_out=True, lora_bias=True),
    Case("lora_bias_twice", Twice, floats(7), {**LORA, "target_modules": ["down"], "lora_bias": True}),
    net("patterns", "up", "down", "dense", rank_pattern={"up": 5, "classifier.dense": 2}, alpha_pattern={"down": 9.5}),
]

WHOLE = [
    net("save_linear", "up", modules_to_save=["dense"]),
    net("save_norm", "up", modules_to_save=["norm"]),
    net("save_nested", "down", modules_to_save=["classifier"]),
    net("save_embedding", "down", modules_to_save=["embed"]),
    net("save_batch_norm", "down", modules_to_save=["batch"]),
    net("tokens", "down", trainable_token_indices={"embed": [3, 17, 5]}),
    Case(
        "tokens_functional_head",
        FunctionalHead,
        ids(5, 29),
        {**LORA, "target_modules": ["mid"], "trainable_token_indices": {"embed": [3, 28]}},
    ),
    Case(
        "tokens_scaled",
        lambda: Behind(Gemma3TextScaledWordEmbedding(29, 7, 5, embed_scale=7**0.5)),
        ids(9, 29),
        {**LORA, "target_modules": ["mid"], "trainable_token_indices": {"embed": [5, 2, 0]}},
    ),
    Case(
        "save_functional_head",
        FunctionalHead,
        ids(5, 29),
        {**LORA, "target_modules": ["mid"], "modules_to_save": ["embed"]},
    ),
]

CASES = {c.name: c for c in [*LINEAR, *CONV, *CONV_BY_HAND, *UNUSUAL, *PARAMETERS, *ATTENTION, *BIASES, *WHOLE]}
