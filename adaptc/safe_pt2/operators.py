"""Check which operators a file may name.

torch looks a target up as a path of attributes below ``torch``, ``math`` or ``operator``, and calls whatever it finds.
``torch.os.system`` would do. Here a target is an operator of the dispatcher, a higher-order operator that exports have,
or a function on sizes. Operators that open files, start code or reach other processes are refused.

Private torch use, with the public route that was tried: ``torch._ops`` has the classes of operators.
``_dispatch_get_all_op_names`` tells the dispatcher's operators from TorchScript's (``aten::save`` writes a file). No
public module lists either. ``_SYM_OPS`` is torch's own table of functions on sizes, and ``predispatch`` has the
functions that vmap leaves in a graph.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch._C import _dispatch_get_all_op_names
from torch._export.serde.serialize import _SYM_OPS
from torch._functorch import predispatch
from torch._ops import HigherOrderOperator, OpOverload

from adaptc.archives.names import word_set
from adaptc.archives.refusal import UnsafeFile, short_repr
from adaptc.archives.transformers_ops import register_ops_of_transformers

_OP_TARGET = re.compile(r"torch\.ops\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)
_HIGHER_ORDER_TARGET = re.compile(r"torch\.ops\.higher_order\.([A-Za-z_]\w*)", re.ASCII)
_VMAP_TARGET = re.compile(r"torch\._functorch\.predispatch\.([A-Za-z_]\w*)", re.ASCII)

# Namespaces of torch that reach other processes, devices' queues, profilers, memory behind torch's back, or debuggers.
_REFUSED_NAMESPACES = word_set(
    """
    c10d c10d_functional _c10d_functional _c10d_functional_autograd symm_mem fsdp rpc _dtensor inductor inductor_prims
    _inductor_test profiler debugprims debug_mode_ops _test prim cuda streams onnx onnx_symbolic static_runtime _native
    """
)
_REFUSED_OPS = frozenset(["aten.from_file"])

# Higher-order operators that hold subgraphs or plain operators, and nothing compiled, packed or printed.
_HIGHER_ORDER_OPS = word_set(
    """
    cond map_impl map while_loop while_loop_stack_output scan associative_scan wrap wrap_with_set_grad_enabled
    wrap_with_autocast wrap_activation_checkpoint tag_activation_checkpoint auto_functionalized auto_functionalized_v2
    out_dtype strict_mode hints_wrapper invoke_subgraph flex_attention with_effects
    """
)


def check_target(target: str) -> str:
    """Return ``target``. Raises UnsafeFile where it names no allowed operator. Nothing is looked up in torch."""
    if match := _OP_TARGET.fullmatch(target):
        space, name, _ = match.groups()
        if space in _REFUSED_NAMESPACES or f"{space}.{name}" in _REFUSED_OPS or name.startswith("__import"):
            raise UnsafeFile(
                f"expected an operator on tensors, found {short_repr(target)}, which reaches beyond the program"
            )
        return target
    if match := _HIGHER_ORDER_TARGET.fullmatch(target):
        if match[1] not in _HIGHER_ORDER_OPS:
            raise UnsafeFile(f"the higher-order operator {match[1]!r} is not one that programs hold subgraphs in")
        return target
    if target in _size_functions() or _VMAP_TARGET.fullmatch(target):
        return target
    raise UnsafeFile(f"expected the name of an operator, found {short_repr(target)}")


def check_operator_exists(target: str, argument_names: AbstractSet[str]) -> None:
    """Refuse a target of :func:`check_target` that torch does not have here as an operator with arguments of these
    names.

    torch would leave out arguments that it does not know.
    """
    if target in _size_functions():
        return
    if match := _VMAP_TARGET.fullmatch(target):
        found = getattr(predispatch, match[1], None)
        if not callable(found) or getattr(found, "__module__", None) != predispatch.__name__:
            raise UnsafeFile(f"this torch has no {short_repr(target)}")
        return
    parts = target.split(".")[2:]
    found = _find_operator(parts)
    if found is None and parts[0] == "transformers":
        register_ops_of_transformers()
        found = _find_operator(parts)
    if isinstance(found, HigherOrderOperator):
        return
    if not isinstance(found, OpOverload):
        raise UnsafeFile(
            f"there is no operator {short_repr(target)} here; import the library that registers it, then load"
        )
    if parts[0] == "aten" and not _is_in_dispatcher(parts[0], parts[1], parts[2]):
        raise UnsafeFile(
            f"expected an operator on tensors, found {short_repr(target)}, which is one of TorchScript alone"
        )
    if unknown := argument_names - {a.name for a in found._schema.arguments}:
        raise UnsafeFile(f"{target} has no argument {short_repr(min(unknown))}")


def _find_operator(parts: list[str]) -> Any:
    found: Any = torch.ops
    for part in parts:
        found = getattr(found, part, None)
    return found


@functools.cache
def _size_functions() -> dict[str, Callable[..., Any]]:
    known = [*_SYM_OPS, operator.getitem]
    return {f"{f.__module__}.{f.__name__}": f for f in known}


@functools.cache
def _dispatcher_names() -> frozenset[str]:
    return frozenset(_dispatch_get_all_op_names())


def _is_in_dispatcher(namespace: str, name: str, overload: str) -> bool:
    own = f"{namespace}::{name}" + ("" if overload == "default" else f".{overload}")
    return own in _dispatcher_names()
