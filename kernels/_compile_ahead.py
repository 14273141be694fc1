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
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from adaptc.errors import BackendError

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
        hinted = [i for i, n in enumerate(names) if signature[n].startswith("*") or signature[n] in ("i32", "i64")]
        attrs = {(i,): [["tt.divisibility", 16]] for i in hinted}
    source = ASTSource(fn=record.kernel, signature=signature, constexprs=dict(record.constexprs), attrs=attrs)
    # Fused multiply-adds are triton's default at a launch; saying so silences a warning that the default may change.
    options = {"num_warps": record.num_warps, "num_stages": record.num_stages, "enable_fp_fusion": True}
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, local = _usage(compiled.asm["cubin"], str(record))
    return CompiledKernel(local, registers, compiled.metadata.shared, compiled.asm["ptx"])


def _usage(cubin: bytes, name: str) -> tuple[int, int]:
    """Return the registers, and the bytes of local memory, of each thread of the kernel in ``cubin``."""
    tool: Any = knobs.nvidia.cuobjdump
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [tool.path, "--dump-resource-usage", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _USAGE.findall(text)
    if len(found) != 1:
        raise BackendError(f"{name}: expected the resources of one kernel from {tool.path}, found: {text}")
    registers, stack, local = map(int, found[0])
    return registers, stack + local
