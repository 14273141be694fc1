"""Tests of kernels that triton interprets on the CPU.

Whether triton interprets is decided when a kernel is defined, so these tests have a process of their own. Their files
are not named test_*, so that pytest finds them only through :func:`run_cases`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_cases(name: str) -> None:
    """Run tests/kernels/<name>_cases.py in a new process with interpreted kernels; fail with its output if it fails."""
    # A worker's variables would make the new process take itself for one.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/kernels/{name}_cases.py"]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(command)} returned {done.returncode}:\n{done.stdout}"
