"""Find the matmuls of stacked experts, where each token gets its own adapters, and make the code for them.

Some models sort the tokens by expert, and multiply each group by its expert's weight. Others multiply all tokens by all
experts. A bank has low-rank adapters at such weights. The model's own op multiplies the tokens by the factors of all
adapters, side by side for each expert.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from adaptc.passes.graph.mutation import is_view
from adaptc.passes.graph.ops import CASTS, cast
from adaptc.passes.protocol.bank_method import BankSite, RowAxis, expand_coefficients
from adaptc.passes.protocol.low_rank_rows import multiply_or_zero
from adaptc.passes.quantized.quantized_experts import GROUPED_MATMULS
from adaptc.torch_typing import is_list_or_tuple, symbolic_expression

aten = torch.ops.aten

#: ops that multiply (experts, tokens, in) by (experts, in, out), with the weight as second argument
_BATCHED = ("aten::bmm", "aten::matmul")


def skip_views(node: fx.Node, read: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return the matmul that reads a weight of experts through views, and the view that it reads.

    ``node`` is what reads the weight first, and ``read`` the node that it reads.
    """
    while len(node.all_input_nodes) == 1 and len(node.users) == 1 and is_view(node):
        node, read = next(iter(node.users)), node
    return node, read


def find_routing(node: fx.Node) -> fx.Node | None:
    """Return the node that gives experts their tokens in the order of the experts, by the tokens' indices.

    It is the nearest one above ``node``, a matmul of experts, whose value has as many tokens; None where there is none.
    """
    count, seen, waiting = _first_size(node.meta["val"]), {node}, deque([node])
    while waiting:
        for source in waiting.popleft().all_input_nodes:
            if source in seen or _first_size(source.meta.get("val")) != count:
                continue
            if source.target is aten.index.Tensor and _takes_tokens(source):
                return source
            seen.add(source)
            waiting.append(source)
    return None


def _first_size(value: Any) -> Any:
    """Return the size of a value's first axis as an expression, without a guard on it; None where it has none.

    Of several values it is that of the first.
    """
    first: Any = value[0] if is_list_or_tuple(value) and value else value
    if not isinstance(first, Tensor) or not first.ndim:
        return None
    size = first.shape[0]
    return symbolic_expression(size) if isinstance(size, torch.SymInt) else int(size)


def _takes_tokens(node: fx.Node) -> bool:
    """Return whether a node takes rows of a computed value by one tensor of indices.

    Rows of a parameter are not tokens. They may be the biases of each token's expert.
    """
    source, indices = node.args
    if not isinstance(source, fx.Node) or not is_list_or_tuple(indices) or len(indices) != 1:
        return False
    is_computed = source.op == "call_function" and source.target not in CASTS
    return isinstance(indices[0], fx.Node) and (is_computed or not isinstance(source.meta["val"].shape[0], int))


def is_expert_matmul(node: fx.Node, read: fx.Node) -> bool:
    """Return whether ``node`` multiplies tokens by ``read``, the parameter of experts or its transpose."""
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    if not name.startswith(GROUPED_MATMULS) and name not in _BATCHED:
        return False
    tokens, weight = (*node.args, None, None)[:2]
    is_matmul = isinstance(tokens, fx.Node) and tokens is not read and weight is read and read.meta["val"].ndim == 3
    return is_matmul and all(_is_transpose(view) for view in views_of_parameter(read))


def views_of_parameter(read: fx.Node) -> list[fx.Node]:
    """Return the views through which a parameter is read, in order; ``read`` is the last of them."""
    views: list[fx.Node] = []
    while is_view(read):
        views.insert(0, read)
        (read,) = read.all_input_nodes
    return views


def take_view(view: fx.Node, value: Tensor) -> Tensor:
    """Return ``value`` through the same view."""
    return view.target(value, *view.args[1:], **view.kwargs)  # type: ignore[operator]


def _is_transpose(node: fx.Node) -> bool:
    if node.target is aten.mT.default:
        return True
    axes = {int(i) % 3 for i in node.args[1:]} if node.target is aten.transpose.int else set[int]()  # type: ignore[arg-type]
    return axes == {1, 2} or (node.target is aten.permute.default and list(node.args[1]) == [0, 2, 1])  # type: ignore[arg-type]


def describe_call(node: fx.Node) -> tuple[Any, ...]:
    """Return what a matmul of experts does with its tensors, for the keys of traced regions."""
    views = len(views_of_parameter(node.all_input_nodes[1]))
    order = {n: i for i, n in enumerate(node.all_input_nodes)}
    return node.target, views, str(fx.map_arg((node.args, node.kwargs), lambda n: f"input {order[n]}"))


def make_expert_function(node: fx.Node, site: BankSite, row_axis: RowAxis) -> Callable[..., Tensor]:
    """Return the function (latest y, node's inputs..., c, slots...) -> y with the changes of each token's adapters.

    ``node`` is the matmul, whose first two inputs are the tokens and the weight. The method has factors by expert.
    """
    inputs = node.all_input_nodes
    is_transposed = (len(views_of_parameter(inputs[1])) + (site.op.kind == "experts_t")) % 2 == 1
    takes_one_dtype = getattr(node.target, "_schema").name.startswith(GROUPED_MATMULS[0])  # noqa: B009

    def change_output(latest: Tensor, *rest: Tensor) -> Tensor:
        own, (c, *tensors) = dict(zip(inputs, rest, strict=False)), rest[len(inputs) :]
        slots, scale = site.split_tensors(tensors)
        factors = site.method.bank.expert_factors(site.op, slots)
        assert factors is not None
        x = own[inputs[0]]
        dtype = x.dtype if takes_one_dtype else torch.promote_types(x.dtype, factors[0].dtype)

        def multiply(tokens: Tensor, weight: Tensor) -> Tensor:
            at = {**own, inputs[0]: cast(tokens, dtype), inputs[1]: cast(weight, dtype)}
            args, kwargs = fx.map_arg((node.args, node.kwargs), at.__getitem__)
            return node.target(*args, **kwargs)  # type: ignore[operator]

        # x W^T = (x A^T) B^T; where the model's own product is with W, it is (x B) A.
        A, B = factors if is_transposed else (factors[1].mT, factors[0].mT)
        # With the inputs innermost, as in the model's weights: matmuls over groups want rows of whole 16 bytes.
        h = multiply(x, A.transpose(0, 1).flatten(1, 2).mT)
        mix = cast(expand_coefficients(c, h, row_axis).squeeze(-2), torch.promote_types(dtype, torch.float32))
        mix = (mix if scale is None else mix * scale).unsqueeze(-1)
        # Multiplied by ones in the shape of A, so that the code has no rank as a constant.
        each = (mix * torch.ones_like(A[:, 0, :, 0], dtype=mix.dtype)).flatten(-2)
        h, up = multiply_or_zero(h, each).unsqueeze(-1), B.permute(1, 0, 3, 2).unsqueeze(3)
        if takes_one_dtype:  # zeros after each number, so that rows of any rank are of whole 16 bytes
            zeros = 16 // dtype.itemsize - 1
            h, up = F.pad(h, (0, zeros)), F.pad(up, (0, 0, 0, zeros))
        return cast(latest + multiply(h.flatten(-2), up.flatten(1, 3)), latest.dtype)

    return change_output
