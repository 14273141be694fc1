"""FourierFT: W' = W + s Re(ifft2(S)) with a spectrum S of few entries (Gao et al., arXiv 2405.03003).

Slot ``fourierft_spectrum`` (n,), float. The places of its entries in the spectrum are drawn from ``random_loc_seed``
and are not in files. The spectrum has the shape of the weight as one matrix; the transform runs in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.name_patterns import dotted_pattern_value, matches_dotted_pattern
from adaptc.methods.sparse.sparse import (
    SparseSpectrumMethod,
    SpectrumFiles,
    check_positive_counts,
    check_seed,
    float32_or_wider,
    scatter_dense,
)
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import Scale, Slots


@dataclass
class FourierFTConfig(TargetedConfig):
    """PEFT's ``FourierFTConfig``: same names, same defaults.

    Raises ConfigError for numbers of frequencies that are not positive integers, and for a seed of None.

    Attributes:
        n_frequency: the number of trained frequencies of a layer.
        scaling: the factor on the change.
        random_loc_seed: the seed of the places of the frequencies.
        n_frequency_pattern: name or expression -> the number of frequencies of these modules.
        init_weights: True starts at zeros; False, the default, at a random spectrum, which changes the model.

    Example:
        >>> config = adaptc.FourierFTConfig(n_frequency=1000, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "FOURIERFT"

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int | None = 777
    fan_in_fan_out: bool = False
    bias: str = "none"
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)
    init_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_counts(self, "n_frequency")
        check_seed(self)

    def pattern_entries(self) -> dict[str, Mapping[str, Any]]:
        return {"n_frequency_pattern": self.n_frequency_pattern or {}}

    def pattern_matches(self, key: str, name: str) -> bool:
        return matches_dotted_pattern(key, name)

    def method(self, name: str, kind: str) -> FourierFT:
        assert self.random_loc_seed is not None
        return FourierFT(
            r=dotted_pattern_value(self.n_frequency_pattern, name, self.n_frequency),
            scaling=self.scaling,
            seed=self.random_loc_seed,
            zeros=self.init_weights,
        )


@dataclass(frozen=True)
class FourierFT(SparseSpectrumMethod):
    """FourierFT at one site, with ``r`` entries of the spectrum, a size that adapters choose."""

    name: ClassVar[str] = "fourierft"
    takes_complex: ClassVar[bool] = False
    slot_prefix: ClassVar[str] = "fourierft"
    files = SpectrumFiles(names=("fourierft_spectrum",))

    def initial_values(self, generator: torch.Generator | None) -> Tensor:
        # Drawn even for zeros, as in PEFT: else one seed would give later layers other values than PEFT.
        values = torch.randn(self.r, generator=generator)
        return torch.zeros_like(values) if self.zeros else values

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        wide = float32_or_wider(W, slots[self.spectrum_slot])
        values = cast(slots[self.spectrum_slot], wide) * cast(scale, wide)
        spectrum = scatter_dense(op.matrix_shape, slots[self.indices_slot], values)
        return cast(W + op.unmatrix(torch.fft.ifft2(spectrum).real), W.dtype)
