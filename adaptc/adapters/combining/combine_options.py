"""Define the options by which adapters are combined, and check them before anything is computed.

They are PEFT's combination types and their options. A type is a rule for sums, and the place where it is applied. It
acts on the two factors of each adapter, or on their matmul. In the second case the result is cut to a rank by a
singular value decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch

from adaptc.errors import ConfigError, did_you_mean, short_repr
from adaptc.value_types import is_finite_in_float32

#: rules -> (which entries are dropped first, whether signs are elected)
SUM_RULES: dict[str, tuple[str, bool]] = {
    "linear": ("", False),
    "magnitude_prune": ("smallest", False),
    "ties": ("smallest", True),
    "dare_linear": ("random", False),
    "dare_ties": ("random", True),
}
METHODS = ("svd", "cat", *SUM_RULES, *(f"{rule}_svd" for rule in SUM_RULES if rule != "linear"))
SIGN_METHODS = ("total", "frequency")
SVD_DRIVERS = ("gesvd", "gesvdj", "gesvda")


@dataclass(frozen=True)
class CombineOptions:
    """The options of ``adaptc.combine``, under PEFT's names.

    ``method`` None means the method that suits the adapters.
    """

    method: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = False
    svd_driver: str | None = None
    generator: torch.Generator | None = None

    @property
    def rule(self) -> str:
        """Return the rule of the sums, a key of :data:`SUM_RULES`."""
        assert self.method is not None
        return "linear" if self.method in ("svd", "cat") else self.method.removesuffix("_svd")

    @property
    def is_dense(self) -> bool:
        """Return whether the rule is applied to the changes of the weights, and not to their factors."""
        assert self.method is not None
        return self.method.endswith("svd")

    @property
    def pruning(self) -> str:
        return SUM_RULES[self.rule][0]

    @property
    def elects_signs(self) -> bool:
        return SUM_RULES[self.rule][1]

    def resolve(self, default: str) -> CombineOptions:
        """Return these options with the method filled in, checked. Raises ConfigError for options that do not go
        together."""
        new = replace(self, method=default if self.method is None else self.method)
        if new.method not in METHODS:
            near = did_you_mean(str(new.method), METHODS)
            raise ConfigError(f"method={short_repr(self.method)} is not one of {', '.join(METHODS)}{near}")
        new.check_density()
        for name in ("svd_rank", "svd_clamp", "svd_driver"):
            if getattr(self, name) is not None and not new.is_dense:
                raise ConfigError(
                    f"{name} is for the methods that decompose the sum (svd, ties_svd, ...), and the method is "
                    f"{new.method!r}: leave it out"
                )
        if self.svd_full_matrices and not new.is_dense:
            raise ConfigError(f"svd_full_matrices is for the methods that end in svd, and the method is {new.method!r}")
        if self.svd_rank is not None and self.svd_rank < 1:
            raise ConfigError(f"svd_rank={self.svd_rank} leaves nothing of the adapters; it must be at least 1")
        if self.svd_clamp is not None and not 0 < self.svd_clamp <= 1:
            raise ConfigError(f"svd_clamp={self.svd_clamp} is a quantile, above 0 and at most 1 (usually close to 1)")
        if self.svd_driver is not None and self.svd_driver not in SVD_DRIVERS:
            raise ConfigError(f"svd_driver={short_repr(self.svd_driver)} is not one of {', '.join(SVD_DRIVERS)}")
        if self.majority_sign_method not in SIGN_METHODS:
            raise ConfigError(
                f"majority_sign_method={short_repr(self.majority_sign_method)} is not one of {', '.join(SIGN_METHODS)}"
            )
        if self.majority_sign_method != "total" and not new.elects_signs:
            raise ConfigError(f"majority_sign_method is for ties and dare_ties, and the method is {new.method!r}")
        if self.generator is not None and new.pruning != "random":
            raise ConfigError(f"a generator is for the dare methods, which draw, and the method is {new.method!r}")
        return new

    def check_density(self) -> None:
        """Raise ConfigError where ``density`` is missing, out of range, or not an option of the method, which must be
        known."""
        if not self.pruning:
            if self.density is not None:
                raise ConfigError(
                    f"density={self.density} is the part of the entries that ties, dare and magnitude_prune keep, and "
                    f"the method is {self.method!r}, which keeps all: leave it out"
                )
        elif self.density is None:
            raise ConfigError(
                f"method={self.method!r} needs density, the part of the entries it keeps, above 0 and at most 1, such "
                "as density=0.2"
            )
        elif not 0 < self.density <= 1:
            raise ConfigError(f"density={self.density} must be above 0, or nothing is kept, and at most 1")


def parse_weight(value: Any, source: str) -> float:
    """Return a weight as a float. Raises ConfigError where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(f"the weight of {source} must be a number, got {short_repr(value)}")
    if not is_finite_in_float32(value):
        raise ConfigError(f"the weight of {source} is {short_repr(value)}; it must be finite")
    return float(value)
