"""P-tuning: virtual tokens made by a small trained network (Liu et al., arXiv 2103.10385).

File key: ``prompt_embeddings`` (num_virtual_tokens, width), the network's output. The network itself is under
``prompt_encoder.``, which PEFT neither writes nor reads. It is an MLP of three layers, or an LSTM with an MLP of two
layers behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.errors import ConfigError, short_repr
from adaptc.methods._shared.model_facts import ModelFacts
from adaptc.methods._shared.option_checks import check_integers, check_probability, warn_unused
from adaptc.methods._shared.program_config import ProgramConfig
from adaptc.methods.prompt.reparameterized_prompt import NETWORK_PREFIX, ReparameterizedPrompt
from adaptc.methods.prompt.virtual_token_method import VirtualTokenSizes
from adaptc.methods.prompt.virtual_tokens import VirtualTokens
from adaptc.passes.analysis.attention.attention_for_prefixes import SelfAttentions
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.coefficients import ExtraValues
from adaptc.passes.protocol.parts.method_part import Slots

MLP, LSTM = "MLP", "LSTM"


@dataclass
class PromptEncoderConfig(ProgramConfig):
    """PEFT's ``PromptEncoderConfig``: same names, same defaults.

    As in PEFT, an MLP always has three layers and no dropout: where ``encoder_num_layers`` or ``encoder_dropout`` is
    set, an AdaptcWarning says so.

    Attributes:
        encoder_reparameterization_type: "MLP" or "LSTM", which makes the rows while they are trained.
        encoder_hidden_size: the width of the encoder; None for the width of the embeddings.
        encoder_num_layers: the number of layers of an LSTM.
        encoder_dropout: the dropout probability of an LSTM.

    Example:
        >>> config = adaptc.PromptEncoderConfig(num_virtual_tokens=20, encoder_hidden_size=128)
    """

    peft_type: ClassVar[str] = "P_TUNING"

    encoder_reparameterization_type: str = MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = self.encoder_reparameterization_type
        if kind not in (MLP, LSTM):
            raise ConfigError(
                f"{type(self).__name__}.encoder_reparameterization_type={short_repr(kind)} is not one of {MLP}, {LSTM}"
            )
        check_integers(self, {"encoder_num_layers": self.encoder_num_layers})
        if self.encoder_hidden_size is not None:
            check_integers(self, {"encoder_hidden_size": self.encoder_hidden_size})
        check_probability(self, "encoder_dropout")
        if kind == MLP:
            why = "on an MLP, which has three layers; encoder_reparameterization_type='LSTM' is what has them"
            warn_unused(self, ("encoder_num_layers", "encoder_dropout"), why)
        elif self.encoder_num_layers == 1:
            warn_unused(self, ("encoder_dropout",), "on an LSTM of one layer: it acts between layers")

    def with_model_defaults(
        self, facts: ModelFacts, embedding_dim: int, attentions: SelfAttentions | None = None
    ) -> Self:
        return (
            super()
            .with_model_defaults(facts, embedding_dim, attentions)
            .with_missing_filled({"encoder_hidden_size": embedding_dim})
        )

    def method(self, name: str, kind: str) -> PTuning:
        assert self.num_virtual_tokens is not None
        if self.encoder_reparameterization_type == MLP:
            return PTuning(self.num_virtual_tokens, sides=self.num_stacks, hidden=self.encoder_hidden_size or 0)
        layers, dropout = self.encoder_num_layers, self.encoder_dropout
        return PTuning(
            self.num_virtual_tokens, (), self.num_stacks, LSTM, self.encoder_hidden_size or 0, layers, dropout
        )


class PTuningSizes(VirtualTokenSizes):
    method: PTuning

    def specialized_for(self, op: Op) -> PTuning:
        return self.method if self.method.hidden else replace(self.method, hidden=op.out_features)


@dataclass(frozen=True)
class PTuning(ReparameterizedPrompt, VirtualTokens):
    """P-tuning with ``count`` virtual tokens.

    ``encoder``: "MLP" or "LSTM". ``layers`` and ``dropout``: those of an LSTM. ``hidden``: the hidden size of the
    network, 0 for the width of the embeddings.
    """

    name: ClassVar[str] = "p_tuning"
    trainable_alternative: ClassVar[str] = "a PromptTuningConfig"
    sizes = PTuningSizes(exact=True)

    encoder: str = MLP
    hidden: int = 0
    layers: int = 2
    dropout: float = 0.0
    training: bool = False

    def network_shapes(self, op: Op) -> dict[str, tuple[int, ...]]:
        h, width, out = self.hidden, op.out_features, {}
        if self.encoder == MLP:
            sizes = {"mlp_head.0": (width, h), "mlp_head.2": (h, h), "mlp_head.4": (h, width)}
        else:
            for layer in range(self.layers):
                for end in (f"l{layer}", f"l{layer}_reverse"):
                    out[f"lstm_head.weight_ih_{end}"] = (4 * h, 2 * h if layer else width)
                    out[f"lstm_head.weight_hh_{end}"] = (4 * h, h)
                    out |= {f"lstm_head.bias_{b}_{end}": (4 * h,) for b in ("ih", "hh")}
            sizes = {"mlp_head.0": (2 * h, 2 * h), "mlp_head.2": (2 * h, width)}
        for layer, (inputs, outputs) in sizes.items():
            out |= {f"{layer}.weight": (outputs, inputs), f"{layer}.bias": (outputs,)}
        return out

    def prompt(self, slots: Slots, given: ExtraValues) -> Tensor:
        return self.first_stack_rows(self.compute_rows(slots))

    def run_network(self, x: Tensor, slots: Slots) -> Tensor:
        if self.encoder == LSTM:
            x = self._run_lstm(x, slots)
        for i, layer in enumerate(self._mlp_layers()):
            weight, bias = (slots[f"{NETWORK_PREFIX}{layer}.{n}"] for n in ("weight", "bias"))
            x = F.linear(x.relu() if i else x, weight, bias)
        return x

    def last_layer(self) -> str:
        return self._mlp_layers()[-1]

    def _mlp_layers(self) -> list[str]:
        return [f"mlp_head.{i}" for i in ((0, 2, 4) if self.encoder == MLP else (0, 2))]

    def _run_lstm(self, x: Tensor, slots: Slots) -> Tensor:
        weights = [t for n, t in slots.items() if n.startswith(f"{NETWORK_PREFIX}lstm_head.")]
        state = x.new_zeros(2 * self.layers, 1, self.hidden)
        drop, train = self.dropout, self.training
        options = (True, self.layers, drop, train, True, True)  # biases, ..., both directions, batch first
        return torch.ops.aten.lstm.input(x.unsqueeze(0), [state, state], weights, *options)[0].squeeze(0)

    def layer_input_width(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return self.hidden if name.startswith("lstm") else super().layer_input_width(name, shapes)
