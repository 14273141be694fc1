"""Count compilations, to guard the promise that swaps compile nothing.

Triton's kernels are counted by its own hook, ``triton.knobs.runtime.jit_post_compile_hook``.

Private torch use, with the public route that was tried: ``torch._dynamo.utils.counters`` and inductor's metrics are the
only counts of compilations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from adaptc.errors import RecompileError


class _TritonCompilations:
    """The number of kernels that Triton has compiled, or loaded from its cache on disk, since it was first asked for.

    It hands each on to the hook that was there before.
    """

    def __init__(self) -> None:
        self.count = 0
        self._next: Callable[..., Any] | None = None

    def __call__(self, **compilation: Any) -> Any:
        self.count += 1
        return self._next(**compilation) if self._next else None

    def watch(self) -> int:
        """Return the count, and go on counting; 0 where Triton is not installed."""
        if find_spec("triton") is None:
            return 0
        from triton import knobs

        if knobs.runtime.jit_post_compile_hook is not self:
            self._next = knobs.runtime.jit_post_compile_hook
            knobs.runtime.jit_post_compile_hook = self
        return self.count


_TRITON = _TritonCompilations()


def compile_count() -> int:
    """Return how often code was compiled in this process: Dynamo graphs, AOTAutograd graphs, inductor's and Triton's
    kernels.

    Those of Triton count from the first call on.
    """
    from torch._dynamo.utils import counters
    from torch._inductor import metrics

    aot = counters["aot_autograd"]["total"] + counters["aot_autograd"]["ok"]
    return counters["stats"]["unique_graphs"] + aot + metrics.generated_kernel_count + _TRITON.watch()


@contextlib.contextmanager
def assert_no_recompiles() -> Iterator[None]:
    """Run the block, and raise RecompileError if Dynamo, AOTAutograd, inductor or Triton compiled anything inside.

    It reads torch's own counters, so it also catches a ``torch.compile`` that is not adaptc's. Of Triton it counts each
    kernel that is compiled, or loaded from its cache on disk. It can be used as a decorator.

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
