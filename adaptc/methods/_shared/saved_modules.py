"""Train whole parameters (``modules_to_save``, biases) or single rows (trainable tokens) as slots.

For a whole parameter W' = slot; its identity is the base weight. For trainable tokens W'[i] is a row of the slot at the
chosen token indices i; all other rows are the base weight's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.errors import ConfigError, listing
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.method_part import SiteDescription
from adaptc.passes.protocol.parts.shared_slots import SharedSlots
from adaptc.passes.protocol.parts.size_rule import SizeRule


class TrainedParameterFiles(FileFormat):
    method: TrainedParameter

    def inner_path(self, rest: str) -> str:
        return rest.removeprefix(f"{self.method.place}.").removeprefix(self.method.submodules)

    def in_place(self) -> bool:
        # PEFT trains biases where they are; only modules_to_save keep a frozen original beside them.
        return self.method.place != "modules_to_save"

    def fqn(self, place: str, slot: str, adapter: str) -> str:
        path = slot.removeprefix(f"{self.method.place}.").removeprefix(self.method.submodules)
        return ".".join(p for p in (self.method.home or place, self.method.place, adapter, path) if p)


class TrainedParameterSharing(SharedSlots):
    method: TrainedParameter

    def tied_to(self, home: str) -> TrainedParameter:
        return replace(self.method, home=home)


@dataclass(frozen=True)
class TrainedParameter(Method):
    """A method that trains the parameter itself.

    ``slot``: its name in files. ``place``: the module in which the program keeps it, which may be the first part of
    ``slot``. ``submodules``: the prefix that keys have before a path inside submodules.

    Buffers of a trained module (running statistics) are slots too, changed by the program but not by an optimizer.
    """

    name: ClassVar[str] = "whole"
    replaces: ClassVar[bool] = True
    stacks: ClassVar[bool] = True
    files = TrainedParameterFiles()
    sharing = TrainedParameterSharing()

    slot: str = "weight"
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    place: str = "modules_to_save"
    trainable: bool = True
    submodules: str = ""
    #: the module to which the tensor belongs, where it is not the site's own
    home: str = ""

    def slot_for_path(self, path: str) -> str:
        """Return the slot of the parameter at ``path`` in a module, for a method whose ``slot`` is a common prefix."""
        return f"{self.slot}{self.submodules if '.' in path else ''}{path}"

    def slots(self, op: Op) -> dict[str, Slot]:
        return {self.slot: Slot(self.shape, dtype=self.dtype, trainable=self.trainable)}

    def identity(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return {self.slot: op.stored(W).detach().clone()}

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        return op.with_max_norm(cast(op.canonical(slots[self.slot]), W.dtype))

    def constrained(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        return {} if op.max_norm is None else {self.slot: op.stored(op.with_max_norm(op.canonical(slots[self.slot])))}

    def rebind(self, config: Any, place: SiteDescription) -> Method:
        return self

    def is_made_by(self, config: Any, place: SiteDescription) -> bool:
        return True  # parameters are trained beside any method

    def conflict_with(self, other: Any) -> str:
        return "all of it" if isinstance(other, (TrainedParameter, TokenRows)) else ""


class TokenRowsSizes(SizeRule):
    method: TokenRows

    def minimal(self, op: Op) -> Method:
        return replace(self.method, indices=(0, 1))


@dataclass(frozen=True)
class TokenRows(Method):
    """A method that replaces rows of an embedding, or of a head tied to one, by trained rows.

    An embedding's canonical W is (width, vocab). The index slot holds each token index plus one, so that zeros, with
    which the runtime pads, stand for no row. ``within``: the wrapper module that PEFT's keys name, '' for none.
    ``scheme`` False: random first values.
    """

    name: ClassVar[str] = "trainable_tokens"

    swappable: ClassVar[frozenset[str]] = frozenset({"indices", "scheme"})
    sizes = TokenRowsSizes()

    indices: tuple[int, ...] = ()
    within: str = "token_adapter"
    scheme: bool = True

    @property
    def delta_slot(self) -> str:
        return f"{self.within}.trainable_tokens_delta".removeprefix(".")

    @property
    def index_slot(self) -> str:
        return f"{self.within}.token_indices".removeprefix(".")

    def slots(self, op: Op) -> dict[str, Slot]:
        width, vocab = self._width_and_vocab(op)
        bad = [i for i in self.indices if not isinstance(i, int) or not 0 <= i < vocab]
        double = sorted({i for i in self.indices if self.indices.count(i) > 1})
        if bad or double:
            what = f"{bad} are not" if bad else f"{double} are named twice"
            raise ConfigError(
                f"trainable tokens must be distinct integers from 0 to {vocab - 1}, rows of this weight; {what}"
            )
        return {
            self.delta_slot: Slot((len(self.indices), width), free=(0,), repeated=not self.within),
            self.index_slot: Slot((len(self.indices),), free=(0,), dtype=torch.int64, trainable=False, saved=False),
        }

    def _width_and_vocab(self, op: Op) -> tuple[int, int]:
        rows = op.kind == "embedding"
        return (op.out_features, op.in_features) if rows else (op.in_features, op.out_features)

    def rebind(self, config: Any, place: SiteDescription) -> Method:
        if (own := super().rebind(config, place)) is not self:
            return own
        tokens = getattr(config, "trainable_token_indices", None)
        if isinstance(tokens, Mapping):
            names = (place.key, place.entry)
            tokens = next((v for k, v in tokens.items() if any(n == k or n.endswith(f".{k}") for n in names)), None)
        return self if tokens is None else replace(self, indices=tuple(tokens))

    def is_made_by(self, config: Any, place: SiteDescription) -> bool:
        return True  # tokens are trained beside any method

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        values = self.identity(op, W, dtype)
        if not self.scheme:
            size = (len(self.indices), self._width_and_vocab(op)[0])
            values[self.delta_slot] = torch.randn(size, dtype=W.dtype, generator=generator).to(dtype)
        return InitialValues(values)

    def identity(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        index = torch.tensor(self.indices, dtype=torch.int64, device=W.device)
        rows = W.t() if op.kind == "embedding" else W
        return {self.delta_slot: rows.detach()[index].to(dtype), self.index_slot: index + 1}

    def absent(self, op: Op, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        n, width = max(len(self.indices), 2), self._width_and_vocab(op)[0]
        index = torch.zeros(n, dtype=torch.int64, device=W.device)
        return {self.delta_slot: torch.zeros(n, width, dtype=dtype, device=W.device), self.index_slot: index}

    def conflict_with(self, other: Any) -> str:
        if isinstance(other, TrainedParameter):
            return other.conflict_with(self)
        both = sorted({*self.indices} & {*other.indices}) if isinstance(other, TokenRows) else []
        return f"the rows {listing(both)}" if both else ""

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        delta, index = self._bounded_rows(op, W, slots), slots[self.index_slot]
        rows = W.t() if op.kind == "embedding" else W
        # Unused entries have index 0, and write to an extra first row that is cut off again.
        rows = torch.index_copy(torch.cat([rows[:1], rows]), 0, index, delta)[1:]
        return rows.t() if op.kind == "embedding" else rows

    def _bounded_rows(self, op: Op, W: Tensor, slots: Slots) -> Tensor:
        """Return the trained rows (tokens, width) as the layer reads them: within ``max_norm`` at an embedding."""
        delta = cast(slots[self.delta_slot], W.dtype)
        return op.with_max_norm(delta.t()).t() if op.kind == "embedding" else delta

    def has_apply(self, op: Op) -> bool:
        scaled = (
            op.kind == "embedding" and len(op.other_args) > 1 and op.other_args[1]
        )  # gradients by how often a row is read
        return op.kind in ("embedding", "linear", "addmm") and not scaled

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        delta, index = self._bounded_rows(op, W, slots), slots[self.index_slot]
        if op.kind == "embedding":
            match = x.unsqueeze(-1) + 1 == index
            row = delta[match.to(torch.int64).argmax(-1)]
            padding = op.other_args[0] if op.other_args else -1
            if padding >= 0:  # embedding gives this row no gradient
                row = torch.where((x == padding).unsqueeze(-1), row.detach(), row)
            return torch.where(match.any(-1, keepdim=True), row, y)
        # Only the difference of the rows is added to their logits, so that a bias of the layer stays as it is.
        at, used = (index - 1).clamp(min=0), (index > 0).unsqueeze(-1)
        change = torch.nn.functional.linear(x, (delta - W[at]) * used)
        return torch.index_add(y, -1, at, change)
