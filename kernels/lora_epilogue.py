"""Compute LoRA's two projections, next to a base matmul that cuBLAS computes (Hu et al., arXiv 2106.09685).

    lora_down(x, A, scale)         h = scale * x A^T, or x A^T without a scale
    lora_up_add(y, h, B, scale)    y' = y + scale * h B^T

x (M, K), A (R, K), y (M, N), h (M, R), B (N, R), of any strides; scale a 0-d tensor, read on the device. Each tensor is
float32, bfloat16 or float16 on its own; other devices than a GPU take float64 too. h has A's type and x is cast to it,
as PEFT does where it keeps adapters in float32 beside a base in half precision; y' has y's type.

The two have opposite shapes (as in Punica, arXiv 2310.18547, and S-LoRA, arXiv 2311.03285). Down reads long rows for a
few numbers, and fills a GPU only if the sum over K is split over programs. For sites that share x, their A stacked to
(sum of ranks, K) make one call. Up reads a few numbers for each of many outputs: its cost is y, read once and written
once.

Sums are float32, and results are rounded once; matmuls of float32 are exact float32 (no TF32). No atomics: the same
inputs give the same bits. All tensors but the scale have gradients, without a kernel for them. Each is a down
projection of other matrices, where the larger is cast as it is read and not copied.
"""

# pyright: basic
# Bodies of kernels are triton's language: their arguments have no types, and so has nothing that is made of them.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from adaptc.kernels._compile_ahead import AotKernel
from adaptc.kernels._launch import check, check_floats, is_empty_grid, on_device_of, runs_kernels, wrap_triton
from adaptc.kernels._low_rank_tile import AOT_DTYPES, TORCH_DTYPES, low_rank_tile, tile_of
from adaptc.kernels._mixed_dot import mixed_dot
from adaptc.op_rules import decompose_in_transforms

#: the number of programs that fill a GPU of about 130 multiprocessors twice
TARGET_PROGRAMS = 256
#: the most parts of the sum over K
MAX_PARTS = 16
#: the number of programs where each block of columns reads all parts of h, and the length of a sum that they are for;
#: longer sums have as many times more
DOWN_PROGRAMS, DOWN_LENGTH = 64, 4096


# Rows, ranks and what follows from them change from call to call and from adapter to adapter. Specialised, they would
# compile another kernel where they are 1 or a multiple of 16.
@triton.jit(do_not_specialize=["n_rows", "rank", "steps", "h_row"])
def _down_kernel(
    x_ptr, a_ptr, scale_ptr, h_ptr, n_rows, K, rank, steps, h_row, x_row, x_col, a_rank, a_col,
    EARLY: tl.constexpr, HAS_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write h[s, m, r], the part of h[m, r] from the s-th ``steps`` times BLOCK_K of k. Rows are ``h_row`` apart."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    row_ok = (rows < n_rows)[:, None]
    rank_ok = (ranks < rank)[None, :]
    x_rows = x_ptr + rows[:, None] * x_row
    a_ranks = a_ptr + ranks[None, :] * a_rank
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    span = steps * BLOCK_K
    for start in range(split * span, tl.minimum(split * span + span, K), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + k.to(tl.int64)[None, :] * x_col, mask=row_ok & (k < K)[None, :], other=0.0)
        a = tl.load(a_ranks + k.to(tl.int64)[:, None] * a_col, mask=(k < K)[:, None] & rank_ok, other=0.0)
        acc = mixed_dot(x, a, acc)
    if HAS_SCALE:
        acc *= tl.load(scale_ptr).to(tl.float32)
    place = h_ptr + (split.to(tl.int64) * n_rows + rows)[:, None] * h_row + ranks[None, :]
    tl.store(place, acc.to(h_ptr.dtype.element_ty), mask=row_ok & (ranks < h_row)[None, :])


@triton.jit(do_not_specialize=["n_rows", "rank"])
def _up_add_kernel(
    y_ptr, h_ptr, b_ptr, scale_ptr, out_ptr, n_rows, n_cols, rank,
    y_row, y_col, h_row, h_rank, b_row, b_rank, out_row, out_col,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows, cols = tile_of(n_cols, BLOCK_M, BLOCK_N)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    # Loaded before the matmul, which then hides the wait for memory.
    y = tl.load(y_ptr + rows[:, None] * y_row + cols[None, :] * y_col, mask=mask, other=0.0)
    scale = tl.load(scale_ptr).to(tl.float32)
    update = low_rank_tile(
        h_ptr, b_ptr, rows, cols, n_rows, n_cols, rank, h_row, h_rank, b_rank, b_row, BLOCK_M, BLOCK_N, BLOCK_R
    )
    out = y.to(tl.float32) + scale * update
    tl.store(out_ptr + rows[:, None] * out_row + cols[None, :] * out_col, out.to(out_ptr.dtype.element_ty), mask=mask)


def down_blocks(left: torch.dtype, right: torch.dtype) -> dict[str, int]:
    """Return the options of the down projection of x and A of these dtypes: the same for all ranks and rows.

    Blocks are wide, so that x is read once for the usual ranks. Ranks that do not exist are not read.
    """
    # Exact float32 products are not made by tensor cores and hold their operands in registers: small tiles.
    if left == right == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_R": 16, "BLOCK_K": 32, "num_warps": 4}
    # Three terms of each number of A need the registers of two, and rows enough for eight warps.
    if right == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_R": 32, "BLOCK_K": 64, "num_warps": 8}
    return {"BLOCK_M": 32, "BLOCK_R": 64, "BLOCK_K": 64, "num_warps": 4}


def up_blocks(left: torch.dtype, right: torch.dtype) -> dict[str, int]:
    half = left == right != torch.float32
    return {"BLOCK_M": 64 if half else 32, "BLOCK_N": 64, "BLOCK_R": 32 if half else 16}


def split_count(n_rows: Any, K: Any, rank: Any, blocks: dict[str, int], programs: int = TARGET_PROGRAMS) -> int:
    """Return the number of parts of the sum over K: for so many ``programs``, of four steps at least each.

    Symbolic sizes get as many parts as few rows would, where splitting matters most.
    """
    parts = MAX_PARTS
    if isinstance(n_rows, int) and isinstance(rank, int):
        # Rounded up: one more block of rows must not halve the number of programs.
        tiles = triton.cdiv(n_rows, blocks["BLOCK_M"]) * triton.cdiv(rank, blocks["BLOCK_R"])
        parts = min(parts, triton.cdiv(programs, tiles)) if tiles else 1
    if isinstance(K, int):
        parts = min(parts, K // (4 * blocks["BLOCK_K"]))
    return max(parts, 1)


def down_programs(K: Any) -> int:
    """Return the number of programs that the down projection for many rows should have."""
    return DOWN_PROGRAMS * (max(K // DOWN_LENGTH, 1) if isinstance(K, int) else 1)


def launch_down_parts(
    x: Tensor, A: Tensor, scale: Tensor | None, h_row: Any, programs: int, bind: Any = None, early: bool = False
) -> Tensor:
    """Return the parts of scale * x A^T, (parts, M, h_row) in float32, to be added up: enough for so many ``programs``.

    ``h_row`` is at least the rank. Columns from the rank on are zero up to the next block of ranks, and undefined after
    it. ``bind`` and ``early`` are those of :class:`~adaptc.kernels._packed_products.PackedLayout`.
    """
    (n_rows, K), rank, blocks = x.shape, A.shape[0], down_blocks(x.dtype, A.dtype)
    splits = split_count(n_rows, K, rank, blocks, programs)
    steps = triton.cdiv(triton.cdiv(K, splits), blocks["BLOCK_K"])
    h = x.new_empty((splits, n_rows, h_row), dtype=torch.float32)
    if not is_empty_grid(n_rows, rank):
        grid = (triton.cdiv(n_rows, blocks["BLOCK_M"]), triton.cdiv(rank, blocks["BLOCK_R"]), splits)
        down = wrap_triton(_down_kernel) if bind is None else bind(_down_kernel)
        with on_device_of(x):
            down[grid](
                x, A, h if scale is None else scale, h, n_rows, K, rank, steps, h_row, *x.stride(), *A.stride(),
                EARLY=early, HAS_SCALE=scale is not None, **blocks,
            )  # fmt: skip
    return h


def launch_down(x: Tensor, A: Tensor, scale: Tensor | None) -> Tensor:
    return launch_down_parts(x, A, scale, A.shape[0], TARGET_PROGRAMS).sum(0).to(A.dtype)


def launch_up_add(y: Tensor, h: Tensor, B: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """Write y + scale * h B^T to ``out``, and return it.

    ``out`` may be ``y`` itself: a program reads its tile before it writes it.
    """
    (n_rows, n_cols), t = y.shape, up_blocks(h.dtype, B.dtype)
    if not is_empty_grid(n_rows, n_cols):
        with on_device_of(y):
            wrap_triton(_up_add_kernel)[(triton.cdiv(n_rows, t["BLOCK_M"]) * triton.cdiv(n_cols, t["BLOCK_N"]),)](
                y, h, B, scale, out, n_rows, n_cols, B.shape[1],
                *y.stride(), *h.stride(), *B.stride(), *out.stride(), **t,
            )  # fmt: skip
    return out


def empty_output(y: Tensor) -> Tensor:
    return y.new_empty(y.shape)


@triton_op("adaptc::lora_down", mutates_args=())
def lora_down(x: Tensor, A: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return scale * x A^T, or x A^T without a scale: x (M, K), A (R, K), scale () -> (M, R) of A's dtype."""
    _check_down(x, A, scale)
    return launch_down(x, A, scale) if runs_kernels(x) else reference_lora_down(x, A, scale)


@triton_op("adaptc::lora_up_add", mutates_args=())
def lora_up_add(y: Tensor, h: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """Return y + scale * h B^T: y (M, N), h (M, R), B (N, R), scale () -> (M, N) of y's dtype."""
    _check_up_add(y, h, B, scale)
    return launch_up_add(y, h, B, scale, empty_output(y)) if runs_kernels(y) else reference_lora_up_add(y, h, B, scale)


@lora_down.register_fake
def _(x: Tensor, A: Tensor, scale: Tensor | None = None) -> Tensor:
    _check_down(x, A, scale)
    return x.new_empty((x.shape[0], A.shape[0]), dtype=A.dtype)


@lora_up_add.register_fake
def _(y: Tensor, h: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    _check_up_add(y, h, B, scale)
    return empty_output(y)


def check_scale(op: str, scale: Tensor | None, like: Tensor, shape: tuple[int, ...] = ()) -> None:
    """Raise BackendError unless ``scale`` is None, or a tensor of that shape on the device of ``like``."""
    if scale is not None:
        check(op, tuple(scale.shape) == shape, f"a scale of shape {shape}", tuple(scale.shape))
        check(op, scale.device == like.device, f"a scale on {like.device}, where the other tensors are", scale.device)


def _check_down(x: Tensor, A: Tensor, scale: Tensor | None) -> None:
    check("lora_down", x.ndim == 2, "x of shape (M, K)", tuple(x.shape))
    check("lora_down", A.ndim == 2 and A.shape[1] == x.shape[1], f"A of shape (R, {x.shape[1]})", tuple(A.shape))
    check_floats("lora_down", x=x, A=A)
    check_scale("lora_down", scale, x)


def _check_up_add(y: Tensor, h: Tensor, B: Tensor, scale: Tensor) -> None:
    check("lora_up_add", y.ndim == 2, "y of shape (M, N)", tuple(y.shape))
    check("lora_up_add", B.ndim == 2 and B.shape[0] == y.shape[1], f"B of shape ({y.shape[1]}, R)", tuple(B.shape))
    low = y.shape[0], B.shape[1]
    check("lora_up_add", tuple(h.shape) == low, f"h of shape {low}", tuple(h.shape))
    check_floats("lora_up_add", y=y, h=h, B=B)
    check_scale("lora_up_add", scale, y)


def _save_down(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _down_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, A, scale = ctx.saved_tensors
    need_x, need_A, *_ = ctx.needs_input_grad
    return (
        lora_down(g, A.t(), scale).to(x.dtype) if need_x else None,
        lora_down(x.t(), g.t(), scale).t() if need_A else None,
        None,
    )


def _save_up_add(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])  # y, the largest, has no part in any gradient


def _up_add_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    h, B, scale = ctx.saved_tensors
    need_y, need_h, need_B, _ = ctx.needs_input_grad
    return (
        g if need_y else None,
        lora_down(g, B.t(), scale).to(h.dtype) if need_h else None,
        lora_down(g.t(), h.t(), scale).to(B.dtype) if need_B else None,
        None,
    )


lora_down.register_autograd(_down_backward, setup_context=_save_down)
lora_up_add.register_autograd(_up_add_backward, setup_context=_save_up_add)


def matmul_transposed(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right^T in float32, in which kernels sum; in float64 if one of the two is."""
    high = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    return left.to(high) @ right.to(high).t()


def reference_lora_down(x: Tensor, A: Tensor, scale: Tensor | None = None) -> Tensor:
    h = matmul_transposed(x.to(A.dtype), A)
    return (h if scale is None else scale * h).to(A.dtype)


def reference_lora_up_add(y: Tensor, h: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    return (y + scale * matmul_transposed(h, B)).to(y.dtype).contiguous()


decompose_in_transforms("lora_down", reference_lora_down, nondifferentiable=(2,))
decompose_in_transforms("lora_up_add", reference_lora_up_add, nondifferentiable=(3,))


def aot_down(base: str, adapter: str, of_gradient: bool = False, early: bool = False) -> AotKernel:
    """Return the record of a down projection; ``of_gradient`` gives it the strides and the scale of a gradient of B."""
    pointers = {"x_ptr": base, "a_ptr": adapter, "scale_ptr": "fp32", "h_ptr": "fp32"}
    name = f"lora_down-{base}-{adapter}{'-gradient' if of_gradient else ''}{'-early' if early else ''}"
    ones = ("x_row", "a_rank") if of_gradient else ("x_col", "a_col")
    t = down_blocks(TORCH_DTYPES[base], TORCH_DTYPES[adapter])
    fixed = {"EARLY": early, "HAS_SCALE": of_gradient}
    return AotKernel.from_pointers(_down_kernel, name, pointers, ones, base != "fp32", **fixed, **t)


def _aot_up_add(base: str, adapter: str) -> AotKernel:
    pointers = {"y_ptr": base, "h_ptr": adapter, "b_ptr": adapter, "scale_ptr": "fp32", "out_ptr": base}
    ones = ("y_col", "h_rank", "b_rank", "out_col")
    t = up_blocks(TORCH_DTYPES[adapter], TORCH_DTYPES[adapter])
    return AotKernel.from_pointers(
        _up_add_kernel, f"lora_up_add-{base}-{adapter}", pointers, ones, adapter != "fp32", **t
    )


AOT_KERNELS = [
    *(aot_down(*types, gradient) for types in AOT_DTYPES for gradient in (False, True)),
    *(_aot_up_add(*types) for types in AOT_DTYPES),
]
