"""adaptc's compiled backends next to the compiled base and compiled PEFT, and what a call itself costs.

The baseline of the compiled rows is the captured base through inductor with plain products, those that nobody chose.
torch.compile of the transformers model, and of PEFT's, stand beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import adaptc
from tests.benchmarks.against_peft import Sides
from tests.benchmarks.harness import Row, interleave
from tests.benchmarks.model import tokens
from tests.benchmarks.products import plain_products

WORKS = (("decode 1x1", (1, 1)), ("prefill 1x128", (1, 128)))


def forward(sides: Sides, folder: Path, rounds: int) -> list[Row]:
    """Every size is a size of one compiled graph."""
    program, base = sides.program, adaptc.unload(sides.program)
    adaptc.save(program, folder / "program.pt2")
    adaptc.save(base, folder / "base.pt2")
    with plain_products(), torch.no_grad():
        plain_base, plain = (adaptc.load(folder / f"{n}.pt2", backend="inductor") for n in ("base", "program"))
        adaptc.swap(plain, program.binding)
        for p in (plain_base, plain):
            p(**tokens(2, 9))
        base_package = adaptc.load_package(adaptc.package(base, folder / "base_package.pt2"))
    ours = adaptc.load(folder / "program.pt2", backend="inductor")
    adaptc.swap(ours, program.binding)
    packaged = adaptc.load_package(adaptc.package(program, folder / "package.pt2"))
    candidates: dict[str, Callable[..., Any]] = {
        "captured base, inductor, plain products": plain_base,
        "adaptc, inductor, plain products": plain,
        "adaptc, inductor": ours,
        "captured base, AOTInductor, plain products": base_package,
        "adaptc, AOTInductor": packaged,
        "transformers base, torch.compile": torch.compile(sides.base, dynamic=True),
        "PEFT, torch.compile": torch.compile(sides.peft, dynamic=True),
    }
    check(candidates, sides)
    rows: list[Row] = []
    for work, shape in WORKS:
        inputs = tokens(*shape)
        calls = {name: without_gradients(call, inputs) for name, call in candidates.items()}
        rows += interleave(f"{work}, compiled", calls, "captured base, inductor, plain products", rounds)
    return rows


def check(candidates: dict[str, Callable[..., Any]], sides: Sides) -> None:
    """All compute what they are to compute, or their times mean nothing."""
    inputs = tokens(2, 9)
    with torch.no_grad():
        expected = {True: sides.base(**inputs).logits, False: sides.peft(**inputs).logits}
        for name, call in candidates.items():
            torch.testing.assert_close(call(**inputs).logits, expected["base" in name], rtol=1e-3, atol=1e-3)


def without_gradients(call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            call(**inputs)

    return run


def call_path(sides: Sides, rounds: int) -> list[Row]:
    """What the runtime itself adds to a call: a program of 420 slots whose graph does nothing."""
    program, inputs = sides.program, tokens(1, 1)
    with torch.no_grad():
        program(**inputs)
        codes = program.executor().variants
        variants, kept = dict(codes._variants), {}
        flat = program.executor().inputs((), inputs)
        for kind, variant in variants.items():
            prefix = program.call_state.arguments.inputs_for(kind)  # type: ignore[union-attr]
            out = variant.call(*prefix.values(), *flat)
            kept[kind] = variant.call
            object.__setattr__(variant, "call", lambda *_, out=out: out)
        slots = sum(len(a.slots) for a in program.adaptation.attachments)
        try:
            run = without_gradients(program, inputs)
            return interleave(f"a call with {slots} slots and no work", {"adaptc": run}, "adaptc", rounds * 20, 20)
        finally:
            for kind, variant in variants.items():
                object.__setattr__(variant, "call", kept[kind])
