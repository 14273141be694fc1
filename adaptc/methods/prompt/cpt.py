"""Context-aware prompt tuning: rows of a context's tokens, each moved by a trained and bounded step (Blau et al., arXiv
2410.17222).

File key: ``prompt_embeddings`` (tokens, width), the rows after their steps, which is all that PEFT writes and reads.
adaptc writes rows and steps too, under ``prompt_encoder.``, so that training can continue from a file.

The context's labels count in the loss. A program with labels takes one more input that may be left out,
``input_type_mask`` (batch, length), the types of a call's tokens, 4 by default. The label of a call's token counts
where its type plus the context's largest type is a multiple of 4, and never for type 0. With
``opt_weighted_loss_type="decay"`` older groups of labels have less weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.errors import ConfigError, short_repr
from adaptc.methods._shared.option_checks import warn_unused
from adaptc.methods._shared.program_config import ProgramConfig
from adaptc.methods.prompt.virtual_tokens import IGNORE_INDEX, PROMPT_EMBEDDINGS, VirtualTokens, VirtualTokensFiles
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.coefficients import ExtraInput, ExtraValues
from adaptc.passes.protocol.method import InitialValues
from adaptc.passes.protocol.parts.extra_inputs import ExtraInputs
from adaptc.passes.protocol.parts.method_part import Slot, Slots

ROWS, STEPS = "prompt_encoder.embedding.weight", "prompt_encoder.delta_embedding.weight"
IDS, TYPES = "prompt_encoder.token_ids", "prompt_encoder.token_types"
INPUT_TYPES = "input_type_mask"
#: the number of kinds of tokens (a type modulo it is the kind: template and input of an example, template of its
#: output, label), and the type of a label
NUM_KINDS, LABEL_TYPE = 4, 4
MIN_STEP = 1e-10


@dataclass
class CPTConfig(ProgramConfig):
    """PEFT's ``CPTConfig``: same names, same defaults. ``num_virtual_tokens`` is the length of ``cpt_token_ids``.

    Attributes:
        cpt_token_ids: the tokens of the context.
        cpt_mask: one where a token of the context counts.
        cpt_tokens_type_mask: the part of the context that each token belongs to.
        opt_weighted_loss_type: "none", or "decay" for a loss in which earlier labels have less weight.
        opt_loss_decay_factor: the factor of "decay", for each group of labels that comes later.
        opt_projection_epsilon: how far the embeddings of inputs may move.
        opt_projection_format_epsilon: how far the embeddings of the format may move.
        tokenizer_name_or_path: the tokenizer of the context.

    Example:
        >>> config = adaptc.CPTConfig(num_virtual_tokens=4, cpt_token_ids=[5, 6, 7, 8], task_type="CAUSAL_LM")
    """

    peft_type: ClassVar[str] = "CPT"
    supports_encoders: ClassVar[bool] = False
    samples = ({"task_type": "CAUSAL_LM"},)

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: str | None = "none"
    opt_loss_decay_factor: float | None = 1.0
    opt_projection_epsilon: float | None = 0.1
    opt_projection_format_epsilon: float | None = 0.1
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        self.check_types()
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        count = len(self.cpt_token_ids)
        self.cpt_mask = [1] * count if self.cpt_mask is None else self.cpt_mask
        self.cpt_tokens_type_mask = [1] * count if self.cpt_tokens_type_mask is None else self.cpt_tokens_type_mask
        if not count:
            raise ConfigError(f"{type(self).__name__}.cpt_token_ids is empty: name the context's tokens")
        self.num_virtual_tokens = count
        super().__post_init__()
        name = type(self).__name__
        if self.task_type != "CAUSAL_LM":
            raise ConfigError(f"{name}.task_type must be 'CAUSAL_LM', got {self.task_type!r}")
        if not count == len(self.cpt_mask) == len(self.cpt_tokens_type_mask):
            raise ConfigError(
                f"{name}: cpt_token_ids, cpt_mask and cpt_tokens_type_mask have {count}, {len(self.cpt_mask)} and "
                f"{len(self.cpt_tokens_type_mask)} entries; they need one for each token"
            )
        if self.opt_weighted_loss_type not in ("none", "decay"):
            raise ConfigError(
                f"{name}.opt_weighted_loss_type={short_repr(self.opt_weighted_loss_type)} is not one of none, decay"
            )
        for option in ("opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon"):
            if getattr(self, option) is None or getattr(self, option) < 0:
                raise ConfigError(f"{name}.{option} must be a number of at least 0, got {getattr(self, option)!r}")
        if self.opt_weighted_loss_type == "none":
            why = "with opt_weighted_loss_type='none': 'decay' is what weighs labels by it"
            warn_unused(self, ("opt_loss_decay_factor",), why)

    def method(self, name: str, kind: str) -> Cpt:
        ids, types = tuple(self.cpt_token_ids or ()), tuple(self.cpt_tokens_type_mask or ())
        decay = (self.opt_loss_decay_factor or 0.0) if self.opt_weighted_loss_type == "decay" else 1.0
        step, template = self.opt_projection_epsilon or 0.0, self.opt_projection_format_epsilon or 0.0
        return Cpt(len(ids), (), 1, ids, types, decay, step, template)


class CptFiles(VirtualTokensFiles):
    method: Cpt

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        return self.method.context_slots(W.device)

    def keys(self, op: Op) -> list[str]:
        return [ROWS]

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if ROWS in found and STEPS in found:
            return {PROMPT_EMBEDDINGS: found[ROWS], STEPS: found[STEPS]}
        return (
            {**found, STEPS: torch.zeros_like(found[PROMPT_EMBEDDINGS])} if PROMPT_EMBEDDINGS in found else dict(found)
        )

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        rows, steps = (
            slots[PROMPT_EMBEDDINGS],
            self.method.bounded_steps({**slots, **self.method.context_slots(slots[STEPS].device)}),
        )
        return {PROMPT_EMBEDDINGS: rows + steps, **({ROWS: rows, STEPS: steps} if bool(steps.any()) else {})}

    def fqn(self, place: str, slot: str, adapter: str) -> str:
        return super().fqn(place, slot.removeprefix("prompt_encoder."), adapter)


class CptInputs(ExtraInputs):
    method: Cpt

    def extras(self) -> Mapping[str, ExtraInput]:
        return {INPUT_TYPES: ExtraInput(torch.int64, ("batch", "length"), place="labels", fill=LABEL_TYPE)}


@dataclass(frozen=True)
class Cpt(VirtualTokens):
    """CPT with the context's token ``ids`` and ``types``.

    ``step`` and ``template``: the largest length of a step of input tokens and of template tokens, at width 2048.
    ``decay``: the factor on the weight of a group of labels for each later group. ``first``: unused.
    """

    name: ClassVar[str] = "cpt"
    swappable: ClassVar[frozenset[str]] = VirtualTokens.swappable | {"ids", "types", "step", "template"}
    peft_names: ClassVar[Mapping[str, str]] = {PROMPT_EMBEDDINGS: PROMPT_EMBEDDINGS}
    files = CptFiles(names=(PROMPT_EMBEDDINGS,))
    extra_inputs = CptInputs()

    ids: tuple[int, ...] = ()
    types: tuple[int, ...] = ()
    decay: float = 1.0
    step: float = 0.1
    template: float = 0.1

    def slots(self, op: Op) -> dict[str, Slot]:
        rows = Slot((self.count, op.out_features), free=(0,))
        whole = Slot((self.count,), free=(0,), dtype=torch.int64, trainable=False, saved=False)
        return {PROMPT_EMBEDDINGS: replace(rows, trainable=False), STEPS: rows, IDS: whole, TYPES: whole}

    def prompt(self, slots: Slots, given: ExtraValues) -> Tensor:
        steps, still = slots[STEPS], slots[STEPS].detach()
        # Tokens that are labels or of type 0 are not moved. The gradient is that of the unbounded steps, as in PEFT.
        moved = torch.remainder(slots[TYPES], NUM_KINDS) != 0
        return (
            slots[PROMPT_EMBEDDINGS]
            + self.bounded_steps(slots).detach()
            + torch.where(moved.unsqueeze(-1), steps, still)
            - still
        )

    def bounded_steps(self, slots: Slots) -> Tensor:
        """Return the steps (tokens, width), each shortened to the largest length that its token's type allows."""
        steps, kind = slots[STEPS], torch.remainder(slots[TYPES], NUM_KINDS)
        size = sqrt(steps.shape[1] / 2048)
        most = torch.where(kind == 2, self.step * size, self.template * size)
        most = torch.where((slots[TYPES] > 0) & (kind != 0), most, MIN_STEP).to(steps.dtype)
        length = torch.linalg.vector_norm(steps, dim=1)
        scale = torch.where(length > 0, most / torch.maximum(length, most), 1.0)
        return steps * scale.unsqueeze(-1)

    def labels(self, value: Tensor, slots: Slots, given: ExtraValues) -> Tensor:
        own = slots[IDS].to(value.dtype).expand(value.shape[0], -1)
        return torch.where(_is_label(_all_token_types(slots, given)), torch.cat([own, value], 1), IGNORE_INDEX)

    def loss(self, value: Tensor, slots: Slots, given: ExtraValues, logits: Tensor, labels: Tensor) -> Tensor:
        if self.decay == 1:
            return value
        types, targets = _all_token_types(slots, given)[:, 1:], labels[:, 1:]
        token_losses = F.cross_entropy(
            logits[:, :-1].transpose(1, 2).float(), targets, reduction="none", ignore_index=IGNORE_INDEX
        )
        is_label = _is_label(types)
        # The weight of a group of labels falls with the number of later groups in its row.
        later = is_label.unsqueeze(1) & (types.unsqueeze(1) > types.unsqueeze(2))
        same = (types.unsqueeze(1) == types.unsqueeze(2)) & is_label.unsqueeze(1)
        first = is_label & (torch.tril(same, -1).sum(2) == 0)
        age = (later & first.unsqueeze(1)).sum(2)
        counts = targets != IGNORE_INDEX
        weight = torch.where(is_label, torch.pow(self.decay, age.to(token_losses.dtype)), 1.0)
        return ((token_losses * weight * counts).sum() / counts.sum()).to(value.dtype)

    # -- values --------------------------------------------------------------------------------------------------------

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        bad = [i for i in self.ids if not 0 <= i < op.in_features]
        if bad:
            raise ConfigError(
                f"cpt_token_ids has {bad[0]}, and the model's embedding has rows 0 to {op.in_features - 1}"
            )
        rows = W.detach()[:, torch.tensor(self.ids, device=W.device)].t().contiguous().to(dtype)
        return InitialValues({PROMPT_EMBEDDINGS: rows, STEPS: torch.zeros_like(rows), **self.context_slots(W.device)})

    def context_slots(self, device: torch.device) -> dict[str, Tensor]:
        return {n: torch.tensor(v, dtype=torch.int64, device=device) for n, v in ((IDS, self.ids), (TYPES, self.types))}

    def constrained(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        return {STEPS: self.bounded_steps(slots)}

    # -- files ---------------------------------------------------------------------------------------------------------


def _all_token_types(slots: Slots, given: ExtraValues) -> Tensor:
    """Return the types of all tokens, (batch, context + length): first the context's, then the call's.

    Types of the call are moved beyond the context's largest type, so that groups of labels stay apart.
    """
    theirs = given[INPUT_TYPES]
    own = slots[TYPES].expand(theirs.shape[0], -1)
    most = F.pad(slots[TYPES], (0, 1)).amax()  # of none, zero
    return torch.cat([own, torch.where(theirs > 0, theirs + most, theirs)], 1)


def _is_label(types: Tensor) -> Tensor:
    return (types > 0) & (torch.remainder(types, NUM_KINDS) == 0)
