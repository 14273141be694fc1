"""Multiply tiles of different dtypes by matrix instructions, with products that are exact to float32.

A float32 has 24 bits of significand, and a bfloat16 has eight and the same exponents. So a float32 is the sum of three
bfloat16, and float16 the sum of two, to the bit. Matrix instructions multiply bfloat16 exactly and sum in float32. One
product with a float32 is then three of them, or six, in place of scalar arithmetic, which takes many times as long.

A factor beyond 3.3e38, the largest bfloat16, makes NaN here where float32 would have made infinity.
"""

# pyright: basic
# Bodies of kernels are triton's language: their arguments have no types, and so has nothing that is made of them.

from __future__ import annotations

import triton
import triton.language as tl

from adaptc.kernels._launch import INTERPRETED

# A kernel sees only constants of its own module.
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def plain_dot(left, right, acc):
    """Return acc + left @ right for tiles of one dtype, in exact float32 for float32."""
    # The interpreter multiplies the bits of bfloat16 as integers.
    if _INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def split_exactly(value):
    """Return three bfloat16 tiles, the largest first, whose sum is the float32 tile ``value``."""
    high = value.to(tl.bfloat16)
    rest = value - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def mixed_dot(left, right, acc):
    """Return acc + left @ right, with ``left`` rounded to the dtype of ``right`` where that has fewer bits.

    No product of a half precision ``left`` with a float32 ``right`` is rounded. Two float32 are multiplied as they are.
    """
    if right.dtype == tl.float32 and left.dtype != tl.float32:
        high, middle, low = split_exactly(right)
        if left.dtype == tl.bfloat16:
            # Small terms first, so that they are not lost in a large sum.
            acc = plain_dot(left, high, plain_dot(left, middle, plain_dot(left, low, acc)))
        else:
            first = left.to(tl.bfloat16)
            second = (left.to(tl.float32) - first.to(tl.float32)).to(tl.bfloat16)
            acc = plain_dot(second, high, plain_dot(second, middle, plain_dot(second, low, acc)))
            acc = plain_dot(first, high, plain_dot(first, middle, plain_dot(first, low, acc)))
        return acc
    return plain_dot(left.to(right.dtype), right, acc)


@triton.jit
def float32_dot(left, right, acc):
    """Return acc + left @ right for two float32 tiles, by matrix instructions: as exact as float32 arithmetic.

    The products that are left out are below 2**-23 of the whole.
    """
    first, second, third = split_exactly(left)
    high, middle, low = split_exactly(right)
    acc = plain_dot(third, high, plain_dot(second, middle, plain_dot(first, low, acc)))
    return plain_dot(first, high, plain_dot(second, high, plain_dot(first, middle, acc)))
