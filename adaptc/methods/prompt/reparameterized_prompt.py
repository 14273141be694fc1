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
from adaptc.methods.prompt.virtual_token_method import PROMPT_EMBEDDINGS, VirtualTokenFiles, VirtualTokenMethod
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import InitialValues
from adaptc.passes.protocol.parts.method_part import Slot, Slots

NETWORK_PREFIX = "prompt_encoder."
TRAINED_ROWS = f"{NETWORK_PREFIX}embedding.weight"


class ReparameterizedFiles(VirtualTokenFiles):
    method: ReparameterizedPrompt

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if PROMPT_EMBEDDINGS not in found:
            return dict(found)
        rows, network = found[PROMPT_EMBEDDINGS], {n: t for n, t in found.items() if n != PROMPT_EMBEDDINGS}
        if not network:
            rows = self.method.split_stacks(PROMPT_EMBEDDINGS, rows)
            return {**self.method.zero_slots(op, rows.new_zeros(()), rows.shape[-2]), PROMPT_EMBEDDINGS: rows}
        if lost := sorted(set(self.method.slots(op)) - set(found)):
            raise CheckpointError(
                f"the file has some of the network that makes the rows, and lacks {lost[0]!r}: it needs all of it, or "
                f"{PROMPT_EMBEDDINGS!r} alone"
            )
        network[TRAINED_ROWS] = self.method.split_stacks(TRAINED_ROWS, network[TRAINED_ROWS])
        return {**network, PROMPT_EMBEDDINGS: self.method.split_stacks(PROMPT_EMBEDDINGS, torch.zeros_like(rows))}

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        with torch.no_grad():
            rows = self.method.join_stacks(self.method.evaluated().compute_rows(slots))
        none = not any(bool(slots[f"{NETWORK_PREFIX}{self.method.last_layer()}.{n}"].any()) for n in ("weight", "bias"))
        if none:
            return {PROMPT_EMBEDDINGS: rows}
        return {**slots, PROMPT_EMBEDDINGS: rows, TRAINED_ROWS: self.method.join_stacks(slots[TRAINED_ROWS])}

    def fqn(self, place: str, slot: str, adapter: str) -> str:
        return super().fqn(place, slot.removeprefix(NETWORK_PREFIX), adapter)


@dataclass(frozen=True)
class ReparameterizedPrompt(VirtualTokenMethod):
    """A method whose rows a network makes; a subclass defines the network."""

    peft_names: ClassVar[Mapping[str, str]] = {PROMPT_EMBEDDINGS: PROMPT_EMBEDDINGS}

    def row_widths(self, op: Op) -> tuple[int, int]:
        """Return the width of the trained rows, the network's input, and the width of its output."""
        return op.out_features, op.out_features

    def network_shapes(self, op: Op) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the network's parameters, by PEFT's names."""
        raise AssertionError(f"{type(self).__name__} must define network()")

    def run_network(self, x: Tensor, slots: Slots) -> Tensor:
        """Return the network's output for the rows ``x`` (rows, input width): (rows, output width)."""
        raise AssertionError(f"{type(self).__name__} must define through()")

    def last_layer(self) -> str:
        """Return the name of the network's last layer: where its parameters are zero, so is the network's output."""
        raise AssertionError(f"{type(self).__name__} must define last()")

    def slots(self, op: Op) -> dict[str, Slot]:
        trained, made = map(self.rows_slot, self.row_widths(op))
        network = {f"{NETWORK_PREFIX}{n}": Slot(shape) for n, shape in self.network_shapes(op).items()}
        return {PROMPT_EMBEDDINGS: replace(made, trainable=False), TRAINED_ROWS: trained, **network}

    def compute_rows(self, slots: Slots) -> Tensor:
        """Return the rows of all stacks: (count, width), or (sides, count, width) for more than one stack."""
        fixed, trained = slots[PROMPT_EMBEDDINGS], slots[TRAINED_ROWS]
        rows = self.run_network(self.join_stacks(trained), slots)
        # The identity has no rows but one trained row, since an LSTM takes no empty input: that row is cut off here.
        if self.sides == 1:
            return fixed + rows[: fixed.shape[0]]
        return fixed + rows.view(self.sides, -1, fixed.shape[2])[:, : fixed.shape[1]]

    # -- values --------------------------------------------------------------------------------------------------------

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        """Return first values as torch initialises its layers.

        Rows are normal random numbers. The network's parameters are uniform within 1 / sqrt(input width of the layer).
        """

        def uniform(shape: tuple[int, ...], inputs: int) -> Tensor:
            return (torch.rand(shape, generator=generator) * 2 - 1) / sqrt(inputs)

        shapes, slots = self.network_shapes(op), self.slots(op)
        values = {PROMPT_EMBEDDINGS: torch.zeros(slots[PROMPT_EMBEDDINGS].shape)}
        values[TRAINED_ROWS] = torch.randn(slots[TRAINED_ROWS].shape, generator=generator)
        for name, shape in shapes.items():
            values[f"{NETWORK_PREFIX}{name}"] = uniform(shape, self.layer_input_width(name, shapes))
        return InitialValues({n: t.to(W.device, dtype) for n, t in values.items()})

    def layer_input_width(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the input width of the layer that has the parameter ``name``."""
        return shapes[f"{name.rpartition('.')[0]}.weight"][1]

    def identity(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        none = W.new_zeros(replace(self, count=0).slots(op)[PROMPT_EMBEDDINGS].shape, dtype=dtype)
        return {**self.zero_slots(op, W.new_zeros((), dtype=dtype), 1), PROMPT_EMBEDDINGS: none}

    def zero_slots(self, op: Op, zero: Tensor, count: int) -> dict[str, Tensor]:
        """Return zeros for all slots at ``count`` rows, each a view of the one element ``zero``.

        A network with these values gives zeros.
        """
        return {n: zero.expand(s.shape) for n, s in replace(self, count=count).slots(op).items()}

    # -- files ---------------------------------------------------------------------------------------------------------

    def untrainable(self, slots: Slots) -> str:
        if slots[PROMPT_EMBEDDINGS].numel() and bool(slots[PROMPT_EMBEDDINGS].any()):
            return (
                "its file holds the rows and not the network that made them, as PEFT writes them. Train from a new "
                f"config or a file of adaptc's, or train the rows themselves: {self.trainable_alternative} with these "
                "tensors"
            )
        return ""

    #: a phrase for messages: the config whose method trains the rows themselves
    trainable_alternative: ClassVar[str] = ""
    files = ReparameterizedFiles(names=(PROMPT_EMBEDDINGS,))
