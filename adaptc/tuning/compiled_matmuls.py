"""Lower ``adaptc::product`` to torch's own op in code that inductor compiles.

Each ``adaptc::product`` of a graph becomes a call of ``mkldnn::_linear_pointwise`` on the weight as it lies. No op of
Python runs in between, and nothing of adaptc is in the code that AOTInductor writes. One piece of code computes calls
of any number of rows, so the kind of matmul is chosen for all of them. The op of Python is kept in one case: where
Python calls the code, and the columns matmul saves more than the op costs. The op chooses by the rows of each call.

Private torch use, with the public route that was tried:
- ``torch._inductor.lowering.register_lowering``, ``fallback_handler`` and ``torch._inductor.mkldnn_ir.LinearUnary``:
  inductor's own lowering of that op takes constant weights alone, and here they are inputs of the graph. Public: an op
  of Python, called from the compiled code, costs some microseconds in each of hundreds of layers, and a package would
  need Python.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.op_rules import register_vmap
from adaptc.passes.lower.choose_products import MatmulChoice
from adaptc.passes.protocol.matmul_op import ALL_ROW_CLASSES, LINEAR, ONEDNN, linear_matmul, onednn_supports
from adaptc.tuning.matmul_table import choose_for_all_rows, choose_matmul, seconds_saved

#: the most seconds that an op of Python costs in compiled code
PYTHON_OP_SECONDS = 30e-6


#: the library of ``adaptc::product_called``: ``adaptc::product`` without gradients, for code that is compiled already,
#: where a call of it takes ten microseconds less
_library = torch.library.Library("adaptc", "FRAGMENT")
_library.define(
    "product_called(Tensor x, Tensor weight, Tensor? bias, str kind, int[] classes, int[] columns) -> Tensor"
)
_library.impl("product_called", linear_matmul, "CPU")
# ``product`` looks for derivatives itself, so calls without any need no autograd op around it.
_library.impl("product_called", linear_matmul, "AutogradCPU")


@torch.library.register_fake("adaptc::product_called", lib=_library)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, classes: list[int], columns: list[int]) -> Tensor:
    return F.linear(x, weight, bias)


register_vmap("product_called", lambda x, weight, bias, *_: F.linear(x, weight, bias))


@cache
def register_lowerings() -> bool:
    """Register the lowering of ``adaptc::product`` with inductor; return False where this torch has no way to."""
    try:
        from torch._inductor.ir import TensorBox
        from torch._inductor.lowering import fallback_handler, register_lowering, view
        from torch._inductor.mkldnn_ir import LinearUnary
    except ImportError:
        return False
    plain = fallback_handler(torch.ops.adaptc.product_called.default, add_to_fallback_set=False)

    def lower(x: Any, weight: Any, bias: Any, kind: str, classes: Any, columns: Any) -> Any:
        if columns or kind != ONEDNN or tuple(classes) != ALL_ROW_CLASSES or not onednn_supports(x.get_dtype()):
            return plain(x, weight, bias, kind, classes, columns)
        *lead, width = x.get_size()
        rows = view(x, cast(Any, [-1, width]))
        made: Any = LinearUnary.create(rows, weight, bias, "none", [], "")
        out: Any = TensorBox.create(made)
        return view(out, [*lead, weight.get_size()[0]])

    register_lowering(torch.ops.adaptc.product.default, type_promotion_kind=None)(lower)
    return True


def choose_packaged(out: int, width: int, dtype: torch.dtype) -> MatmulChoice:
    """Return the matmul for a weight (out, width) in code that may run on another machine.

    It is right on all machines, if not the fastest. Half precision is always linear: oneDNN raises for bfloat16 where
    the processor has none.
    """
    if dtype.itemsize < 4:
        return MatmulChoice(LINEAR, (), "another machine may have no half precision")
    return choose_without_python(out, width, dtype)


def choose_compiled(out: int, width: int, dtype: torch.dtype) -> MatmulChoice:
    """Return the matmul for a weight (out, width) in code that inductor compiles and Python calls."""
    if onednn_supports(dtype) and seconds_saved(out, width, dtype) > PYTHON_OP_SECONDS:
        return choose_matmul(out, width, dtype)
    return choose_without_python(out, width, dtype)


def choose_without_python(out: int, width: int, dtype: torch.dtype) -> MatmulChoice:
    """Return the matmul for a weight (out, width) in code without an op of Python: one kind at any number of rows."""
    if not onednn_supports(dtype) or register_lowerings():
        return choose_for_all_rows(out, width, dtype)
    return MatmulChoice(LINEAR, (), "inductor of this torch takes no other")
