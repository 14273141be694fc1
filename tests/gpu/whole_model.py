"""A whole model's forward pass: transformers, PEFT, PEFT compiled, and adaptc with both backends, with one adapter.

Times are of the wall clock around a call and the wait for it, since a small model's decoding is the launches' time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import adaptc
from tests.benchmarks.harness import Row, interleave
from tests.benchmarks.model import RANK
from tests.gpu.suite import Compile
from tests.gpu.tiny import peft_model, tokens

BASE = "transformers base"
#: what outputs may differ by, relative to their norm
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def run(
    model: nn.Module, device: torch.device, dtype: torch.dtype, works: Mapping[str, tuple[int, int]],
    rounds: int, compiled: Compile,
) -> list[Row]:  # fmt: skip
    """``check_works``: name -> rows and length of the input. Raises AssertionError where outputs differ."""
    base: Any = model.to(device, dtype)
    vocabulary = int(base.config.vocab_size)
    # All of it in the base's type. By default PEFT, and adaptc as PEFT, would keep the adapter in float32.
    options = {"autocast_adapter_dtype": False}
    with tempfile.TemporaryDirectory() as folder:
        theirs = peft_model(base, RANK, folder, **options)
        ours = {b: adaptc.compile(base, folder, backend=b, **options) for b in ("eager", "inductor")}
    for p in theirs.parameters():
        p.requires_grad_(False)
    candidates: dict[str, Callable[..., Any]] = {
        BASE: base,
        "PEFT": theirs,
        "PEFT, compiled": compiled(theirs),
        "adaptc, eager": ours["eager"],
        "adaptc, inductor": ours["inductor"],
    }
    rows: list[Row] = []
    for work, shape in works.items():
        inputs = tokens(*shape, device, vocabulary)
        check(candidates, inputs, ALLOWED[dtype])
        calls = {name: synchronized(call, inputs, device) for name, call in candidates.items()}
        rows += interleave(work, calls, BASE, rounds)
    return rows


def check(candidates: Mapping[str, Callable[..., Any]], inputs: dict[str, Tensor], allowed: float) -> None:
    """All but the base compute the same, or their times mean nothing."""
    with torch.no_grad():
        logits = {name: call(**inputs).logits.double() for name, call in candidates.items() if name != BASE}
    expected = logits["PEFT"]
    for name, found in logits.items():
        apart = float((found - expected).norm() / expected.norm())
        # Not `apart > allowed`, which a NaN is not.
        if not apart <= allowed:
            raise AssertionError(f"{name}: logits differ from PEFT's by {apart:.1e} of their norm")


def synchronized(call: Callable[..., Any], inputs: dict[str, Tensor], device: torch.device) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            call(**inputs)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run
