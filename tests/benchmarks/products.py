"""What choosing the base's products is worth: eager calls with the choice and without, next to the transformers base.

``python -m tests.benchmarks.products`` prints these rows alone, with what was chosen and the load of the machine.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import adaptc
from tests.benchmarks.against_peft import Sides
from tests.benchmarks.harness import Row, interleave, machine, markdown
from tests.benchmarks.model import tokens

SWITCH = "ADAPTC_PRODUCTS"
WORK = (("decode 1x1", tokens(1, 1), 3), ("prefill 1x128", tokens(1, 128), 1))


@contextmanager
def plain_products() -> Iterator[None]:
    """Code that is made inside chooses nothing."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "plain"
    try:
        yield
    finally:
        os.environ.pop(SWITCH)
        if before is not None:
            os.environ[SWITCH] = before


def run(sides: Sides, rounds: int = 15) -> list[Row]:
    """The bases of both programs are there too, so that a faster base hides nothing of what adapters cost."""
    with plain_products(), torch.no_grad():
        plain = adaptc.compile(sides.base, str(sides.dirs[0]))
        for _, inputs, _ in WORK:
            expected = plain(**inputs).logits
            plain.base(**inputs)
    chosen = adaptc.compile(sides.base, str(sides.dirs[0]))
    with torch.no_grad():
        torch.testing.assert_close(chosen(**WORK[-1][1]).logits, expected, rtol=1e-3, atol=1e-3)
    packed = adaptc.compile(sides.base, str(sides.dirs[0]), pack="float32")
    candidates = {
        "transformers base": sides.base,
        "PEFT": sides.peft,
        "adaptc, plain products": plain,
        "adaptc, chosen products": chosen,
        "adaptc, chosen products, packed": packed,
        "prog.base, plain products": plain.base,
        "prog.base, chosen products": chosen.base,
    }
    rows: list[Row] = []
    for work, inputs, times in WORK:

        def call(fn: Callable[..., object], inputs: dict[str, torch.Tensor] = inputs) -> Callable[[], None]:
            def run() -> None:
                with torch.no_grad():
                    fn(**inputs)

            return run

        calls = {name: call(fn) for name, fn in candidates.items()}
        rows += interleave(f"{work}, eager, products", calls, "transformers base", rounds * times)
    print(chosen.products, packed.packed, "", sep="\n", file=sys.stderr)
    return rows


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        load = os.getloadavg()[0]
        made = run(Sides(Path(folder)), int(os.environ.get("ROUNDS", "9")))
    print(f"Measured on {machine()}, load {load:.1f} before and {os.getloadavg()[0]:.1f} after.\n")
    print(markdown(made))
