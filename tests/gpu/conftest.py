"""Refuses to run where there is no GPU, and makes torch's own products as exact as the bounds of the tests take them.

``ADAPTC_GPU_TESTS_ON=cpu`` runs the tests on the CPU instead, where the ops compute their references (or, slowly, their
kernels, with ``TRITON_INTERPRET=1`` and ``-p tests.kernels.conftest``): a check of the tests, not of a GPU's results.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before CUDA starts: without it cuBLAS may give other bits to the same inputs.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from tests.gpu.cases import DEVICE


def pytest_configure() -> None:
    # No skip: a run that skips everything ends as one that passed.
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(
            "tests/gpu needs a CUDA GPU, and there is none. tests/kernels runs the same kernels on the CPU, in the "
            "interpreter of triton; ADAPTC_GPU_TESTS_ON=cpu checks these tests on their references"
        )


@pytest.fixture(autouse=True, scope="session")
def _products_summed_in_float32() -> None:
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = False
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False


@pytest.fixture
def nan_where_nothing_was_written() -> Iterator[None]:
    """New memory holds NaN, so that what a kernel leaves out shows."""
    # Only warned: which ops of torch are deterministic is not what is asked.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1, device=DEVICE).isnan()
    yield
    torch.use_deterministic_algorithms(False)
