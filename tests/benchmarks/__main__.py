"""``python -m tests.benchmarks [--quick]``: all tables, in Markdown, on standard output."""

from __future__ import annotations

import sys
import warnings

from tests.benchmarks import against_peft, methods, rewriting
from tests.benchmarks.harness import machine, markdown


def main() -> None:
    warnings.filterwarnings("ignore")  # of other libraries, about versions and devices
    quick = "--quick" in sys.argv
    print(f"Measured on {machine()}.\n")
    print("## Rewriting\n")
    print(rewriting.run(full=not quick), "\n")
    print("## Against PEFT: SmolLM2-135M, float32, rank 16 on all linear layers\n")
    print(markdown(against_peft.run(5 if quick else 15)), "\n")
    print("## Methods: SmolLM2-135M, float32, on all linear layers\n")
    print(methods.markdown(methods.run(5 if quick else 15)))


if __name__ == "__main__":
    main()
