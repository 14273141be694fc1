"""Quantise a weight and make the first A and B of LoRA of the error (LoftQ, Li et al., arXiv 2310.08659).

W is approximated by Q + s B A, where Q is stored in few bits. Two steps alternate: Q is W - s B A quantised, and s B A
are the r largest singular terms of W - Q. Four bits are NF4 in blocks of 64, as bitsandbytes stores them without
quantised scales. Eight bits are int8 with a scale for each row of the weight in float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.errors import ConfigError
from adaptc.methods._shared.option_checks import OptionGroup
from adaptc.passes.quantized.integer_scheme import IntegerScheme
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.passes.quantized.scheme import Scheme
from adaptc.passes.quantized.table_scheme import TableScheme
from adaptc.torch_typing import reduced_svd

#: loftq_bits -> how Q is stored
LOFTQ_SCHEMES: Mapping[int, Scheme] = {4: TableScheme("nf4", 64), 8: IntegerScheme()}


@dataclass
class LoftQConfig(OptionGroup):
    """PEFT's ``LoftQConfig``: same names, same defaults, for ``LoraConfig(init_lora_weights="loftq")``.

    Raises ConfigError for values without a meaning.

    Attributes:
        loftq_bits: 4, which is NF4, or 8. PEFT has these two as well.
        loftq_iter: how often the weight is quantised. More than once moves a part of the error into A and B.

    Example:
        >>> config = adaptc.LoftQConfig(loftq_bits=4, loftq_iter=5)
        >>> lora = adaptc.LoraConfig(init_lora_weights="loftq", loftq_config=config)
    """

    option: ClassVar[str] = "loftq_config"

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loftq_bits not in LOFTQ_SCHEMES:
            known = " and ".join(map(str, LOFTQ_SCHEMES))
            raise ConfigError(f"LoftQConfig.loftq_bits={self.loftq_bits} has no quantiser: there are {known} bits")
        if self.loftq_iter < 1:
            raise ConfigError(f"LoftQConfig.loftq_iter must be a positive integer, got {self.loftq_iter}")


def loftq_init(W: Tensor, r: int, scale: float, config: LoftQConfig) -> tuple[Tensor, Tensor, QuantizedTensor]:
    """Return A (r, in) and B (out, r), float32, and the weight ``W`` (out, in) as it is stored in few bits.

    Raises ConfigError for a scale that is not positive, and for a weight that cannot be quantised.
    """
    if scale <= 0:
        raise ConfigError(f"init_lora_weights='loftq' divides by the scale, found {scale}: lora_alpha must be positive")
    exact, scheme = W.detach().float(), LOFTQ_SCHEMES[config.loftq_bits]
    to_store = exact
    for step in range(1, config.loftq_iter + 1):
        if config.loftq_bits == 8:
            to_store = to_store.half()
        stored = QuantizedTensor.quantize(to_store, scheme)
        U, S, Vh = reduced_svd(exact - stored.dequantize(torch.float32))
        # PEFT leaves the scale out, so that with another one than 1 its product misses the error.
        root = (S[:r] / scale).sqrt()
        A, B = root[:, None] * Vh[:r], U[:, :r] * root
        if step == config.loftq_iter:
            return A, B, stored.with_stored(lambda t: t, W.dtype)
        to_store = exact - scale * (B @ A)
    raise AssertionError("loftq_iter is positive")
