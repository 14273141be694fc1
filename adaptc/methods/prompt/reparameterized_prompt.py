"""Define the base class of methods whose virtual-token rows are the output of a small trained network.

File key: ``prompt_embeddings``, the network's output, which is all that PEFT writes and reads. adaptc writes the
network too, under ``prompt_encoder.``, so that training can continue from a file; PEFT ignores those tensors.

The rows are ``fixed + network(trained)``. In training ``fixed`` is zero; for a file of PEFT's the network's output is
zero. Where nothing trains, the network is computed once per binding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.errors import CheckpointError
from adaptc.methods.prompt.virtual_token_method import PROMPT, InFront
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import Initial
from adaptc.passes.protocol.method_hooks import Slot, Slots

NETWORK = "prompt_encoder."
TRAINED = f"{NETWORK}embedding.weight"


@dataclass(frozen=True)
class MadeRows(InFront):
    """A method whose rows a network makes; a subclass defines the network."""

    modules: ClassVar[Mapping[str, str]] = {PROMPT: PROMPT}

    def sizes(self, op: Op) -> tuple[int, int]:
        """Return the width of the trained rows, the network's input, and the width of its output."""
        return op.out_features, op.out_features

    def network(self, op: Op) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the network's parameters, by PEFT's names."""
        raise AssertionError(f"{type(self).__name__} must define network()")

    def through(self, x: Tensor, slots: Slots) -> Tensor:
        """Return the network's output for the rows ``x`` (rows, input width): (rows, output width)."""
        raise AssertionError(f"{type(self).__name__} must define through()")

    def last(self) -> str:
        """Return the name of the network's last layer: where its parameters are zero, so is the network's output."""
        raise AssertionError(f"{type(self).__name__} must define last()")

    def slots(self, op: Op) -> dict[str, Slot]:
        trained, made = map(self.rows_of, self.sizes(op))
        network = {f"{NETWORK}{n}": Slot(shape) for n, shape in self.network(op).items()}
        return {PROMPT: replace(made, trainable=False), TRAINED: trained, **network}

    def made(self, slots: Slots) -> Tensor:
        """Return the rows of all stacks: (count, width), or (sides, count, width) for more than one stack."""
        fixed, trained = slots[PROMPT], slots[TRAINED]
        rows = self.through(self.joined(trained), slots)
        # The identity has no rows but one trained row, since an LSTM takes no empty input: that row is cut off here.
        if self.sides == 1:
            return fixed + rows[: fixed.shape[0]]
        return fixed + rows.view(self.sides, -1, fixed.shape[2])[:, : fixed.shape[1]]

    # -- values --------------------------------------------------------------------------------------------------------

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Initial:
        """Return first values as torch initialises its layers.

        Rows are normal random numbers. The network's parameters are uniform within 1 / sqrt(input width of the layer).
        """

        def uniform(shape: tuple[int, ...], inputs: int) -> Tensor:
            return (torch.rand(shape, generator=generator) * 2 - 1) / sqrt(inputs)

        shapes, slots = self.network(op), self.slots(op)
        values = {PROMPT: torch.zeros(slots[PROMPT].shape)}
        values[TRAINED] = torch.randn(slots[TRAINED].shape, generator=generator)
        for name, shape in shapes.items():
            values[f"{NETWORK}{name}"] = uniform(shape, self.reads(name, shapes))
        return Initial({n: t.to(W.device, dtype) for n, t in values.items()})

    def reads(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the input width of the layer that has the parameter ``name``."""
        return shapes[f"{name.rpartition('.')[0]}.weight"][1]

    def identity(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        none = W.new_zeros(replace(self, count=0).slots(op)[PROMPT].shape, dtype=dtype)
        return {**self._nothing(op, W.new_zeros((), dtype=dtype), 1), PROMPT: none}

    def _nothing(self, op: Op, zero: Tensor, count: int) -> dict[str, Tensor]:
        """Return zeros for all slots at ``count`` rows, each a view of the one element ``zero``.

        A network with these values gives zeros.
        """
        return {n: zero.expand(s.shape) for n, s in replace(self, count=count).slots(op).items()}

    # -- files ---------------------------------------------------------------------------------------------------------

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if PROMPT not in found:
            return dict(found)
        rows, network = found[PROMPT], {n: t for n, t in found.items() if n != PROMPT}
        if not network:
            rows = self.divided(PROMPT, rows)
            return {**self._nothing(op, rows.new_zeros(()), rows.shape[-2]), PROMPT: rows}
        if lost := sorted(set(self.slots(op)) - set(found)):
            raise CheckpointError(
                f"the file has some of the network that makes the rows, and lacks {lost[0]!r}: it needs all of it, or "
                f"{PROMPT!r} alone"
            )
        network[TRAINED] = self.divided(TRAINED, network[TRAINED])
        return {**network, PROMPT: self.divided(PROMPT, torch.zeros_like(rows))}

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        with torch.no_grad():
            rows = self.joined(self.evaluated().made(slots))
        none = not any(bool(slots[f"{NETWORK}{self.last()}.{n}"].any()) for n in ("weight", "bias"))
        if none:
            return {PROMPT: rows}
        return {**slots, PROMPT: rows, TRAINED: self.joined(slots[TRAINED])}

    def untrainable(self, slots: Slots) -> str:
        if slots[PROMPT].numel() and bool(slots[PROMPT].any()):
            return (
                "its file holds the rows and not the network that made them, as PEFT writes them. Train from a new "
                f"config or a file of adaptc's, or train the rows themselves: {self.instead} with these tensors"
            )
        return ""

    #: a phrase for messages: the config whose method trains the rows themselves
    instead: ClassVar[str] = ""

    def fqn(self, place: str, slot: str, adapter: str) -> str:
        return super().fqn(place, slot.removeprefix(NETWORK), adapter)
