"""Packages of programs on quantised weights: of one adapter, of a bank, and of a generator."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import adaptc
from adaptc import LoraConfig

pytestmark = pytest.mark.long
CONFIG = LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False)
#: relative to the largest value, for an 8-bit mantissa that is read more than once
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
#: each way in which compiled layers read their weights, and the plain one
CASES = [
    ("int8", torch.bfloat16),
    ("int8", torch.float32),
    ("int8_dynamic", torch.float32),
    ("int4", torch.bfloat16),
    ("int4", torch.float32),
    ("nf4", torch.float32),
]


class Net(nn.Module):
    """Two quantised layers, and a plain one of an odd size behind them."""

    def __init__(self, scheme: str, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down, self.head = nn.Linear(64, 96), nn.Linear(96, 64, bias=False), nn.Linear(64, 7)
        self.to(dtype)
        adaptc.quantize(self, scheme, exclude=["head"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.tanh(self.up(x))))


@cache
def program(scheme: str, dtype: torch.dtype) -> adaptc.AdaptedProgram:
    torch.manual_seed(5)
    return adaptc.compile(Net(scheme, dtype), CONFIG, example_inputs=torch.randn(3, 64, dtype=dtype))


def inputs(rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).to(dtype)


def check(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error < TOLERANCE[dtype], error


def other_adapter(prog: adaptc.AdaptedProgram, rank: int, folder: Path) -> Path:
    torch.manual_seed(rank)
    fresh = adaptc.compile(Net("int8", torch.float32), CONFIG.replace(r=rank), example_inputs=torch.randn(3, 64))
    return adaptc.save_adapter(fresh, folder)


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize(("scheme", "dtype"), CASES, ids=str)
def test_one_adapter(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Few rows and many, another adapter of another rank, one that is bound, and the base."""
    prog = program(scheme, dtype)
    package = adaptc.load_package(adaptc.package(prog, tmp_path / "one.pt2", max_rank=5))
    other = other_adapter(prog, 5, tmp_path / "other")
    bound, here = package.bind(other), prog.bind(str(other))
    for rows in (1, 3, 4, 5, 8, 9, 37, 300):
        x = inputs(rows, dtype)
        check(package(x), prog(x), dtype)
        check(bound(x), here(x), dtype)
        check(package.base(x), prog.base(x), dtype)
    assert float((bound(x) - package(x)).abs().max()) > 0.05  # the two adapters differ
    package.swap(other)
    check(package(x), here(x), dtype)


@pytest.mark.long
@pytest.mark.parametrize(("scheme", "dtype"), [CASES[0], CASES[2], CASES[5]], ids=str)
def test_a_bank(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    prog = program(scheme, dtype)
    other = other_adapter(prog, 4, tmp_path / "other")
    bank = prog.bank({"own": prog.binding, "other": str(other)})
    package = adaptc.load_package(adaptc.package(bank, tmp_path / "bank.pt2", capacity=3, max_rank=4))
    for rows in (3, 11):
        x, names = inputs(rows, dtype), (["own", "other", None] * 4)[:rows]
        check(package(x, adapters=names), bank(x, adapters=names), dtype)
    package.add("third", prog.bind(str(other), scale=0.5).binding)
    check(package(x, adapters=["third"] * 11), prog.bind(str(other), scale=0.5)(x), dtype)


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_generator(scheme: str, tmp_path: Path) -> None:
    """A prompt is many rows, and each further token is one."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, pad_token_id=0, eos_token_id=None)
    model = adaptc.quantize(transformers.LlamaForCausalLM(config).eval(), scheme)
    adapter = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    gen = adaptc.compile_for_generation(model, adapter, max_batch=2, max_length=64)
    package = adaptc.load_package(adaptc.package(gen, tmp_path / "gen.pt2"))
    ids = torch.randint(1, 61, (2, 13))
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "no_repeat_ngram_size": 1}
    assert torch.equal(package.generate(ids, **options), gen.generate(ids, **options))


@pytest.mark.long
def test_plain_products_dequantise(tmp_path: Path) -> None:
    """In bfloat16 the kernel for 8 bits rounds scales, and the plain way does not."""
    prog, x = program("int8", torch.bfloat16), inputs(3, torch.bfloat16)
    package = adaptc.load_package(adaptc.package(prog, tmp_path / "plain.pt2", products="plain"))
    check(package(x), prog(x), torch.bfloat16)
    code = (tmp_path / "plain.pt2").read_bytes()
    assert b"_weight_int8pack_mm" not in code
    measured = adaptc.package(prog, tmp_path / "measured.pt2").read_bytes()
    assert b"_weight_int8pack_mm" in measured
