"""``python -m tests.benchmarks [--quick]``: all tables, in Markdown, on standard output.

``--quick`` takes fewer rounds, and leaves out what has to be compiled first, some ten minutes.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

from tests.benchmarks import (
    above_layers,
    against_peft,
    compiled,
    generating,
    many_adapters,
    methods,
    products,
    quantized_bases,
    quantized_training,
    rewriting,
)
from tests.benchmarks.harness import machine, markdown


def main() -> None:
    warnings.filterwarnings("ignore")  # of other libraries, about versions and devices
    quick = "--quick" in sys.argv
    rounds = 5 if quick else 15
    print(f"Measured on {machine()}.\n")
    print("## Rewriting\n")
    print(rewriting.run(full=not quick), "\n")
    print("## Against PEFT: SmolLM2-135M, float32, rank 16 on all linear layers\n")
    with tempfile.TemporaryDirectory() as folder:
        sides = against_peft.Sides(Path(folder))
        print(
            markdown(
                [
                    *against_peft.run(sides, rounds),
                    *compiled.call_path(sides, rounds),
                    *products.run(sides, rounds),
                    *products.half(sides, rounds),
                ]
            ),
            "\n",
        )
        if not quick:
            print(markdown(compiled.forward(sides, Path(folder), rounds)), "\n")
        print(markdown(generating.run(sides, 5, inductor=not quick)), "\n")
        print("## One batch on many adapters\n")
        print(markdown(many_adapters.run(sides, Path(folder), 3 if quick else 5)), "\n")
        print(generating.memory(), "\n")
        del sides
    print("## Methods above the layer\n")
    with tempfile.TemporaryDirectory() as folder:
        print(markdown(above_layers.run(Path(folder), 3 if quick else 5)), "\n")
    print("## Quantised bases\n")
    with tempfile.TemporaryDirectory() as folder:
        for table in quantized_bases.run("small" if quick else "1.1b", 3 if quick else 5, Path(folder)):
            print(table, "\n")
    print("## Training on a quantised base\n")
    print(quantized_training.run("small" if quick else "1.1b"), "\n")
    print("## Methods: SmolLM2-135M, float32, on all linear layers\n")
    print(methods.markdown(methods.run(rounds)))


if __name__ == "__main__":
    main()
