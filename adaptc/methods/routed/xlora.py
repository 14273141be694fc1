"""X-LoRA: LoRA experts, of which each token of a call has its own mix (Buehler and Buehler, arXiv 2402.07148).

y' = y + g sum_i w_i s_i B_i A_i x, with s_i = alpha_i / r_i. The scalings w (batch, length[, layer], expert) come from
a classifier on the base's last hidden state. The program computes that state in a duplicated base pass, in front of the
pass whose results it gives.

Slots of a site: ``lora_A.weight`` (ranks, in) and ``lora_B.weight`` (out, ranks), for embeddings ``lora_embedding_A``
and ``lora_embedding_B``. They hold the experts side by side along one axis of ranks. An expert takes as many entries as
its own rank, and none at a layer that it does not adapt. ``xlora_expert`` (ranks,) is the index of the classifier's
output that weighs a rank, and ``xlora_scaling`` (ranks,) has the s_i. Both follow from the config. The scale g of the
site is ``global_scaling_weight``.

Slots that all sites share: ``xlora_sharpness`` (1,), one over the temperature, and
``internal_xlora_classifier.layers.<i>.weight`` and ``.bias``, with <i> as in PEFT's ``Sequential``. Those of the last
layer start with the axes (layers, experts) here, and with one axis of their product in files.

In training the experts' dropout acts once on the input that all of them read, not on each expert separately. Sites are
linear layers and embeddings whose output has an entry for each token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from adaptc.errors import ConfigError, TargetError
from adaptc.methods._shared.option_checks import prepare_adapter_input
from adaptc.methods.lora_family.lora import LORA_NAMES
from adaptc.methods.routed.xlora_classifier import ConstantScalings, ScalingClassifier, ScalingRule
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.coefficients import Coefficient, DuplicatedPass
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.extra_inputs import ExtraInputs
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.shared_slots import SharedSlots
from adaptc.passes.protocol.parts.size_rule import SizeRule

CLASSIFIER = "internal_xlora_classifier"
EXPERT, SCALING, SHARPNESS = "xlora_expert", "xlora_scaling", "xlora_sharpness"
#: the name of the coefficient w
EXPERT_WEIGHTS = "xlora_weights"
#: the names of the free sizes of the classifier's last layer
CLASSIFIER_SIZES = ("layers", "experts")


def classifier_layers(depth: int, dropout: bool) -> list[str]:
    """Return the names of the classifier's ``depth`` linear layers in PEFT's ``Sequential``.

    Activations stand between them and, with ``dropout``, dropout layers.
    """
    return [f"{CLASSIFIER}.layers.{i * (3 if dropout else 2)}" for i in range(depth)]


class XLoraFiles(FileFormat):
    method: XLora

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        counts, count = torch.tensor(self.method.ranks), len(self.method.ranks)
        return {
            EXPERT: torch.repeat_interleave(self.method.layer * count + torch.arange(count), counts),
            SCALING: torch.repeat_interleave(torch.tensor(self.method.scales, dtype=torch.float64), counts).to(dtype),
            SHARPNESS: torch.tensor([1 / self.method.temperature], dtype=dtype),
        }

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = dict(found)
        for name, slot in self.method.classifier_slots().items():
            if slot.free and name in out and out[name].shape[:1] == (self.method.layers * len(self.method.ranks),):
                out[name] = out[name].unflatten(0, (self.method.layers, len(self.method.ranks)))
        return out

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        last = {n for n, s in self.method.classifier_slots().items() if s.free}
        return {n: t.flatten(0, 1) if n in last else t for n, t in slots.items()}


class XLoraSizes(SizeRule):
    method: XLora

    def minimal(self, op: Op) -> XLora:
        return replace(self.method, ranks=(2, *(0 for _ in self.method.ranks[1:])))


class XLoraInputs(ExtraInputs):
    method: XLora

    def coefficients(self) -> Mapping[str, Coefficient]:
        choice = ScalingRule(self.method.softmax, self.method.top_k, self.method.softmax_topk)
        constant = ConstantScalings(choice, self.method.pass_value) if self.method.pass_value else None
        first = DuplicatedPass(self.method.hidden_size, constant)
        make = ScalingClassifier(choice, self.method.classifier_dropout, self.method.training)
        return {EXPERT_WEIGHTS: Coefficient(make, (SHARPNESS, *self.method.classifier_slots()), first, make.scalings)}


@dataclass(frozen=True)
class XLora(Method):
    """X-LoRA at one site.

    ``ranks`` and ``scales``: those of the experts, 0 where an expert lacks the site. ``layer``: the index of the site
    among the classifier's ``layers``. ``dropout``: the experts' dropout.
    """

    name: ClassVar[str] = "xlora"
    stacks: ClassVar[bool] = True  # else it would be applied per expert, where the position of a token is unknown
    takes_complex: ClassVar[bool] = False
    swappable: ClassVar[frozenset[str]] = Method.swappable | {
        *("ranks", "scales", "layer", "layers", "temperature", "trained_experts", "weight_of_all"),
        *("classifier_dropout", "unequal_dropouts"),
    }
    files = XLoraFiles(names=LORA_NAMES[:4])
    sizes = XLoraSizes(exact=True)
    sharing = SharedSlots(shares=True)
    extra_inputs = XLoraInputs()

    ranks: tuple[int, ...] = (8,)
    scales: tuple[float, ...] = (1.0,)
    layer: int = 0
    layers: int = 1
    hidden_size: int = 4096
    depth: int = 1
    size: int = 2048
    drops_between: bool = True
    classifier_dropout: float = 0.0
    softmax: bool = True
    softmax_topk: bool = False
    top_k: int | None = None
    temperature: float = 1.0
    weight_of_all: float = 1.0
    pass_value: float = 0.0
    trained_experts: bool = False
    unequal_dropouts: bool = False
    dropout: float = 0.0
    training: bool = False

    def slots(self, op: Op) -> dict[str, Slot]:
        if op.kind not in ("linear", "addmm", "embedding") or not op.callable:
            raise TargetError(
                f"X-LoRA weighs its experts token by token, which has a meaning at linear layers and embeddings alone, "
                f"and not at a consumer of kind {op.kind!r}: leave the module out of the experts"
            )
        r, lora = sum(self.ranks), "lora_embedding_{}" if op.kind == "embedding" else "lora_{}.weight"
        return {
            lora.format("A"): Slot((r, op.in_features), free=(0,), trainable=self.trained_experts),
            lora.format("B"): Slot((op.out_features, r), free=(1,), trainable=self.trained_experts),
            EXPERT: Slot((r,), 0, (0,), torch.int64, trainable=False, saved=False),
            SCALING: Slot((r,), 0.0, (0,), trainable=False, saved=False),
            SHARPNESS: Slot((1,), 1.0, trainable=False, saved=False, shared=True),
            **self.classifier_slots(),
        }

    def classifier_slots(self) -> dict[str, Slot]:
        out: dict[str, Slot] = {}
        width = self.hidden_size
        *inner, last = classifier_layers(self.depth, self.drops_between)
        for name in inner:
            out[f"{name}.weight"] = Slot((self.size, width), shared=True)
            out[f"{name}.bias"] = Slot((self.size,), shared=True)
            width = self.size
        first = (self.layers, len(self.ranks))
        out[f"{last}.weight"] = Slot((*first, width), free=(0, 1), shared=True, apart=CLASSIFIER_SIZES)
        out[f"{last}.bias"] = Slot(first, free=(0, 1), shared=True, apart=CLASSIFIER_SIZES)
        return out

    def scale(self, op: Op) -> float:
        return self.weight_of_all

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        return InitialValues({**self.filled(op, W, dtype), **self.files.derived(op, W, dtype, {})})

    def check_merge(self, op: Op) -> str:
        return "X-LoRA weighs its experts token by token, which no weight can"

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        A, B, expert, scaling, *_ = slots.values()
        h = op.down(prepare_adapter_input(self, op, x, A.dtype), op.with_max_norm(A) if op.kind == "embedding" else A)
        if EXPERT_WEIGHTS in slots:
            weights = cast(slots[EXPERT_WEIGHTS].index_select(-1, expert), h.dtype)
            h = h * (weights if h.ndim > 2 else weights.flatten(0, 1))
        return cast(y + op.up(h * scaling, B) * scale, y.dtype)

    def trained(self) -> Self:
        if self.unequal_dropouts:
            raise ConfigError(
                "the experts of X-LoRA have lora_dropouts that differ, and here one acts for all of a layer: give them "
                "one, in their adapter_config.json, or train without"
            )
        return super().trained()
