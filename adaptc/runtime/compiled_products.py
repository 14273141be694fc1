"""Chosen products in compiled code: ``adaptc::product`` as a call of torch's own op, from Python or from C++.

Before: a graph with ``adaptc::product`` that inductor is about to compile. After: each of them is a call of
``mkldnn::_linear_pointwise`` on the weight as it lies, without an op of Python in between, and without anything of
adaptc in what AOTInductor writes. One piece of code computes calls of any number of rows, so it is chosen for
all of them.

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

from adaptc.passes.ir.product import ALL_CLASSES, LINEAR, ONEDNN, takes
from adaptc.passes.lower.choose_products import Choice
from adaptc.runtime.product_table import choose_for_all


@cache
def teach_inductor() -> bool:
    """Tell inductor what to make of ``adaptc::product``; False where this torch has no way to."""
    try:
        from torch._inductor.ir import TensorBox
        from torch._inductor.lowering import fallback_handler, register_lowering, view
        from torch._inductor.mkldnn_ir import LinearUnary
    except ImportError:
        return False
    op = torch.ops.adaptc.product.default
    plain = fallback_handler(op, add_to_fallback_set=False)

    def lower(x: Any, weight: Any, bias: Any, kind: str, classes: Any, columns: Any) -> Any:
        if columns or kind != ONEDNN or tuple(classes) != ALL_CLASSES or not takes(x.get_dtype()):
            return plain(x, weight, bias, kind, classes, columns)
        *lead, width = x.get_size()
        rows = view(x, cast(Any, [-1, width]))
        made: Any = LinearUnary.create(rows, weight, bias, "none", [], "")
        out: Any = TensorBox.create(made)
        return view(out, [*lead, weight.get_size()[0]])

    register_lowering(op, type_promotion_kind=None)(lower)
    return True


def choose_packaged(out: int, width: int, dtype: torch.dtype) -> Choice:
    """The same for code that may run on another machine than this one: right on all of them, if not the fastest. Where
    a processor has no bfloat16, oneDNN refuses it."""
    if dtype.itemsize < 4:
        return Choice(LINEAR, (), "another machine may have no half precision")
    return choose_compiled(out, width, dtype)


def choose_compiled(out: int, width: int, dtype: torch.dtype) -> Choice:
    """The product for a weight of (out, width) in code that inductor compiles."""
    if not takes(dtype) or teach_inductor():
        return choose_for_all(out, width, dtype)
    return Choice(LINEAR, (), "inductor of this torch takes no other")
