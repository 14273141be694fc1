"""Whole programs on interpreted kernels: every code of one, and files of lowered programs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import adaptc
from adaptc import LoraConfig
from adaptc.api.merge_and_lower import insert_kernels
from tests.support.sibling_nets import LAYERS, adapter, block, random_rows


def program(dora: bool) -> adaptc.AdaptedProgram:
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=list(LAYERS), init_lora_weights=False, use_dora=dora, inference_mode=True
    )
    torch.manual_seed(2)
    x = random_rows(4, torch.float32)
    return adaptc.compile(block(torch.float32), config, example_inputs=x, form="apply", fuse=False)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_every_code_of_a_program(dora: bool) -> None:
    p = program(dora)
    expected = [p(random_rows(n, torch.float32)) for n in (2, 9)]
    p.kernels, p.fuse = True, True
    for n, e in zip((2, 9), expected, strict=True):
        close(p(random_rows(n, torch.float32)), e)
    assert set(p.executor().variants.trails) == ({"plain", "packed"} if dora else {"packed"})


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_file_of_a_lowered_program(dora: bool, tmp_path: Path) -> None:
    p = program(dora)
    adaptc.save(insert_kernels(p), tmp_path / "low.pt2")
    loaded = adaptc.load(tmp_path / "low.pt2")
    close(loaded(random_rows(2, torch.float32)), p(random_rows(2, torch.float32)))
    if not dora:
        state = {k: v.float() for k, v in adapter(5, 1).items()}
        for q in (p, loaded):
            adaptc.swap(q, state)
        close(loaded(random_rows(2, torch.float32)), p(random_rows(2, torch.float32)))
    assert torch.equal(
        adaptc.merge(loaded)(random_rows(2, torch.float32)), adaptc.merge(p)(random_rows(2, torch.float32))
    )
