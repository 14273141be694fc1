"""How many kernels Triton compiles for sequences of ranks and batches: one, or one per bucket of sizes.

Triton's own binder tells one kernel from another (``tests/support/fake_gpu.py``). test_packed_lora has packed layers.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from adaptc.kernels.dora_linear import dora_epilogue, dora_norm
from adaptc.kernels.grouped_lora import grouped_lora
from adaptc.kernels.lora_epilogue import lora_down
from tests.kernels.matrices import matrix
from tests.support.fake_gpu import fake_gpu

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
RANKS = (1, 3, 8, 16, 17, 32, 64, 100)
BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("adapter", [BF16, F32])
def test_an_adapter_of_dora(adapter: torch.dtype) -> None:
    W, g, s = matrix(96, 64, BF16), torch.ones(96), torch.tensor(0.5)
    with fake_gpu() as compiled:
        for rank in RANKS:
            A, B = matrix(rank, 64, adapter), matrix(96, rank, adapter)
            dora_norm(W, A, B, s)
            for rows in (1, 16, 17, 600):
                h = lora_down(matrix(rows, 64, BF16), A)
                dora_epilogue(matrix(rows, 96, BF16), h, B, g, s)
        assert Counter(k.name for k in compiled) == {"_squares_kernel": 1, "_down_kernel": 1, "_epilogue_kernel": 1}


@pytest.mark.parametrize("bank", [BF16, F32])
def test_adapters_of_a_bank(bank: torch.dtype) -> None:
    """Ranks up to 16 are a bucket, and those above; so are up to 512 rows, and up to 2048."""
    with fake_gpu() as compiled:
        for count in (1, 2, 16):
            for rank in RANKS:
                A, B = matrix(count * rank, 64, bank), matrix(count * rank, 96, bank)
                starts = torch.arange(count + 1, dtype=torch.int32) * rank
                for rows in (1, 16, 17, 600):
                    x, y, index = matrix(rows, 64, BF16), matrix(rows, 96, BF16), torch.zeros(rows, dtype=torch.int64)
                    grouped_lora(x, y, A, B, starts, torch.ones(count), index, max_rank=rank)
        assert Counter(k.name for k in compiled) == {"_shrink_kernel": 2 * 2, "_expand_kernel": 2}
