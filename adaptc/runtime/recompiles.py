"""Count compilations, to guard the promise that swaps compile nothing.

Private torch use, with the public route that was tried: ``torch._dynamo.utils.counters`` and inductor's metrics are the
only counts of compilations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from adaptc.errors import RecompileError


def compile_count() -> int:
    """Return how often torch has compiled in this process: Dynamo graphs, AOTAutograd graphs and inductor kernels."""
    from torch._dynamo.utils import counters
    from torch._inductor import metrics

    aot = counters["aot_autograd"]["total"] + counters["aot_autograd"]["ok"]
    return counters["stats"]["unique_graphs"] + aot + metrics.generated_kernel_count


@contextlib.contextmanager
def assert_no_recompiles() -> Iterator[None]:
    """Run the block, and raise RecompileError if Dynamo, AOTAutograd or inductor compiled anything inside.

    It reads torch's own counters, so it also catches a ``torch.compile`` that is not adaptc's. It can be used as a
    decorator.

    Yields:
        None.

    Raises:
        RecompileError: something was compiled.

    Example:
        >>> with adaptc.debug.assert_no_recompiles():
        ...     y = prog(x)
    """
    before = compile_count()
    yield
    made = compile_count() - before
    if made:
        raise RecompileError(f"{made} compilations took place in a block that promised none")
