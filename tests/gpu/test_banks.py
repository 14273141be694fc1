"""A bank's rows on the GPU by grouped kernels: the operator against float64, and programs beside plain operators."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.cases import DEVICE, TYPES, type_name
from tests.kernels.grouped_rows_cases import bank_of, check, check_bank, make_case

MIXES: dict[str, tuple[list[int], list[dict[int, float]], tuple[int, ...]]] = {
    "one row": ([7], [{0: 1.0}], (1,)),
    "decoding": ([16, 3, 64], [{2: 1.0}, {}, {0: 1.0}, {0: 1.0}, {1: 1.0}], (1, 1)),
    "mixes": ([33, 8, 0, 127], [{0: 0.5, 3: -2.0}, {1: 1.0}, {}, {2: 1.0, 1: 0.25}, {3: 1.0}], (13,)),
    "long rows": ([4, 64, 16], [{i % 3: 1.0} if i % 4 else {} for i in range(9)], (131,)),
    "no adapter": ([8], [{}, {}], (5,)),
}


@pytest.mark.usefixtures("nan_where_nothing_was_written")
@pytest.mark.parametrize("mixes", MIXES)
@pytest.mark.parametrize("types", TYPES, ids=type_name)
def test_operator(mixes, types) -> None:
    ranks, rows, each = MIXES[mixes]
    case = make_case(ranks, rows, each, 257, 131, *types, device=DEVICE)
    check(case)
    assert torch.equal(case.run(), case.run())


def test_banks_take_kernels_by_themselves(tmp_path: Path) -> None:
    check_bank(*bank_of(tmp_path, DEVICE, None if DEVICE.type == "cuda" else True), DEVICE)
