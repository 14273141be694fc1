"""Compile kernels ahead of time, for a GPU that need not be present, and report what they would use there.

Each kernel module lists in ``AOT_KERNELS`` the kernels to check: one :class:`AotKernel` per kernel and set of types.
:func:`compile_ahead` compiles one to a binary and reads off registers, spills and shared memory.

A launch passes more than types to the compiler: it also says which pointers and integers are multiples of 16. Wide
loads and asynchronous copies exist only for those, and with them the shared memory of the pipeline's stages. So the
aligned kernel differs from the unaligned one, and both occur.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from adaptc.errors import BackendError

#: the names of matrix instructions: of one warp, and of four
MATRIX_INSTRUCTIONS = "HMMA", "HGMMA"
_LABEL, _BRANCH = re.compile(r"(\.L_x_\d+):"), re.compile(r"BRA.*\((\.L_x_\d+)\)")
#: an instruction behind its address and its predicate
_NAME = re.compile(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class AotKernel:
    """A kernel with the types it is launched with.

    ``signature`` has every argument, in any order: a pointer ``*bf16``, a number ``i32``, ``i64`` or ``fp32``, or
    ``constexpr``. The values of the last stand in ``constexprs``. A stride that is always 1 in a launch is a constexpr.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    #: whether it may start before the kernel in front of it has ended, or lets the next one
    launch_pdl: bool = False
    #: whether matrix instructions must appear; exact float32 matmuls have none
    mma: bool = True
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.kernel.__name__

    @classmethod
    def from_pointers(
        cls,
        kernel: Any,
        name: str,
        pointers: Mapping[str, str],
        unit_strides: Collection[str],
        mma: bool,
        num_warps: int = 4,
        **constexprs: Any,
    ) -> AotKernel:
        """Return a record; ``pointers`` maps pointer arguments to element types, ``unit_strides`` are the strides that
        are 1.

        All arguments that are in neither, nor in ``constexprs``, are i32.
        """
        fixed = dict.fromkeys(unit_strides, 1) | constexprs
        kinds = {n: f"*{t}" for n, t in pointers.items()} | dict.fromkeys(fixed, "constexpr")
        signature = {n: kinds.get(n, "i32") for n in kernel.arg_names}
        return cls(kernel, signature, fixed, num_warps=num_warps, mma=mma, name=name)


@dataclass(frozen=True)
class CompiledKernel:
    """The resources that a kernel uses on the GPU it was compiled for."""

    #: bytes of local memory of each thread. Kernels have no arrays there, so all of it is spilled registers.
    n_spills: int
    n_regs: int
    #: bytes of shared memory of each program
    shared_bytes: int
    ptx: str
    #: the machine code, as text
    sass: str

    def count_in_loop(self, *names: str) -> dict[str, int]:
        """Return how often instructions are in the loop with most matrix instructions, by name without types."""
        loops = [Counter(_NAME.findall("\n".join(loop))) for loop in _loops(self.sass.splitlines())]
        most = max(loops, key=lambda c: sum(c[n] for n in MATRIX_INSTRUCTIONS), default=Counter[str]())
        return {n: most[n] for n in names}


def _loops(lines: Sequence[str]) -> list[Sequence[str]]:
    """Return the lines of each loop that has no other loop in it: from a label to a branch back to it."""
    labels = {found[1]: i for i, line in enumerate(lines) if (found := _LABEL.match(line.strip()))}
    branches = ((labels.get(found[1], i), i) for i, line in enumerate(lines) if (found := _BRANCH.search(line)))
    back = [(start, end) for start, end in branches if start < end]
    return [lines[s:e] for s, e in back if not any(s <= start and end < e for start, end in back)]


def compile_ahead(record: AotKernel, capability: int, *, aligned: bool = True) -> CompiledKernel:
    """Compile ``record`` for compute capability ``capability`` (80, 90).

    ``aligned`` says that pointers and integers are multiples of 16; otherwise nothing is known of them. Raises
    BackendError if the record does not fit its kernel, or triton interprets kernels in this process.
    """
    if not isinstance(record.kernel, JITFunction):
        raise BackendError(
            f"{record}: expected a triton kernel, found {type(record.kernel).__name__}. Kernels that are interpreted "
            "cannot be compiled: unset TRITON_INTERPRET before triton is imported."
        )
    names = record.kernel.arg_names
    fixed = {n for n, kind in record.signature.items() if kind == "constexpr"}
    if set(record.signature) != set(names) or set(record.constexprs) != fixed:
        raise BackendError(
            f"{record}: the signature has {sorted(record.signature)} and values for {sorted(record.constexprs)}; "
            f"expected the kernel's arguments {names}, and a value for each that is a constexpr."
        )
    # In the kernel's order: triton matches types to arguments by position.
    signature = {n: record.signature[n] for n in names}
    attrs: dict[Any, Any] = {}
    if aligned:
        # A launch says nothing about the arguments that a kernel is not to be specialised on.
        parameters: Any = record.kernel
        plain = {str(p.name) for p in parameters.params if p.do_not_specialize}
        hinted = [
            i
            for i, n in enumerate(names)
            if n not in plain and (signature[n].startswith("*") or signature[n] in ("i32", "i64"))
        ]
        attrs = {(i,): [["tt.divisibility", 16]] for i in hinted}
    source = ASTSource(fn=record.kernel, signature=signature, constexprs=dict(record.constexprs), attrs=attrs)
    # Fused multiply-adds are triton's default at a launch; saying so silences a warning that the default may change.
    options: dict[str, Any] = {"num_warps": record.num_warps, "num_stages": record.num_stages}
    options |= {"enable_fp_fusion": True, "launch_pdl": record.launch_pdl}
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage, sass = _inspect(compiled.asm["cubin"])
    found = _USAGE.findall(usage)
    if len(found) != 1:
        raise BackendError(f"{record}: expected the resources of one kernel, found: {usage}")
    registers, stack, local = map(int, found[0])
    return CompiledKernel(stack + local, registers, compiled.metadata.shared, compiled.asm["ptx"], sass)


def _inspect(cubin: bytes) -> list[str]:
    """Return what the GPU's tools say of a binary: the resources that it uses, and its machine code."""
    tools: Any = knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        commands = [tools.cuobjdump.path, "--dump-resource-usage", str(file)], [tools.nvdisasm.path, "-c", str(file)]
        return [subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands]
