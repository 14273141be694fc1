"""Make the code of a bank when a call first needs it, and keep it for later calls.

It is made for the whole program, or for each of its parts, and there is as little of it as possible. Where adapters lie
side by side in matmuls, one code serves any number of adapters. Else there is one for each power of two, and in
training one for each number. A compiler makes one for the bank's capacity; without a capacity, one for 8 adapters and
one for each power of two above.
"""

from __future__ import annotations

from collections.abc import Mapping

from adaptc.bank.base_program import BaseProgram
from adaptc.bank.capacity import Limits
from adaptc.bank.compile_bank import RowProgram
from adaptc.bank.stack_adapters import AdapterStack
from adaptc.passes.graph.graph_lock import hold_graph_lock
from adaptc.runtime.executor import Executor
from adaptc.runtime.options import RunOptions
from adaptc.runtime.variants.gpu_variants import check_triton, runs_on_gpu


class BankCode:
    """The code of a bank. ``row_programs``: part -> what its code is made of. ``kernel_sites``: ids of the sites that
    GPU kernels compute."""

    def __init__(
        self,
        row_programs: Mapping[str, RowProgram],
        options: RunOptions,
        limits: Limits,
        training: bool,
        kernel_sites: frozenset[str],
    ) -> None:
        self.row_programs, self.kernel_sites = row_programs, kernel_sites
        self._options, self._limits, self._is_training = options, limits, training
        self._serves_any_count: bool | None = None
        #: (part, number of adapters or None for any, whether rows are long) -> code
        self._executors: dict[tuple[str, int | None, bool], Executor] = {}

    @property
    def uses_compiler(self) -> bool:
        """Return whether a compiler makes the code."""
        return self._options.backend != "eager"

    @property
    def executors(self) -> list[Executor]:
        """Return all code that was made so far."""
        return list(self._executors.values())

    @property
    def serves_any_count(self) -> bool:
        """Return whether one code serves any number of adapters."""
        found = self._serves_any_count
        if found is None:
            with hold_graph_lock():
                found = not self.uses_compiler and all(
                    s.serves_any_count(self.kernel_sites) for s in self.row_programs.values()
                )
                self._serves_any_count = found
        return found

    def stack_capacity(self, adapter_count: int) -> int:
        """Return the capacity of a stack for ``adapter_count`` adapters."""
        least, capacity = max(adapter_count, 2), self._limits.capacity
        if self.uses_compiler:
            least = max(capacity or 8, least)
        elif self._is_training or self.serves_any_count:
            return least
        power = 1 << (least - 1).bit_length()
        return power if capacity is None else max(min(power, capacity), least)

    def executor_for(self, part: str, stack: AdapterStack, has_long_rows: bool) -> Executor:
        """Return the code of a part for calls on ``stack``, made now if it was not.

        ``has_long_rows``: the rows have so many positions that each row's own adapters are computed alone, see
        ``low_rank_rows``.
        """
        any_count, row_program = self.serves_any_count, self.row_programs[part]
        # Code differs by the length of rows only where adapters lie side by side, and nothing else computes them:
        # GPU kernels and compiled code have one code for all lengths.
        has_long_rows = has_long_rows and row_program.is_side_by_side and not (self.uses_compiler or self.kernel_sites)
        key = part, None if any_count else stack.capacity, has_long_rows
        code = self._executors.get(key)
        if code is None:
            with hold_graph_lock():
                code = self._executors.get(key)
                if code is None:
                    code = row_program.make_executor(
                        stack.binding, stack.capacity, self._options, has_long_rows, self.kernel_sites, any_count
                    )
                    self._executors[key] = code
        return code

    def all_executors(self, stack: AdapterStack) -> list[Executor]:
        """Return the code of all parts for calls on ``stack``, with rows of any length, made now if it was not."""
        found = [self.executor_for(part, stack, long) for part in self.row_programs for long in (False, True)]
        return list(dict.fromkeys(found))


def find_kernel_sites(
    base_program: BaseProgram, row_programs: Mapping[str, RowProgram], options: RunOptions
) -> frozenset[str]:
    """Return the ids of the sites that GPU kernels compute: they can in every part that a site is in.

    There are none where ``options`` or the device want no kernels. Raises as :func:`check_triton` does.
    """
    if not _uses_kernels(base_program, options):
        return frozenset()
    refused = {a.id for s in row_programs.values() for a in s.attachments if a.id not in s.sites_with_kernels}
    return frozenset(a.id for a in base_program.attachments) - refused


def _uses_kernels(base_program: BaseProgram, options: RunOptions) -> bool:
    if options.backend != "eager" or base_program.training or options.kernels is False:
        return False
    if options.kernels:
        check_triton()
    return bool(options.kernels) or runs_on_gpu(base_program.base.values())
