"""What choosing the base's products is worth: eager calls with the choice and without, next to the transformers base.

Of bases in float32 and in bfloat16, with adapters of both types, and what adapters cost over the same program's base.
``python -m tests.benchmarks.products`` prints these rows alone, with what was chosen and the load of the machine;
``... products bfloat16`` those of that type alone.
"""

from __future__ import annotations

import copy
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
        calls = {name: _call(fn, inputs) for name, fn in candidates.items()}
        rows += interleave(f"{work}, eager, products", calls, "transformers base", rounds * times)
    print(chosen.products, packed.packed, "", sep="\n", file=sys.stderr)
    return [*rows, *_over_base(rows, "prog.base, chosen products", ("adaptc, chosen products",))]


def half(sides: Sides, rounds: int = 15) -> list[Row]:
    """The same of a base in bfloat16, with adapters in bfloat16 and, as PEFT makes them, in float32."""
    base = copy.deepcopy(sides.base).bfloat16()
    peft = copy.deepcopy(sides.peft).bfloat16()
    adapter = str(sides.dirs[0])
    narrow = adaptc.compile(base, adapter, autocast_adapter_dtype=False)
    wide = adaptc.compile(base, adapter)
    own, other = "adaptc, bfloat16 adapters", "adaptc, float32 adapters"
    candidates = {"transformers base": base, "PEFT": peft, own: narrow, other: wide, "prog.base": narrow.base}
    rows: list[Row] = []
    for work, inputs, times in WORK:
        calls = {name: _call(fn, inputs) for name, fn in candidates.items()}
        rows += interleave(f"{work}, eager, bfloat16 base", calls, "transformers base", rounds * times)
    print(narrow.products, narrow.fusion, narrow.held, sep="\n", end="\n\n", file=sys.stderr)
    return [*rows, *_over_base(rows, "prog.base", (own, other))]


def _call(fn: Callable[..., object], inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            fn(**inputs)

    return run


def _over_base(rows: list[Row], base: str, names: tuple[str, ...]) -> list[Row]:
    """What adapters cost over the base in the same form, of rows that were measured."""
    out: list[Row] = []
    for work in dict.fromkeys(r.work for r in rows):
        known = {r.candidate: r for r in rows if r.work == work}
        for name in (base, *names):
            r = known[name]
            ratio = r.milliseconds / known[base].milliseconds
            out.append(Row(f"{work}, over its own base", name, r.milliseconds, ratio, r.rounds))
    return out


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        load = os.getloadavg()[0]
        sides, rounds = Sides(Path(folder)), int(os.environ.get("ROUNDS", "9"))
        made = [] if "bfloat16" in sys.argv else run(sides, rounds)
        made += half(sides, rounds)
    print(f"Measured on {machine()}, load {load:.1f} before and {os.getloadavg()[0]:.1f} after.\n")
    print(markdown(made))
