"""Where triton's interpreter computes something else than a GPU does, made to compute the same.

What is compared to a reference is then the kernel as it is, and its rounding too.
"""

from __future__ import annotations

import os
from typing import Any

import torch


def _round_to_nearest(builder: Any) -> None:
    """The interpreter cuts float32 off to bfloat16."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    cast = builder.cast_impl

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            near = torch.tensor(source.data).to(torch.bfloat16).view(torch.uint16)
            return TensorHandle(near.numpy(), tl.bfloat16)
        return cast(self, source, to)

    builder.cast_impl = cast_impl


def _loop_over_numbers(interpreter: Any) -> None:
    """Before 3.9 it converts arrays of one element to an int, which numpy has stopped doing."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _constants_of_bfloat16(builder: Any) -> None:
    """Before 3.9 it has none but zero."""
    import triton.language as tl

    if not hasattr(builder, "get_bf16"):
        builder.get_bf16 = lambda self, value: self.cast_impl(self.get_fp32(value), tl.bfloat16)


# The process that runs all other tests comes here too, to look for tests.
if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    _round_to_nearest(interpreter.InterpreterBuilder)
    _loop_over_numbers(interpreter)
    _constants_of_bfloat16(interpreter.InterpreterBuilder)
