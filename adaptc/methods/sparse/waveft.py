"""WaveFT: W' = W + s IDWT2(C) with few wavelet coefficients C, or W + s C (Bilican et al., arXiv 2505.12532).

Slot ``waveft_spectrum`` (n,), float. The places of its coefficients are drawn from ``random_loc_seed``, and the
wavelet's filters come from PyWavelets: neither is in files. The transform has one level and acts on the weight as one
matrix, padded at its edges by the length of the filters.
"""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.errors import AdaptcWarning, ConfigError, nearest
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods.sparse.sparse import (
    SparseSpectrumMethod,
    SpectrumFiles,
    SpectrumSizes,
    check_positive_counts,
    check_seed,
    float32_or_wider,
    scatter_dense,
)
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.shared_slots import SharedSlots
from adaptc.patterns import pattern_value

#: the wavelet families that PEFT's config accepts, though its layers have filters for few of them
FAMILIES = (
    *(f"db{n}" for n in range(1, 39)),
    *(f"sym{n}" for n in range(2, 21)),
    *(f"coif{n}" for n in range(1, 18)),
)
FILTERS = "waveft_filters"


@dataclass
class WaveFTConfig(TargetedConfig):
    """PEFT's ``WaveFTConfig``: same names, same defaults.

    Raises ConfigError for an unknown wavelet, numbers of frequencies that are not positive integers, a seed of None,
    and where PyWavelets is missing.

    Attributes:
        n_frequency: the number of trained coefficients of a layer.
        scaling: the factor on the change.
        wavelet_family: the wavelet, by its name in PyWavelets.
        use_idwt: whether the coefficients are of a wavelet transform; False adds them to the weight as they are.
        random_loc_seed: the seed of the places of the coefficients.
        n_frequency_pattern: name or expression -> the number of coefficients of these modules.
        proportional_parameters: whether a layer's number of coefficients is in proportion to its size, with
            ``n_frequency`` as the mean; ``n_frequency_pattern`` then has no effect.

    Example:
        >>> config = adaptc.WaveFTConfig(n_frequency=1000, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "WAVEFT"

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    bias: str = "none"
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)
    proportional_parameters: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_counts(self, "n_frequency")
        check_seed(self)
        if self.wavelet_family not in FAMILIES:
            near = nearest(str(self.wavelet_family), FAMILIES)
            raise ConfigError(
                f"WaveFTConfig.wavelet_family={self.wavelet_family!r} is not one of db1 to db38, sym2 to sym20 and "
                f"coif1 to coif17; nearest are {', '.join(near) or 'none'}"
            )
        if self.use_idwt:
            load_wavelet(self.wavelet_family)
        if self.use_idwt and self.wavelet_family == "coif4":
            warnings.warn(
                "wavelet_family='coif4': PEFT 0.21.2 has wrong filters for it, so that an adapter it trained computes "
                "something else here, and the other way round; coif3 and sym10, say, are the same in both.",
                AdaptcWarning,
                stacklevel=3,
            )

    def pattern_entries(self) -> dict[str, Mapping[str, Any]]:
        return {"n_frequency_pattern": self.n_frequency_pattern or {}}

    def method(self, name: str, kind: str) -> WaveFT:
        own = None if self.proportional_parameters else self.n_frequency_pattern
        return WaveFT(
            r=pattern_value(own, name, self.n_frequency),
            scaling=self.scaling,
            seed=self.random_loc_seed,
            zeros=self.init_weights,
            family=self.wavelet_family,
            taps=load_wavelet(self.wavelet_family).rec_len // 2 if self.use_idwt else 0,
            proportional=self.proportional_parameters,
        )


def load_wavelet(family: str) -> Any:
    """Return PyWavelets' ``Wavelet`` for ``family``; raise ConfigError where PyWavelets is not installed."""
    try:
        pywt: Any = importlib.import_module("pywt")
    except ImportError:
        raise ConfigError(
            "WaveFT takes the filters of its wavelets from PyWavelets, which is not installed: "
            "pip install 'adaptc[wavelets]', or use_idwt=False, which needs no wavelet"
        ) from None
    return pywt.Wavelet(family)


class WaveFTFiles(SpectrumFiles):
    method: WaveFT

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        if not self.method.taps:
            return super().derived(op, W, dtype, found)
        flat_indices, columns = self.method.draw_indices(op), op.matrix_shape[1]
        height, width = self.method.quarter_shape(op)
        # The coefficients form four quarters: low and high frequencies along the rows, times low and high along the
        # columns. PEFT's layout has the upper right and the lower left quarter exchanged.
        row, column = (i + self.method.taps - 1 for i in (flat_indices // columns, flat_indices % columns))
        low, right = row >= height, column >= width
        flat_indices = right * height + row % height
        flat_indices = flat_indices * 2 * width + low * width + column % width
        lo, hi = (torch.tensor(f, dtype=dtype).unflatten(0, (-1, 2)) for f in self.method.wavelet_filters())
        filters = torch.stack([lo, hi], 1).flip(0).transpose(0, 2).contiguous()
        return {self.method.indices_slot: flat_indices.to(W.device), FILTERS: filters.to(W.device)}


class WaveFTSizes(SpectrumSizes):
    method: WaveFT

    def specialized_for(self, op: Op) -> WaveFT:
        return (
            self.method if self.method.proportional else super().specialized_for(op)
        )  # a mean may exceed a small layer, which gets less

    def with_sizes_of(self, op: Op, slots: Slots) -> WaveFT:
        return dataclasses.replace(super().with_sizes_of(op, slots), proportional=False)


class WaveFTSharing(SharedSlots):
    method: WaveFT

    def settle_shared_sizes(self, sites: Sequence[tuple[Method, Op]]) -> list[Method]:
        sizes = [prod(op.matrix_shape) for _, op in sites]

        def share(m: Any, op: Op, size: int) -> Method:
            if not m.proportional:
                return m
            r = max(1, round(size / sum(sizes) * (m.r * len(sizes))))
            return dataclasses.replace(m, r=r, proportional=False).sizes.specialized_for(op)

        return [share(m, op, size) for (m, op), size in zip(sites, sizes, strict=True)]


@dataclass(frozen=True)
class WaveFT(SparseSpectrumMethod):
    """WaveFT at one site. ``taps``: half the length of the filters, on which the code depends; 0 without a wavelet.

    ``proportional``: ``r`` is still the mean over all layers, until :meth:`WaveFTSharing.settle_shared_sizes` gives
    each its share.
    """

    name: ClassVar[str] = "waveft"
    takes_complex: ClassVar[bool] = False
    slot_prefix: ClassVar[str] = "waveft"
    swappable: ClassVar[frozenset[str]] = SparseSpectrumMethod.swappable | {"family", "proportional"}
    files = WaveFTFiles(names=("waveft_spectrum",))
    sizes = WaveFTSizes()
    sharing = WaveFTSharing()

    family: str = "db1"
    taps: int = 1
    proportional: bool = False

    def slots(self, op: Op) -> dict[str, Slot]:
        slots = super().slots(op)
        if self.taps:  # axes: even or odd entries of the result; low or high frequencies; taps
            slots[FILTERS] = Slot((2, 2, self.taps), trainable=False, saved=False)
        return slots

    def initial_values(self, generator: torch.Generator | None) -> Tensor:
        return torch.zeros(self.r) if self.zeros else torch.randn(self.r, generator=generator) * 0.01

    def wavelet_filters(self) -> tuple[Sequence[float], Sequence[float]]:
        w = load_wavelet(self.family)
        return w.rec_lo, w.rec_hi

    def quarter_shape(self, op: Op) -> tuple[int, int]:
        """Return the rows and columns of one quarter of the coefficients, padded for the filters at the edges."""
        rows, columns = op.matrix_shape
        return (rows + 1) // 2 + self.taps - 1, (columns + 1) // 2 + self.taps - 1

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        wide = float32_or_wider(W, slots[self.spectrum_slot])
        values = cast(slots[self.spectrum_slot], wide) * cast(scale, wide)
        rows, columns = op.matrix_shape
        if not self.taps:
            return cast(W + op.unmatrix(scatter_dense((rows, columns), slots[self.indices_slot], values)), W.dtype)
        height, width = self.quarter_shape(op)
        change = scatter_dense((2 * height, 2 * width), slots[self.indices_slot], values)
        for _ in range(2):  # along the columns, then along the rows
            change = _inverse_wavelet(change, cast(slots[FILTERS], wide)).t()
        return cast(W + op.unmatrix(change[:rows, :columns]), W.dtype)


def _inverse_wavelet(rows: Tensor, filters: Tensor) -> Tensor:
    """Return the inverse wavelet transform of each row of ``rows`` (n, 2 half): (n, 2 (half - taps + 1)).

    A row holds the coefficients of low frequencies and then those of high ones. ``filters``: (2, 2, taps).
    """
    return F.conv1d(rows.unflatten(1, (2, -1)), filters).transpose(1, 2).flatten(1)
