"""Every kernel compiles for the GPUs it is for, keeps to their registers and shared memory, and multiplies as said."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl

from adaptc import kernels
from adaptc.errors import BackendError
from adaptc.kernels import _packed_products
from adaptc.kernels._compile_ahead import AotKernel, CompiledKernel, compile_ahead
from adaptc.kernels._packed_products import few_rows_blocks
from tests.gpu import modelled

#: Bytes of shared memory that one program may have, by compute capability. Code for 8.0 runs on 8.6 and 8.9 too, which
#: have less of it than 8.0.
SHARED = {80: 99 * 1024, 90: 227 * 1024}


def _launched(module: ModuleType) -> list[str]:
    """Kernels with a launch of their own that a module defines; other jit functions are parts of them."""
    return [n for n, f in vars(module).items() if n.endswith("_kernel") and f.__module__ == module.__name__]


MODULES = {m.name: importlib.import_module(f"adaptc.kernels.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)}
#: Modules with kernels, or with records of them.
FAMILIES = {n: m for n, m in MODULES.items() if hasattr(m, "AOT_KERNELS") or _launched(m)}
#: Each record once: a module may hand on those of another.
RECORDS = list({id(a): a for m in FAMILIES.values() for a in getattr(m, "AOT_KERNELS", ())}.values())
#: as they are launched from compute capability 9.0 on
EARLY = _packed_products.EARLY_KERNELS
#: One of each kernel with matrix instructions, and one without.
FIRST = list({(a.kernel, a.mma): a for a in reversed(RECORDS)}.values())


def _within_limits(a: AotKernel, capability: int, *, aligned: bool) -> CompiledKernel:
    c = compile_ahead(a, capability, aligned=aligned)
    assert not c.n_spills, f"{c.n_spills} bytes spilled with {c.n_regs} registers"
    assert c.shared_bytes <= SHARED[capability]
    # One of float32 factors would round them to ten bits, where exact products were promised.
    assert _multiplies(c) == a.mma
    return c


@pytest.mark.parametrize("a", EARLY, ids=str)
def test_kernels_that_start_early_compile_where_a_gpu_lets_them(a) -> None:
    c = _within_limits(a, 90, aligned=True)
    assert ("griddepcontrol.wait" if a.launch_pdl else "griddepcontrol.launch_dependents") in c.ptx


#: Name of a packed kernel -> registers of a thread and bytes of shared memory at most, and the matrix instructions in
#: its loop: those of one warp (4 x 2 of 16 x 8 x 16 for 16 columns and 64 of k, three times for float32 adapters)
PACKED = {
    "few_rows_down-bf16-bf16-4096": (64, 32768, 8),
    "few_rows_down-bf16-fp32-4096": (96, 49152, 24),
    "few_rows-bf16-bf16-4096": (96, 32768, 8),
    "few_rows-bf16-fp32-4096": (96, 32768, 8),
    "few_rows-bf16-bf16-14336": (96, 49152, 16),
    # Narrow layers load more steps ahead. Their down projections, of few steps, do not.
    "few_rows-bf16-bf16-1024": (96, 5 * 16384, 8),
    "few_rows-bf16-fp32-256": (96, 5 * 16384, 8),
    "few_rows_down-bf16-bf16-1024": (64, 32768, 8),
    "few_rows_down-bf16-fp32-256": (96, 49152, 24),
    "lora_down-bf16-bf16": (96, 24576, 16),
    "update-bf16-bf16": (128, 16384, 0),
    "update-bf16-fp32": (144, 24576, 0),
}


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("name", PACKED)
def test_packed_kernels_keep_to_their_resources(name, capability) -> None:
    registers, shared, matrix_instructions = PACKED[name]
    c = compile_ahead(next(a for a in RECORDS if str(a) == name), capability)
    assert (c.n_spills, c.n_regs <= registers, c.shared_bytes <= shared) == (0, True, True), c
    # B lies such that no load of it is of two bytes.
    assert "LDG.E.U16" not in c.sass
    if matrix_instructions:
        loop = c.count_in_loop("HMMA", "LDG", "STS", "LDGSTS")
        # All reads of memory are under way while earlier ones are multiplied.
        assert (loop["HMMA"], loop["LDG"], loop["STS"]) == (matrix_instructions, 0, 0)
        assert loop["LDGSTS"] > 0


@pytest.mark.parametrize("n_cols", [0, 1, 640, 832, 1024, 1031, 2048, 3072, 4096, 14336])
def test_programs_have_enough_of_a_weight_under_way(n_cols) -> None:
    """What arrives within the latency is what the memory gives in that time, for 832 columns and more."""
    blocks = few_rows_blocks(torch.bfloat16, n_cols)
    under_way = -(-n_cols // blocks.BLOCK_N) * (blocks.num_stages - 1) * blocks.bytes_of_step
    wanted = modelled.ASSUMED.memory * modelled.ASSUMED.latency
    assert under_way >= wanted or (n_cols < 832 and blocks.num_stages == _packed_products.MAX_STAGES)
    # No wide layer pays with shared memory, which two programs of a multiprocessor share.
    assert blocks.num_stages == 3 or n_cols <= 2048
    assert blocks.for_h["num_stages"] == 3


def test_instructions_are_counted_in_the_loop_that_multiplies() -> None:
    lines = [
        ".L_x_0:", "        /*0010*/  HMMA.16816.F32 R4, R8 ;", "        /*0020*/  @!P0 BRA `(.L_x_1) ;",
        ".L_x_2:", "        /*0030*/  @P1 LDG.E R4, [R2] ;", "        /*0040*/  HMMA.16816.F32 R4, R8 ;",
        "        /*0050*/  LDGDEPBAR ;", "        /*0060*/  HMMA.16816.F32 R4, R8 ;",
        "        /*0070*/  @P0 BRA `(.L_x_2) ;", ".L_x_1:", "        /*0080*/  @P2 BRA `(.L_x_0) ;",
        ".L_x_3:", "        /*0090*/  LDG.E R4, [R2] ;", "        /*00a0*/  BRA `(.L_x_3) ;",
    ]  # fmt: skip
    c = CompiledKernel(0, 0, 0, "", "\n".join(lines))
    assert c.count_in_loop("HMMA", "LDG", "STS") == {"HMMA": 2, "LDG": 1, "STS": 0}


def _multiplies(c: CompiledKernel) -> bool:
    """Whether there are matrix instructions."""
    return "mma.sync" in c.ptx or "wgmma.mma_async" in c.ptx


def test_there_are_families() -> None:
    assert {"dora_linear", "merge_weight"} <= set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kernel_has_a_record(name) -> None:
    records = FAMILIES[name].AOT_KERNELS
    assert records
    missing = set(_launched(FAMILIES[name])) - {a.kernel.__name__ for a in records}
    assert not missing
    assert len({str(a) for a in records}) == len(records), "two records have one name"


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("a", RECORDS, ids=str)
def test_compiles_within_limits(a, capability) -> None:
    _within_limits(a, capability, aligned=True)


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("a", FIRST, ids=str)
def test_compiles_within_limits_where_nothing_is_aligned(a, capability) -> None:
    _within_limits(a, capability, aligned=False)


@triton.jit
def _square(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i[:, None] * n + i[None, :])
    tl.store(x_ptr + i[:, None] * n + i[None, :], tl.dot(x, x))


@pytest.mark.parametrize("capability", SHARED)
def test_what_breaks_a_limit_is_seen(capability) -> None:
    # A tile that is too large for the registers of one warp, and factors that are rounded to tf32.
    c = compile_ahead(
        AotKernel.from_pointers(_square, "square", {"x_ptr": "fp32"}, (), True, num_warps=1, BLOCK=64), capability
    )
    assert c.n_spills > 0
    assert c.n_regs > 200
    assert c.shared_bytes >= 64 * 64 * 4
    assert _multiplies(c)


@pytest.mark.parametrize(
    ("signature", "values"),
    [
        ({"x_ptr": "*fp32", "n": "i32"}, {}),
        ({"x_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}, {}),
        ({"x_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr", "M": "i32"}, {"BLOCK": 16}),
        ({"x_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}, {"BLOCK": 16, "n": 1}),
    ],
)
def test_a_record_that_does_not_fit_its_kernel_is_refused(signature, values) -> None:
    with pytest.raises(BackendError, match=r"odd: the signature has .*expected the kernel's arguments \['x_ptr'"):
        compile_ahead(AotKernel(_square, signature, values, name="odd"), 90)


def test_what_is_no_kernel_is_refused() -> None:
    with pytest.raises(BackendError, match=r"expected a triton kernel, found function.*unset TRITON_INTERPRET"):
        compile_ahead(AotKernel(lambda x: x, {}, {}, name="odd"), 90)
