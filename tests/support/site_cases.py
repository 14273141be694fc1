"""The table of sites: one entry per way to consume a weight, with inputs, a config and how to know what is right.

Models are float64 and random, and no adapter tensor is zero; the checks that run over the table are in
``tests.support.site_checks``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from tests.support.custom_models import (
    Attention,
    Bagged,
    Bilinear,
    DirectTiedHead,
    FunctionalHead,
    LayerAfterTanh,
    Mixture,
    Net,
    OneLayer,
    Recurrent,
    Shared,
    SharedLayers,
    SplitAttention,
    Strides,
    Tied,
    WeightInsideBlock,
)


@dataclass(frozen=True)
class ManualMerge:
    """A weight whose adapter is known by hand: its ``key`` in files and how its factors make a weight.

    ``layout``: "plain" (rows are outputs) or "swap" (axes 0 and 1 exchanged). ``times``: a factor on the scale.
    """

    key: str
    layout: str = "plain"
    times: float = 1


@dataclass(frozen=True)
class Case:
    """A model, its ``inputs`` for a batch size, a config, and how to know what is right.

    ``manual_merges``: parameters for which PEFT is no oracle; with it, a model with these weights merged is one.
    ``peft_merge``: where PEFT's merged weights come from, "whole" a merged model, "layers" each of its layers (a model
    with tied weights merges them into one another), "" nowhere. ``factors``: gradients PEFT gets wrong, by the end of
    their key, and by how much.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    config: Mapping[str, Any]
    manual_merges: Mapping[str, ManualMerge] = field(default_factory=dict)
    peft_merge: str = "whole"
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


LORA = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}


def one(name: str, layer: Callable[[], nn.Module], inputs: Any, *, merges: str = "whole", **config: Any) -> Case:
    return Case(
        name, lambda: OneLayer(layer()), inputs, {**LORA, "target_modules": ["layer"], **config}, peft_merge=merges
    )


def tied(name: str, build: Callable[[], nn.Module], inputs: Any, targets: list[str]) -> Case:
    return Case(name, build, inputs, {**LORA, "target_modules": targets}, peft_merge="layers")


def manual_case(
    name: str, build: Callable[[], nn.Module], inputs: Any, hand: Mapping[str, ManualMerge], **config: Any
) -> Case:
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
    Case("twice", SharedLayers, floats(7), {**LORA, "target_modules": ["up", "down"]}),
    tied("tied_head", Tied, ids(5, 29), ["head"]),
    tied("tied_embedding", Tied, ids(5, 29), ["embed"]),
    tied("tied_both", Tied, ids(5, 29), ["embed", "head"]),
    tied("direct_head", DirectTiedHead, ids(5, 29), ["head"]),
    tied("direct_both", DirectTiedHead, ids(5, 29), ["embed", "head"]),
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
WEIGHT = {"layer.weight": ManualMerge("layer")}
LAYER = {"target_modules": ["layer"]}
CONV_BY_HAND = [
    manual_case(
        "conv1d_dilation", lambda: OneLayer(nn.Conv1d(5, 7, 3, dilation=2, stride=2)), floats(5, 17), WEIGHT, **LAYER
    ),
    manual_case(
        "conv2d_dilation",
        lambda: OneLayer(nn.Conv2d(3, 7, (3, 5), dilation=(2, 1))),
        floats(3, 11, 13),
        WEIGHT,
        **LAYER,
    ),
    manual_case(
        "conv3d_dilation", lambda: OneLayer(nn.Conv3d(3, 5, (1, 2, 3), dilation=2)), floats(3, 5, 7, 7), WEIGHT, **LAYER
    ),
    manual_case(
        "conv2d_same_dilation",
        lambda: OneLayer(nn.Conv2d(3, 7, (3, 1), dilation=3, padding="same")),
        floats(3, 11, 13),
        WEIGHT,
        **LAYER,
    ),
    *[
        manual_case(
            f"conv{n}d_{mode}",
            lambda n=n, mode=mode: OneLayer(
                getattr(nn, f"Conv{n}d")(3, 7, (3, 5, 1)[:n], padding=1, padding_mode=mode)
            ),
            floats(3, *(7, 9, 5)[:n]),
            WEIGHT,
            **LAYER,
        )
        for n, mode in [(1, "circular"), (2, "circular"), (2, "reflect"), (2, "replicate"), (3, "circular")]
    ],
]

CONV_BY_HAND.append(manual_case("conv1d_strides", lambda: OneLayer(Strides(3, 5, 5)), floats(3, 13), WEIGHT, **LAYER))

RNN = {"target_modules": ["rnn"]}
UNUSUAL = [
    manual_case(
        "lstm",
        lambda: Recurrent(nn.LSTM(7, 5, num_layers=2, bidirectional=True, batch_first=True)),
        floats(3, 7),
        {
            f"rnn.weight_{w}_l{n}{d}": ManualMerge(f"rnn.weight_{w}_l{n}{d}")
            for w in ("ih", "hh")
            for n in (0, 1)
            for d in ("", "_reverse")
        },
        **RNN,
    ),
    manual_case(
        "gru",
        lambda: Recurrent(nn.GRU(7, 5, batch_first=True, bias=False)),
        floats(3, 7),
        {f"rnn.weight_{w}_l0": ManualMerge(f"rnn.weight_{w}_l0") for w in ("ih", "hh")},
        **RNN,
    ),
    manual_case(
        "conv_transpose1d",
        lambda: OneLayer(nn.ConvTranspose1d(5, 7, 3, stride=2)),
        floats(5, 11),
        {"layer.weight": ManualMerge("layer", "swap")},
        **LAYER,
    ),
    manual_case(
        "conv_transpose2d",
        lambda: OneLayer(nn.ConvTranspose2d(6, 10, (3, 2), stride=2, groups=2, dilation=2)),
        floats(6, 5, 7),
        {"layer.weight": ManualMerge("layer", "swap")},
        **LAYER,
    ),
    manual_case(
        "bilinear",
        Bilinear,
        lambda b: (torch.randn(b, 5, dtype=torch.float64), torch.randn(b, 7, dtype=torch.float64)),
        WEIGHT,
        **LAYER,
    ),
    manual_case("embedding_bag", Bagged, ids(5, 29), WEIGHT, **LAYER),
    manual_case(
        "functions",
        WeightInsideBlock,
        floats(7),
        {
            "inner.by_matmul": ManualMerge("inner.base_layer.base_layer"),
            "inner.by_t": ManualMerge("inner.base_layer"),
            "inner.by_einsum": ManualMerge("inner"),
        },
        target_modules=[],
        target_parameters=["inner.by_matmul", "by_t", "by_einsum"],
    ),
]

PARAMETERS = [
    Case(
        "functions_peft",
        WeightInsideBlock,
        floats(7),
        {**LORA, "target_modules": [], "target_parameters": ["inner.by_t"]},
    ),
    Case(
        "linear_parameter",
        lambda: OneLayer(nn.Linear(7, 11)),
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
    manual_case(
        "mha_split",
        SplitAttention,
        floats(5, 15),
        {f"self_attn.{x}_proj_weight": ManualMerge(f"self_attn.{x}_proj_weight") for x in "qkv"}
        | {"self_attn.out_proj.weight": ManualMerge("self_attn.base_layer.out_proj", times=2)},
        target_modules=["self_attn"],
    ),
]


def net(name: str, *targets: str, merges: str = "whole", **config: Any) -> Case:
    return Case(name, Net, ids(5, 29), {**LORA, "target_modules": list(targets), **config}, peft_merge=merges)


BIASES = [
    net("bias_lora_only", "up", "dense", bias="lora_only"),
    net("bias_all", "up", "dense", bias="all"),
    net("lora_bias", "up", "dense", lora_bias=True),
    net("lora_bias_without_base_bias", "up", "down", lora_bias=True, merges=""),
    net("lora_bias_and_bias", "up", "dense", lora_bias=True, bias="all"),
    one("lora_bias_conv", lambda: nn.Conv2d(3, 7, (3, 5)), floats(3, 7, 11), lora_bias=True),
    one("lora_bias_groups", lambda: nn.Conv1d(6, 9, 3, groups=3), floats(6, 11), merges="", lora_bias=True),
    one("lora_bias_addmm", lambda: Conv1D(11, 7), floats(5, 7), fan_in_fan_out=True, lora_bias=True),
    Case("lora_bias_twice", SharedLayers, floats(7), {**LORA, "target_modules": ["down"], "lora_bias": True}),
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
        lambda: LayerAfterTanh(Gemma3TextScaledWordEmbedding(29, 7, 5, embed_scale=7**0.5)),
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
