"""AdaLoRA: W' = W + s B (E * A), an SVD whose singular values E are cut while training (arXiv 2303.10512).

s = alpha / (init_r + 1e-5), with the initial rank even after terms were cut. Slots, in PEFT's shapes: ``lora_A``
(r, in), ``lora_E`` (r, 1), ``lora_B`` (out, r). The columns of A hold all of a convolution's inputs and kernel
positions; stacked experts have an axis of experts in front.

``rank_pattern`` in the config has a mask of the ``init_r`` terms that are left at each site, under
``<key of the site>.lora_E``; files hold only those terms. ``adaptc.training.RankAllocator`` makes the masks, and
``adaptc.training.orthogonal_loss`` is AdaLoRA's additional loss.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from adaptc.errors import AdaptcWarning, ConfigError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import check_integers, check_matrix, prepare_adapter_input
from adaptc.methods.lora_family.lora_config import LoraConfig
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.method_part import SiteDescription
from adaptc.passes.protocol.parts.size_rule import SizeRule

_IGNORED_BY_PEFT = "PEFT ignores it for AdaLoRA"
_LORA_VARIANT = "it is a variant of LoRA, not of AdaLoRA"


@dataclass
class AdaLoraConfig(LoraConfig):
    """PEFT's ``AdaLoraConfig``: same names, same defaults. ``r`` has no meaning here.

    Attributes:
        target_r: the mean rank at the end of training.
        init_r: the rank of every layer at the beginning.
        tinit: the steps before the first cut.
        tfinal: the steps after the last cut.
        deltaT: the steps between cuts.
        beta1: the factor of the moving average of importance.
        beta2: the factor of the moving average of its uncertainty.
        orth_reg_weight: the weight of :func:`adaptc.training.orthogonal_loss`.
        total_step: the number of steps of the training; required.
        rank_pattern: the terms that are left, written by :class:`adaptc.training.RankAllocator`.

    Example:
        >>> config = adaptc.AdaLoraConfig(init_r=12, target_r=8, total_step=1000, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "ADALORA"
    writes_unset_fields: ClassVar[bool] = False
    samples: ClassVar[Sequence[Mapping[str, Any]]] = ({"total_step": 100},)
    unsupported_fields: ClassVar[Mapping[str, str]] = {
        **LoraConfig.unsupported_fields,
        "loftq_config": "PEFT has no LoftQ for AdaLoRA",
        **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config"), "AdaLoRA has first values of its own"),
        "use_rslora": _IGNORED_BY_PEFT,
        "lora_bias": _IGNORED_BY_PEFT,
        "alpha_pattern": _IGNORED_BY_PEFT,
        "use_dora": _LORA_VARIANT,
        "velora_config": _LORA_VARIANT,
        "alora_invocation_tokens": _LORA_VARIANT,
        "use_qalora": _LORA_VARIANT,
        "monteclora_config": _LORA_VARIANT,
        "use_bdlora": _LORA_VARIANT,
        "arrow_config": _LORA_VARIANT,
        "kasa_config": _LORA_VARIANT,
    }

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, Any] | None = None  # type: ignore[assignment]  # PEFT gives the name another meaning

    def __post_init__(self) -> None:
        TargetedConfig.__post_init__(self)
        if self.r != 8:
            warnings.warn(f"AdaLoraConfig.r={self.r} has no effect; init_r is the rank", AdaptcWarning, stacklevel=3)
        check_integers(self, {n: getattr(self, n) for n in ("init_r", "target_r", "deltaT")})
        check_integers(self, {n: getattr(self, n) for n in ("tinit", "tfinal")}, minimum=0)
        if self.total_step is None:
            raise ConfigError("AdaLoraConfig.total_step is required: the number of training steps")
        check_integers(self, {"total_step": self.total_step})
        if self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                f"AdaLoraConfig leaves no steps in which ranks can fall: tinit={self.tinit} must be less than "
                f"total_step - tfinal = {self.total_step - self.tfinal}"
            )
        for name in ("beta1", "beta2"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ConfigError(f"AdaLoraConfig.{name} must lie between 0 and 1, got {getattr(self, name)!r}")
        if self.orth_reg_weight < 0:
            raise ConfigError(f"AdaLoraConfig.orth_reg_weight must not be negative, got {self.orth_reg_weight!r}")
        if not isinstance(self.init_lora_weights, bool):
            raise ConfigError(
                f"AdaLoraConfig.init_lora_weights={self.init_lora_weights!r} does not exist: AdaLoRA begins with E = 0 "
                "(True, which is what PEFT takes any string for) or at random (False)"
            )
        self.check_common()
        if self.rank_pattern is not None:
            self.rank_pattern = {k: self._mask_to_lists(k, v) for k, v in self.rank_pattern.items()}

    def _mask_to_lists(self, key: str, mask: Any) -> list[Any]:
        """Return ``mask`` as a list of bools, or as a list of such lists, one per expert.

        Raises ConfigError for any other value, and for a ``key`` that is no key of ``rank_pattern``.
        """
        try:
            table = torch.as_tensor(mask).to(torch.bool)
        except (TypeError, ValueError, RuntimeError):
            table = torch.zeros(0)
        if isinstance(mask, Tensor) and table.ndim == 2 and table.shape[1] == 1:
            table = table.squeeze(1)
        if _site_key(key) is None or table.ndim not in (1, 2) or table.shape[-1] != self.init_r:
            raise ConfigError(
                f"AdaLoraConfig.rank_pattern[{key!r}]={mask!r}: expected a key '<module>.lora_E' and a list of init_r="
                f"{self.init_r} bools, as adaptc.training.RankAllocator makes them. To choose ranks by hand use "
                "LoraConfig."
            )
        return table.tolist()

    def with_ranks(self, ranks: Mapping[str, int]) -> Self:
        return self  # its ranks are masks

    def pattern_entries(self) -> dict[str, Mapping[str, Any]]:
        # Only the module's part of each key: the names of PEFT's wrappers and of the parameter match no module.
        sites = {(_site_key(k) or "").partition(".base_layer")[0]: v for k, v in (self.rank_pattern or {}).items()}
        return {"rank_pattern": sites}

    def pattern_matches(self, key: str, name: str) -> bool:
        return not key or f".{key}." in f".{name}."

    def method(self, name: str, kind: str) -> AdaLora:
        return AdaLora(
            r=self.init_r,
            alpha=self.lora_alpha,
            init_r=self.init_r,
            dropout=self.lora_dropout,
            scheme=bool(self.init_lora_weights),
        )

    def rank_mask(self, key: str) -> tuple[Any, ...] | None:
        """Return the mask of the ``init_r`` terms that are left at the site with this key; None for all.

        At stacked experts it is a tuple of masks, one per expert.
        """
        found = next((v for k, v in (self.rank_pattern or {}).items() if _site_key(k) == key), None)
        return None if found is None else _mask_to_tuple(found)


class AdaLoraFiles(FileFormat):
    method: AdaLora

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.method.kept is None or _count_terms(self.method.kept):
            return dict(found)
        # Regions have no code for rank 0, so a site without terms gets terms of zeros.
        return {n: t if t.numel() else t.new_zeros(self.method.slots(op)[n].shape) for n, t in found.items()}

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        mask = None if self.method.kept is None else _mask_tensor(self.method.kept)
        out = dict(slots)
        for name, slot in self.method.slots(op).items() if mask is not None else ():
            (axis,) = slot.free
            index = mask.nonzero().squeeze(-1).to(out[name].device)  # type: ignore[union-attr]
            if out[name].shape[axis] != len(index):
                out[name] = out[name].index_select(axis, index)
        return out


class AdaLoraSizes(SizeRule):
    method: AdaLora

    def minimal(self, op: Op) -> AdaLora:
        return dataclasses.replace(self.method, r=2, kept=None)

    def with_sizes_of(self, op: Op, slots: Slots) -> AdaLora:
        A = slots.get("lora_A")
        return (
            self.method
            if A is None or A.ndim < 2 or not A.shape[-2]
            else dataclasses.replace(self.method, r=A.shape[-2])
        )


@dataclass(frozen=True)
class AdaLora(Method):
    """AdaLoRA at one site. ``kept``: the mask of the terms, of ``init_r``, that the adapter's file holds; None: all."""

    name: ClassVar[str] = "adalora"
    slot_family: ClassVar[str] = "lora"
    stacks: ClassVar[bool] = True
    swappable: ClassVar[frozenset[str]] = Method.swappable | {"init_r", "kept"}
    files = AdaLoraFiles()
    sizes = AdaLoraSizes()

    r: int = 12
    alpha: float = 8
    init_r: int = 12
    dropout: float = 0.0
    scheme: bool = True
    kept: tuple[Any, ...] | None = None
    training: bool = False

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("AdaLoRA", op)
        stack, rows = ((op.experts,), op.out_features) if op.experts else ((), op.shape[0])
        columns, n = prod(op.shape[1 + len(stack) :]), len(stack)
        return {
            "lora_A": Slot((*stack, self.r, columns), free=(n,)),
            "lora_E": Slot((*stack, self.r, 1), free=(n,)),
            "lora_B": Slot((*stack, rows, self.r), free=(n + 1,)),
        }

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        device = torch.device("cpu") if generator is None else generator.device
        shapes = {name: slot.shape for name, slot in self.slots(op).items()}
        values = {name: torch.randn(shape, device=device, generator=generator) for name, shape in shapes.items()}
        torch.randn(1, device=device, generator=generator)  # PEFT draws a number for the rank, too
        if self.scheme:
            values["lora_E"].zero_()
            for name in ("lora_A", "lora_B"):
                values[name].normal_(std=0.02, generator=generator)
        return InitialValues({n: t.to(device=W.device, dtype=dtype) for n, t in values.items()})

    def rebind(self, config: Any, place: SiteDescription) -> Method:
        new = super().rebind(config, place)
        kept = config.rank_mask(place.key) if isinstance(config, AdaLoraConfig) else None
        if new is self or kept is None or not isinstance(new, AdaLora):
            return new
        return dataclasses.replace(new, kept=kept, r=_count_terms(kept) or 2)

    def scale(self, op: Op) -> float:
        return (self.alpha if self.alpha > 0 else self.init_r) / (self.init_r + 1e-5)

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        return cast(W + self._delta(op, slots) * scale, W.dtype)

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        A, B = slots["lora_A"] * slots["lora_E"], slots["lora_B"]
        x = prepare_adapter_input(self, op, x, A.dtype)
        if op.groups > 1:  # each group reads the inputs of its own through the same A
            delta = op(x, self._delta(op, slots))
        elif op.is_conv:
            ones = [1] * len(op.kernel)
            delta = op.down_up(x, A.reshape(-1, *op.shape[1:]), B.reshape(op.out_features, -1, *ones))
        else:
            delta = op.down_up(x, A, B)
        return cast(y + delta * scale, y.dtype)

    def _delta(self, op: Op, slots: Slots) -> Tensor:
        return op.unmatrix(slots["lora_B"] @ (slots["lora_A"] * slots["lora_E"]))


def _site_key(key: str) -> str | None:
    """Return the key of the site for a key of ``rank_pattern``; None where it is no such key.

    PEFT's keys end with the adapter's name until the adapter was saved.
    """
    match = re.fullmatch(r"(?:(.+)\.)?lora_E(?:\.[^.]+)?", key)
    return None if match is None else match[1] or ""


def _mask_to_tuple(mask: Any) -> tuple[Any, ...]:
    return tuple(_mask_to_tuple(v) if isinstance(v, (list, tuple)) else bool(v) for v in mask)


def _mask_tensor(kept: Any) -> Tensor:
    """Return the mask (init_r,), bool, of the terms that at least one expert keeps."""
    mask = torch.tensor(kept, dtype=torch.bool)
    return mask if mask.ndim == 1 else mask.any(0)


def _count_terms(kept: Any) -> int:
    return int(_mask_tensor(kept).sum())
