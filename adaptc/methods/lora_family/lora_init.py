"""Make the initial A and B of LoRA and, for schemes that move a part of the weight into them, the rest of the weight.

With ``generator=None`` the global generator is read in the same order as in PEFT 0.21.2, so that one seed gives the
same adapter in both. The schemes in :data:`DATA_SCHEMES` start as True does, until they have data.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from adaptc.errors import ConfigError
from adaptc.global_generator import global_generator_of
from adaptc.methods.lora_family.loftq import LoftQConfig, loftq_init

#: schemes whose values are made of data by ``adaptc.methods.initialize_from_data``
DATA_SCHEMES = ("corda", "eva", "lora_ga")
SCHEMES = (True, False, "gaussian", "orthogonal", "pissa", "olora", "loftq", "mica", *DATA_SCHEMES)

_NITER = re.compile(r"pissa_niter_([0-9]{1,4})")


@torch.no_grad()
def init_lora(
    scheme: bool | str,
    W: Tensor,
    r: int,
    scale: float,
    *,
    kind: str,
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator | None,
    loftq: LoftQConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (A, B, new W or None) for ``init_lora_weights=scheme``, on the device of ``W``.

    ``W``: (out, in), embeddings (width, vocabulary), convolutions (out, in/groups, *kernel); any float dtype, never
    modified. A and B have the given shapes and ``dtype``; new W has the shape and dtype of ``W``. Except
    for "loftq", W = new W + scale B A up to the rounding of new W.

    True (Hu et al. 2021, arXiv 2106.09685), "gaussian" (std 1/r): B A = 0. False: the defaults of the layers.
    "orthogonal": B A = 0 with neither zero. "pissa" (Meng et al. 2024, arXiv 2404.02948): the r largest singular terms
    of W; "pissa_niter_N" finds them by N subspace iterations. "olora" (Büyükakyüz 2024, arXiv 2406.01775): the first r
    terms of W = QR. "loftq": new W is a QuantizedTensor, and scale B A are the largest singular terms of what it lacks;
    ``loftq`` has its options, by default those of LoftQConfig. "mica" (arXiv 2604.01694): B A = 0, and B is the r left
    singular vectors of W with the smallest singular values. Embeddings take True, False, "gaussian" (which means True
    there) and "mica", convolutions the first three. "corda", "eva" and "lora_ga": as True, until they have data.

    Raises :class:`ConfigError` for an unknown scheme, a scheme that this kind of layer cannot have, or an unusable r.
    """
    name = scheme.lower() if isinstance(scheme, str) else scheme
    niter = _NITER.fullmatch(name) if isinstance(name, str) else None
    if not (isinstance(name, bool) or (isinstance(name, str) and name in SCHEMES) or niter):
        listed = ", ".join(repr(s) for s in (*SCHEMES, "pissa_niter_[number of iterations, up to 9999]"))
        raise ConfigError(f"init_lora_weights={scheme!r} is not a known scheme; known are {listed}")
    if r < 1:
        raise ConfigError(f"r must be at least 1, found {r}")
    is_embedding, decomposes_weight = kind == "embedding", not isinstance(name, bool) and name != "gaussian"
    if decomposes_weight:
        _check_decomposable(scheme, W, r, kind, a_shape, b_shape)

    draw_device = torch.device("cpu") if generator is None else generator.device
    # PEFT draws in the default dtype and casts: drawing in the target dtype would give other numbers.
    A, B = (torch.empty(s, dtype=torch.get_default_dtype(), device=draw_device) for s in (a_shape, b_shape))
    for fresh in (A, B):
        _fill_normal(fresh, 1.0, generator) if is_embedding else _fill_uniform(fresh, generator)
    new_weight = None
    if name == "mica":
        A.zero_()
        B = torch.linalg.svd(_float32_or_wider(W), full_matrices=False).U[:, -r:]
    elif is_embedding and name is not False:
        A.zero_()
        _fill_normal(B, 1.0, generator)
    elif name is True or name in DATA_SCHEMES:
        _fill_uniform(A, generator)
        B.zero_()
    elif name == "gaussian":
        _fill_normal(A, 1.0 / r, generator)
        B.zero_()
    elif name == "orthogonal":
        A, B = _orthogonal_init(r, a_shape[1], b_shape[0], draw_device, generator)
    elif name == "olora":
        Q, R = torch.linalg.qr(_float32_or_wider(W))
        A, B = R[:r], Q[:, :r]
    elif name == "loftq":
        A, B, new_weight = loftq_init(W, r, scale, loftq or LoftQConfig())
    elif decomposes_weight:
        A, B = _pissa_init(W, r, scale, niter and int(niter[1]), generator)
    A, B = (t.to(device=W.device, dtype=dtype).contiguous() for t in (A, B))
    if decomposes_weight and name not in ("orthogonal", "loftq", "mica", *DATA_SCHEMES):
        new_weight = rest_of_weight(W, A, B, scale)
    return A, B, new_weight


@torch.no_grad()
def rest_of_weight(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return W - scale B A in the dtype of ``W``.

    A and B are rounded to their dtype already: with the exact factors, the result + scale B A would not be W.
    """
    wide = _float32_or_wider(W)
    return torch.sub(wide, B.to(wide.dtype) @ A.to(wide.dtype), alpha=scale).to(W.dtype).contiguous()


def _check_decomposable(
    scheme: object, W: Tensor, r: int, kind: str, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
) -> None:
    option = f"init_lora_weights={scheme!r}"
    if (kind == "embedding" and str(scheme).lower() != "mica") or kind.startswith("conv"):
        raise ConfigError(f"{option} has no meaning for a site of kind {kind}; use True, False or 'gaussian'")
    if W.dim() != 2 or a_shape != (r, W.shape[1]) or b_shape != (W.shape[0], r):
        raise ConfigError(
            f"{option} needs one weight matrix with factors of shape (r, in) and (out, r); here the {kind} weight is "
            f"{tuple(W.shape)} and, for r={r}, the factors are {a_shape} and {b_shape}; use True, False or 'gaussian'"
        )
    if str(scheme).lower() == "orthogonal":
        if r % 2:
            raise ConfigError(f"{option} needs an even r, found r={r}; use {r + 1} or another scheme")
        return
    if str(scheme).lower() == "lora_ga" and 2 * r > min(W.shape):
        raise ConfigError(
            f"{option} takes 2 r singular terms of the gradient, so r={r} is too large for a weight of shape "
            f"{tuple(W.shape)}; the largest possible r is {min(W.shape) // 2} (rank_pattern can lower it for this site)"
        )
    if r > min(W.shape):
        raise ConfigError(
            f"{option} takes r singular terms or columns of the weight, so r={r} is too large for a weight of shape "
            f"{tuple(W.shape)}; the largest possible r is {min(W.shape)} (rank_pattern can lower it for this site)"
        )
    if not W.is_meta and not bool(torch.isfinite(W).all()):
        raise ConfigError(f"{option} decomposes the weight, but the weight of shape {tuple(W.shape)} is not finite")


def _float32_or_wider(W: Tensor) -> Tensor:
    return W.detach() if W.dtype == torch.float64 else W.detach().to(torch.float32)


def _fill_uniform(t: Tensor, generator: torch.Generator | None) -> None:
    nn.init.kaiming_uniform_(t, a=math.sqrt(5), generator=generator)


def _fill_normal(t: Tensor, std: float, generator: torch.Generator | None) -> None:
    nn.init.normal_(t, std=std, generator=generator)


def _orthogonal_init(
    r: int, n_in: int, n_out: int, device: torch.device, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return A and B with B A = 0: the two halves of one orthonormal basis span the columns of A and the rows of B."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    basis = torch.linalg.qr(draw(r, r)).Q
    A = (draw(n_in, r // 2) @ basis[0::2]).T / 10
    B = draw(r // 2, n_out).T @ basis[1::2] / 10
    return A, B


def _pissa_init(
    W: Tensor, r: int, scale: float, niter: int | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    if scale <= 0:
        raise ConfigError(f"init_lora_weights='pissa' divides by the scale, found {scale}: lora_alpha must be positive")
    if niter is None:
        U, S, Vh = torch.linalg.svd(_float32_or_wider(W), full_matrices=False)
    else:
        with global_generator_of(generator, W.device):  # which svd_lowrank reads, and nothing else
            U, S, V = torch.svd_lowrank(_float32_or_wider(W), q=r, niter=niter)
        Vh = V.T
    root = (S[:r] / scale).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root
