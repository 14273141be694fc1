"""P-tuning: rows in front of the token embeddings, made by a small trained network (Liu et al., arXiv 2103.10385).

File key: ``prompt_embeddings`` (num_virtual_tokens, width), what the network gives, which is all that PEFT writes and
reads. adaptc writes the network beside it, under ``prompt_encoder.``, so that training goes on from a file; PEFT leaves
that where it is.

The rows are ``fixed + network(trained)``: in training ``fixed`` is zero, and of a file of PEFT's the network is. The
network is computed once per binding where nothing trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.errors import CheckpointError, ConfigError, shown
from adaptc.methods._checks import check_integers, check_probability
from adaptc.methods._model_facts import ModelFacts
from adaptc.methods._program_config import ProgramConfig
from adaptc.methods._virtual_tokens import PROMPT, VirtualTokens
from adaptc.passes.ir.method import Initial
from adaptc.passes.ir.method_hooks import Slot, Slots
from adaptc.passes.ir.ops import Op
from adaptc.passes.ir.program_method import Given

MLP, LSTM = "MLP", "LSTM"
NETWORK = "prompt_encoder."
TRAINED = f"{NETWORK}embedding.weight"


@dataclass
class PromptEncoderConfig(ProgramConfig):
    """PEFT's ``PromptEncoderConfig``: same names, same defaults. ``encoder_hidden_size`` is by default the width of the
    embeddings; an MLP has three layers whatever ``encoder_num_layers`` says, and no dropout, as in PEFT."""

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
                f"{type(self).__name__}.encoder_reparameterization_type={shown(kind)} is not one of {MLP}, {LSTM}"
            )
        check_integers(self, {"encoder_num_layers": self.encoder_num_layers})
        if self.encoder_hidden_size is not None:
            check_integers(self, {"encoder_hidden_size": self.encoder_hidden_size})
        check_probability(self, "encoder_dropout")

    def resolved(self, facts: ModelFacts, width: int) -> Self:
        return super().resolved(facts, width).completed({"encoder_hidden_size": width})

    def method(self, name: str, kind: str) -> PTuning:
        assert self.num_virtual_tokens is not None
        if self.encoder_reparameterization_type == MLP:
            return PTuning(self.num_virtual_tokens, hidden=self.encoder_hidden_size or 0)
        layers, dropout = self.encoder_num_layers, self.encoder_dropout
        return PTuning(self.num_virtual_tokens, (), LSTM, self.encoder_hidden_size or 0, layers, dropout)


@dataclass(frozen=True)
class PTuning(VirtualTokens):
    """``layers`` and ``dropout``: of an LSTM. ``hidden`` 0: the width of the embeddings."""

    name: ClassVar[str] = "p_tuning"
    modules: ClassVar[Mapping[str, str]] = {PROMPT: PROMPT}

    encoder: str = MLP
    hidden: int = 0
    layers: int = 2
    dropout: float = 0.0
    training: bool = False

    def at(self, op: Op) -> Self:
        return self if self.hidden else replace(self, hidden=op.out_features)

    def slots(self, op: Op) -> dict[str, Slot]:
        rows = Slot((self.count, op.out_features), free=(0,))
        network = {f"{NETWORK}{n}": Slot(shape) for n, shape in self.network(op.out_features).items()}
        return {PROMPT: replace(rows, trainable=False), TRAINED: rows, **network}

    def network(self, width: int) -> dict[str, tuple[int, ...]]:
        """Parameter -> its shape, by PEFT's names."""
        h, out = self.hidden, {}
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

    def prompt(self, slots: Slots, given: Given) -> Tensor:
        fixed, x = slots[PROMPT], slots[TRAINED]
        if self.encoder == LSTM:
            x = self._lstm(x, slots)
        for i, layer in enumerate(self._heads()):
            x = F.linear(x.relu() if i else x, slots[f"{layer}.weight"], slots[f"{layer}.bias"])
        # Where there are no rows, a network that takes no fewer than one has made one.
        return fixed + x[: fixed.shape[0]]

    def _heads(self) -> list[str]:
        return [f"{NETWORK}mlp_head.{i}" for i in ((0, 2, 4) if self.encoder == MLP else (0, 2))]

    def _lstm(self, x: Tensor, slots: Slots) -> Tensor:
        weights = [t for n, t in slots.items() if n.startswith(f"{NETWORK}lstm_head.")]
        state = x.new_zeros(2 * self.layers, 1, self.hidden)
        drop, train = self.dropout, self.training
        options = (True, self.layers, drop, train, True, True)  # biases, ..., both directions, batch first
        return torch.ops.aten.lstm.input(x.unsqueeze(0), [state, state], weights, *options)[0].squeeze(0)

    # -- values --------------------------------------------------------------------------------------------------------

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Initial:
        """As torch begins its layers: normal numbers for rows, uniform ones by the width of what a layer reads."""

        def uniform(shape: tuple[int, ...], inputs: int) -> Tensor:
            return (torch.rand(shape, generator=generator) * 2 - 1) / sqrt(inputs)

        shapes = self.network(op.out_features)
        values = {PROMPT: torch.zeros(self.count, op.out_features)}
        values[TRAINED] = torch.randn(self.count, op.out_features, generator=generator)
        for name, shape in shapes.items():
            inputs = self.hidden if name.startswith("lstm") else shapes[f"{name.rpartition('.')[0]}.weight"][1]
            values[f"{NETWORK}{name}"] = uniform(shape, inputs)
        return Initial({n: t.to(W.device, dtype) for n, t in values.items()})

    def identity(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        none = W.new_zeros((0, op.out_features), dtype=dtype)
        return {**self._nothing(op, W.new_zeros((), dtype=dtype), 1), PROMPT: none}

    def _nothing(self, op: Op, zero: Tensor, count: int) -> dict[str, Tensor]:
        """A network that gives zeros for ``count`` rows, of one element in memory."""
        return {n: zero.expand(s.shape) for n, s in replace(self, count=count).slots(op).items()}

    # -- files ---------------------------------------------------------------------------------------------------------

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if PROMPT not in found:
            return dict(found)
        rows, network = found[PROMPT], {n: t for n, t in found.items() if n != PROMPT}
        if not network:
            return {**self._nothing(op, rows.new_zeros(()), rows.shape[0]), PROMPT: rows}
        if lost := sorted(set(self.slots(op)) - set(found)):
            raise CheckpointError(
                f"the file has some of the network that makes the rows, and lacks {lost[0]!r}: it needs all of it, or "
                f"{PROMPT!r} alone"
            )
        return {**network, PROMPT: torch.zeros_like(rows)}

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        with torch.no_grad():
            rows = self.evaluated().prompt(slots, {})
        last = self._heads()[-1]
        none = not any(bool(slots[f"{last}.{n}"].any()) for n in ("weight", "bias"))
        return {PROMPT: rows, **({} if none else {n: t for n, t in slots.items() if n != PROMPT})}

    def untrainable(self, slots: Slots) -> str:
        if slots[PROMPT].numel() and bool(slots[PROMPT].any()):
            return (
                "its file holds the rows and not the network that made them, as PEFT writes them. Train from a new "
                "config or a file of adaptc's, or train the rows themselves: a PromptTuningConfig with these tensors"
            )
        return ""

    def fqn(self, place: str, slot: str, adapter: str) -> str:
        return super().fqn(place, slot.removeprefix(NETWORK), adapter)
