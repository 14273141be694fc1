"""Counting compilations, to guard the promise that swaps compile nothing.

Private torch use, with the public route that was tried: ``torch._dynamo.utils.counters`` and inductor's metrics are the
only counts of compilations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from adaptc.errors import RecompileError


def compile_count() -> int:
    """How many graphs torch has compiled in this process (Dynamo frames, AOTAutograd graphs, Inductor graphs)."""
    from torch._dynamo.utils import counters
    from torch._inductor import metrics

    aot = counters["aot_autograd"]["total"] + counters["aot_autograd"]["ok"]
    return counters["stats"]["unique_graphs"] + aot + metrics.generated_kernel_count


@contextlib.contextmanager
def assert_no_recompiles() -> Iterator[None]:
    """Context manager: raises RecompileError if anything was compiled inside, by Dynamo, AOTAutograd or Inductor.

    Counts torch's own counters, so it also catches a ``torch.compile`` that is not adaptc's. Usable as a decorator.
    """
    before = compile_count()
    yield
    made = compile_count() - before
    if made:
        raise RecompileError(f"{made} compilations took place in a block that promised none")
