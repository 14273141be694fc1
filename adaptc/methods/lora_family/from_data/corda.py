"""CorDA: first A and B of W C, where C is the covariance of the layer's inputs (Yang et al., arXiv 2406.05223).

W C = U S V^T. From r of these terms A = sqrt(S / s) V^T C^-1 and B = U sqrt(S / s), and W loses s B A. The mode "ipm"
takes the largest terms, which the data uses most. "kpm" takes the smallest ones, and leaves the others untouched in W.

C is the mean of X^T X over samples, where each X is divided by the absolute value of its largest entry. Its diagonal
gets 0.01 of its mean, and twice as much again until the inverse is good.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adaptc.errors import AdaptcError, ConfigError
from adaptc.methods.lora_family.from_data.data_options import DataOptions

#: the part of the mean diagonal that is added to the diagonal, and the largest error of the inverse
DAMPING, MAX_INVERSE_ERROR = 0.01, 0.05
#: how often the damping is doubled at most; it is a million times the mean diagonal by then
MAX_DOUBLINGS = 26


@dataclass
class CordaConfig(DataOptions):
    """PEFT's ``CordaConfig``: same names, same defaults, for ``LoraConfig(init_lora_weights="corda")``.

    Raises ConfigError for values without a meaning.

    Attributes:
        cache_file: a file for U, S and V of every layer. It is read where it exists, and written otherwise.
        covariance_file: a file for the covariances, which serve adapters of any rank. It is read where it exists, and
            written otherwise.
        corda_method: "ipm" adapts the directions that the data uses most, "kpm" those that it uses least.
        verbose: whether a terminal shows the progress from the start.
        use_float16_for_covariance: whether covariances have the dtype of the inputs, and not float32 or wider.
        prune_temporary_fields: True alone, since nothing is kept at the layers here.

    Example:
        >>> options = adaptc.CordaConfig(corda_method="kpm")
        >>> config = adaptc.LoraConfig(init_lora_weights="corda", corda_config=options)
    """

    scheme: ClassVar[str] = "corda"
    option: ClassVar[str] = "corda_config"

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prune_temporary_fields:
            raise ConfigError(
                "CordaConfig.prune_temporary_fields=False would keep tensors at the layers of a model, which a program "
                "does not have; covariance_file keeps them in a file"
            )


class Covariance:
    """The covariance of what one input of layers is, summed up sample by sample.

    ``matrix``: (in, in), None before the first sample. ``samples`` and ``rows`` count what it was made of.
    """

    def __init__(self, narrow: bool) -> None:
        """``narrow``: whether the matrix has the dtype of the inputs."""
        self._narrow, self.matrix, self.samples, self.rows = narrow, None, 0, 0

    def add(self, x: Tensor) -> None:
        """Add an input (..., rows, in): each of the matrices (rows, in) in it is one sample.

        Raises AdaptcError where it is not finite, or has no largest value to divide by.
        """
        x = x if self._narrow or x.dtype == torch.float64 else x.float()
        for sample in x.reshape(-1, *x.shape[-2:]) if x.ndim > 2 else [x.reshape(-1, x.shape[-1])]:
            sample = sample / sample.max().abs()
            product = sample.mT @ sample
            if not bool(product.isfinite().all()):
                raise AdaptcError("its input has NaN or infinite values, or a sample of it has the largest value zero")
            self.matrix = product if self.matrix is None else self.matrix.add_(product)
            self.samples, self.rows = self.samples + 1, self.rows + sample.shape[0]

    def mean(self) -> Tensor:
        """Return the mean over samples."""
        assert self.matrix is not None
        return self.matrix / self.samples


def corda_terms(W: Tensor, covariance: Tensor, r: int, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return S (r,), U (out, r) and V (in, r) for ``W`` (out, in): W = U S V^T up to the terms that are left out.

    Raises AdaptcError where the covariance has no inverse.
    """
    wide = W.detach() if W.dtype == torch.float64 else W.detach().float()
    damped, inverse = _damped_inverse(covariance.to(wide))
    U, S, Vh = torch.linalg.svd(wide @ damped, full_matrices=False)
    V = (Vh @ inverse).mT
    kept = slice(None, r) if mode == "ipm" else slice(S.shape[0] - r, None)
    return S[kept], U[:, kept], V[:, kept]


def corda_factors(S: Tensor, U: Tensor, V: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r), which the scale makes U S V^T."""
    root = (S / scale).sqrt()
    return root[:, None] * V.mT, U * root


def _damped_inverse(covariance: Tensor) -> tuple[Tensor, Tensor]:
    identity = torch.eye(covariance.shape[0], dtype=covariance.dtype, device=covariance.device)
    damping = DAMPING * covariance.diagonal().mean()
    for _ in range(MAX_DOUBLINGS):
        damped = covariance + damping * identity
        inverse, failed = torch.linalg.inv_ex(damped)
        if not bool(failed) and float(torch.dist(damped @ inverse, identity)) < MAX_INVERSE_ERROR:
            return damped, inverse
        damping = damping * 2
    raise AdaptcError("the covariance of its input has no inverse; are all of its inputs zero?")
