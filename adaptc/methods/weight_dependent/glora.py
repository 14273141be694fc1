"""GLoRA: a weight and a bias are scaled and shifted, and the weight shifts the bias (Chavan et al., arXiv 2306.07967).

    W' = W + W * A + B              products by entries
    b' = b + b * D + E + W C        at layers with a bias

Each of A to E is "lora" (Xd Xu), "vector", "constant" or "none". W is the weight as a matrix: kernels in its columns,
embeddings (width, vocabulary). Where other adapters changed the layer before, W and b on the right are the model's own,
as in PEFT. A layer without a bias has A and B alone.

Slots, in PEFT's shapes: ``glora_A.Xd`` (out, r) and ``glora_A.Xu`` (r, in), or ``glora_A.X`` (out, 1) or (1,), and B
alike. ``glora_C.Xd`` (in, r) and ``glora_C.Xu`` (r, 1), or ``glora_C.X`` (in, 1). D and E: ``glora_D.X`` (out,) or
(1,). PEFT's files hold zeros for what is absent, as ``glora_A.zeros`` (out, in) and so on. They are written here, and
read where they are zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.errors import CheckpointError, ConfigError, TargetError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import check_integers, check_matrix
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.size_rule import SizeRule

#: option -> the values that it takes
FORMS = {
    "config_A_B": ("lora", "vector", "constant", "none"),
    "config_C": ("lora", "vector", "none"),
    "config_D_E": ("vector", "constant", "none"),
}
ZEROS = "zeros"


@dataclass
class GloraConfig(TargetedConfig):
    """PEFT's ``GloraConfig``: same names, same defaults. Raises ConfigError for values without a meaning.

    Attributes:
        r: the rank where a form is "lora".
        config_A_B: the form of what scales and shifts the weight: "lora", "vector", "constant" or "none".
        config_C: the form of what the weight shifts the bias by: "lora", "vector" or "none".
        config_D_E: the form of what scales and shifts the bias: "vector", "constant" or "none".

    Example:
        >>> config = adaptc.GloraConfig(r=8, config_A_B="vector", target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "GLORA"

    r: int = 8
    bias: str = "none"
    config_A_B: str = "lora"
    config_C: str = "lora"
    config_D_E: str = "constant"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"r": self.r})
        for option, forms in FORMS.items():
            if getattr(self, option) not in forms:
                raise ConfigError(
                    f"GloraConfig.{option} must be one of {', '.join(forms)}, got {getattr(self, option)!r}"
                )
        if all(getattr(self, option) == "none" for option in FORMS):
            raise ConfigError("GloraConfig: with config_A_B, config_C and config_D_E 'none' there is nothing to train")

    def method(self, name: str, kind: str) -> Glora:
        return Glora(self.r, self.config_A_B, self.config_C, self.config_D_E, self.init_weights)


class GloraFiles(FileFormat):
    method: Glora

    def keys(self, op: Op) -> list[str]:
        return [f"{part}.{ZEROS}" for part in self.method.absent_parts(op)]

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name in self.keys(op):
            if name in found and bool(found[name].any()):
                raise CheckpointError(
                    f"{name!r} stands for a part that the config leaves out, and its values are not zero: PEFT would "
                    "add them. Give this part a form in the config, or set the values to zero"
                )
        return {n: t for n, t in found.items() if not n.endswith(f".{ZEROS}")}

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        like = next(iter(slots.values()))
        shapes = self.method.absent_parts(op).items()
        return {**slots, **{f"{part}.{ZEROS}": like.new_zeros(shape) for part, shape in shapes}}


class GloraSizes(SizeRule):
    method: Glora

    def with_rank(self, op: Op, rank: int) -> Glora:
        return dataclasses.replace(self.method, r=rank)

    def minimal(self, op: Op) -> Glora:
        return dataclasses.replace(self.method, r=2)


@dataclass(frozen=True)
class Glora(Method):
    """GLoRA at one site, with the forms of its parts. ``scheme`` False: random first values everywhere."""

    name: ClassVar[str] = "glora"
    files = GloraFiles(names=tuple(f"glora_{p}.{n}" for p in "ABCDE" for n in ("Xd", "Xu", "X", ZEROS)))
    sizes = GloraSizes(rank_axes={f"glora_{p}.Xd": 1 for p in "ABC"})

    r: int = 8
    a_b: str = "lora"
    c: str = "lora"
    d_e: str = "constant"
    scheme: bool = True

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("GLoRA", op)
        slots: dict[str, Slot] = {}
        for part, (form, shape) in self._parts(op).items():
            if form == "lora":
                slots[f"{part}.Xd"] = Slot((shape[0], self.r), free=(1,))
                slots[f"{part}.Xu"] = Slot((self.r, shape[1]), free=(0,))
            elif form == "vector":
                slots[f"{part}.X"] = Slot((shape[0], 1) if len(shape) == 2 else shape)
            elif form == "constant":
                slots[f"{part}.X"] = Slot((1,))
        if not slots:
            raise TargetError(
                "GLoRA with config_A_B='none' adapts the bias alone, and this layer has none; leave it out, or give "
                "config_A_B a form"
            )
        return slots

    def _parts(self, op: Op) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the parts of the adapter at a site: the start of its slots' names -> (form, shape of the whole)."""
        (rows, columns), biased = op.matrix_shape, op.callable and op.has_bias
        c, d_e = (self.c, self.d_e) if biased else ("none", "none")
        forms = {"A": self.a_b, "B": self.a_b, "C": c, "D": d_e, "E": d_e}
        shapes = {"A": (rows, columns), "B": (rows, columns), "C": (columns, 1), "D": (rows,), "E": (rows,)}
        return {f"glora_{p}": (form, shapes[p]) for p, form in forms.items()}

    def absent_parts(self, op: Op) -> dict[str, tuple[int, ...]]:
        """Return the parts for which files hold zeros, with their shapes."""
        return {part: shape for part, (form, shape) in self._parts(op).items() if form == "none"}

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        source = torch.device("cpu") if generator is None else generator.device
        values: dict[str, Tensor] = {}

        def fill(name: str, shape: tuple[int, ...], random: bool) -> None:
            t = torch.zeros(shape, device=source)
            if random and shape == (1,):
                t.normal_(0, 0.02, generator=generator)
            elif random:
                rows = t.unsqueeze(0) if t.ndim == 1 else t
                torch.nn.init.kaiming_uniform_(rows, a=math.sqrt(5), generator=generator)
            values[name] = t.to(W.device, dtype)

        slots = self.slots(op)
        # PEFT draws the second factor of a pair first.
        for name in sorted(slots, key=lambda n: (n.partition(".")[0], n.endswith(".Xd"))):
            fill(name, slots[name].shape, name.endswith(".Xu") or not self.scheme)
        return InitialValues({n: values[n] for n in slots})

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        return self.weight_over(op, W, W, slots, scale)

    def weight_over(self, op: Op, base: Tensor, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        factor, shift = (self._whole(f"glora_{p}", slots) for p in "AB")
        if factor is None or shift is None:
            return W
        delta = op.matrix(base) * factor + shift
        return cast(W + op.unmatrix(delta), W.dtype)

    def bias_over(
        self, op: Op, W: Tensor, own: Tensor | None, b: Tensor | None, slots: Slots, scale: Scale
    ) -> Tensor | None:
        if own is None or b is None:
            return b
        new = b
        through, factor, shift = (self._whole(f"glora_{p}", slots) for p in "CDE")
        if factor is not None and shift is not None:
            new = new + own * factor + shift
        if through is not None:
            wide = torch.promote_types(W.dtype, through.dtype)
            new = new + (cast(op.matrix(W), wide) @ cast(through, wide)).squeeze(-1)
        return cast(new, b.dtype)

    def _whole(self, part: str, slots: Slots) -> Tensor | None:
        """Return A, B, C, D or E, in a shape that broadcasts to its own; None where the adapter has none."""
        if f"{part}.Xd" in slots:
            return slots[f"{part}.Xd"] @ slots[f"{part}.Xu"]
        return slots.get(f"{part}.X")
