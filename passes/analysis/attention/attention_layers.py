"""Find attention layers: the attention, its key and value projections, and its output projection.

A fused projection may make several of queries, keys and values, and lay out heads in any order. To find the outputs
that belong to a head, its outputs are numbered, and the views after the projection are run on the numbers.

Takes an opened program, with adapters in it or not, and does not change it. Errors name what was looked for and what is
there instead.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from adaptc.errors import TargetError
from adaptc.passes.analysis.attention.attention_patterns import SDPA, AttentionCore, AttentionOperand, match_attention
from adaptc.passes.analysis.costs import evaluate_at_sizes, example_sizes, size_expression
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.mutation import has_view_schema
from adaptc.passes.graph.ops import CASTS, LAYER_OPS, operands
from adaptc.passes.protocol.regions import node_tag, region_tag

aten = torch.ops.aten

#: ops that only move values, in addition to those that are views by their schema
_MOVE_OPS = (
    aten.reshape.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.flatten.using_ints,
    operator.getitem,
)
_PROJECTION_KINDS = ("linear", "addmm")


@dataclass(frozen=True)
class HeadColumns:
    """The columns of a projection's output that are keys, or values: ``count`` heads of ``width`` columns.

    The first head begins at column ``start``, and each next one ``step`` columns further on.
    """

    start: int
    step: int
    count: int
    width: int


@dataclass(frozen=True)
class KVProjection:
    """The projection that makes keys or values.

    ``node`` is its matmul. ``weight`` and ``bias`` are placeholders; ``bias`` is None where it has none.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    heads: HeadColumns


@dataclass(frozen=True)
class AttentionLayer:
    """An attention layer.

    ``core`` is the attention and ``query`` the node of its queries. ``output_projection`` is the output projection.
    """

    core: AttentionCore
    query: fx.Node
    key: KVProjection
    value: KVProjection
    output_projection: fx.Node

    def to_scores(self, matmuls: Tensor) -> Tensor:
        """Return ``matmuls``, matmuls of queries and keys, with the layer's scale and cap, before a mask or bias."""
        if self.core.node.target == SDPA:
            scale: Any = self.core.node.kwargs.get("scale")
            return matmuls * (float(self.query.meta["val"].shape[-1]) ** -0.5 if scale is None else float(scale))
        if (factor := self.core.baddbmm_alpha()) is not None:
            return matmuls * factor
        for node in self.core.score_scalings()[0]:
            matmuls = _out_of_place(node.target)(matmuls, *node.args[1:], **node.kwargs)
        return matmuls


def find_output_projection(lifted: LiftedProgram, core: fx.Node) -> fx.Node:
    """Return the output projection of the attention ``core``: the only projection that reads its output.

    Raises TargetError where there is none, or several.
    """
    seen, found, stack = {core}, list[fx.Node](), [core]
    while stack:
        for user in stack.pop().users:
            if user in seen or user.op != "call_function" or not _is_numeric(user):
                continue
            seen.add(user)
            if node_tag(user) is None and _is_projection(lifted, user):
                found.append(user)
            else:
                stack.append(user)
    if len(found) != 1:
        raise TargetError(
            f"the attention {core.name!r} must be followed by one projection, a linear layer, and there are "
            f"{len(found)}{f', {found[0].name!r} first' if found else ''}"
        )
    return found[0]


def find_attention_layer(lifted: LiftedProgram, output_projection: fx.Node) -> AttentionLayer:
    """Return the attention layer whose output projection is ``output_projection``.

    Raises TargetError where the attention, or how its keys, values or scores are made, is not understood.
    """
    cores = _nearest_nodes(lifted, operands(output_projection)[0], lambda n: _match_core(lifted, n) is not None)
    if len(cores) != 1:
        raise TargetError(f"{output_projection.name!r} must read what one attention gives, and it reads {len(cores)}")
    core = _match_core(lifted, cores[0])
    assert core is not None
    query = _without_kv_prefix(lifted, core.query)
    shape = query.meta["val"].shape
    if len(shape) != 4 or not all(isinstance(shape[i], int) for i in (1, 3)):
        raise TargetError(
            f"the queries of {core.node.name!r} have shape {tuple(map(str, shape))}; needed are four axes"
        )
    heads, width = int(shape[1]), int(shape[3])
    key = _find_projection(lifted, core, "keys", core.key, lambda total: (total // width, width))
    value = _find_projection(lifted, core, "values", core.value, lambda n: (key.heads.count, n // key.heads.count))
    if heads % key.heads.count:
        raise TargetError(
            f"{core.node.name!r} has {heads} heads of queries, and {key.heads.count} of keys do not divide them"
        )
    if (other := core.score_scalings()[1]) is not None:
        raise TargetError(
            f"{other.name!r} = {other.target} changes the scores of {core.node.name!r}, and it is not known what they "
            "are for other tokens: known are a scale, a cap (tanh), biases and masks. Capture the model with "
            "attn_implementation='sdpa', if it has it"
        )
    return AttentionLayer(core, query, key, value, output_projection)


def _out_of_place(op: Any) -> Any:
    name = op._schema.name.partition("::")[2]
    if not name.endswith("_"):
        return op
    return getattr(getattr(aten, name.removesuffix("_")), op._schema.overload_name or "default")


def _match_core(lifted: LiftedProgram, node: fx.Node) -> AttentionCore | None:
    found = match_attention(lifted, node)
    return found if isinstance(found, AttentionCore) else None


def _without_kv_prefix(lifted: LiftedProgram, operand: AttentionOperand) -> fx.Node:
    """Return the keys, values or queries of the call's own tokens, without a KV prefix that adapters put in front."""
    node = operand.node
    while (tag := region_tag(node)) is not None and tag["region"] == "cached":
        node = lifted.nodes[tag["base"]]
    return node


def _find_projection(
    lifted: LiftedProgram,
    core: AttentionCore,
    operand_name: str,
    attention_operand: AttentionOperand,
    split_columns: Callable[[int], tuple[int, int]],
) -> KVProjection:
    operand, name = _without_kv_prefix(lifted, attention_operand), core.node.name
    found = _nearest_nodes(lifted, operand, lambda n: _is_projection(lifted, n))
    if len(found) != 1:
        names = ", ".join(repr(n.name) for n in found[:3])
        raise TargetError(f"the {operand_name} of {name!r} must be made by one linear layer; found {names or 'none'}")
    node = found[0]
    columns = _operand_columns(lifted, node, operand)
    count, width = split_columns(len(columns))
    if not count or not width or len(columns) != count * width:
        raise TargetError(
            f"{node.name!r} makes {len(columns)} numbers a token for the {operand_name} of {name!r}, and heads of "
            f"{width} are needed"
        )
    step = columns[width] - columns[0] if count > 1 else width
    heads = HeadColumns(columns[0], step, count, width)
    if columns != [heads.start + i * step + j for i in range(count) for j in range(width)]:
        raise TargetError(f"the {operand_name} of {name!r} are laid out in {node.name!r} as no known model has them")
    _, weight, bias = operands(node)
    owner = _find_parameter(lifted, weight)
    assert owner is not None
    return KVProjection(node, owner, None if bias is None else _find_parameter(lifted, bias), heads)


def _is_projection(lifted: LiftedProgram, node: fx.Node) -> bool:
    return (
        node.target in LAYER_OPS
        and LAYER_OPS[node.target][0] in _PROJECTION_KINDS
        and _find_parameter(lifted, operands(node)[1]) is not None
    )


def _find_parameter(lifted: LiftedProgram, node: Any) -> fx.Node | None:
    """Return the parameter that a layer reads, seen through casts and adapters; None where it reads something else."""
    while isinstance(node, fx.Node) and node.op != "placeholder":
        if (tag := region_tag(node)) is not None:
            node = lifted.nodes[tag["base"]]
        elif node.target in CASTS:
            node = node.args[0]
        else:
            return None
    known = isinstance(node, fx.Node) and lifted.input_specs[node.name].target in lifted.state_dict
    return node if known else None


def _nearest_nodes(lifted: LiftedProgram, start: fx.Node, matches: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Return the nearest nodes for which ``matches`` holds, among ``start`` and what it is computed from.

    The search looks through adapters. It does not go past a projection or an attention.
    """
    seen: set[fx.Node] = set()
    found, stack = list[fx.Node](), [start]
    while stack:
        node = stack.pop()
        while (tag := region_tag(node)) is not None:
            node = lifted.nodes[tag["base"]]
        if node in seen:
            continue
        seen.add(node)
        if node.op != "call_function" or not _is_numeric(node):
            continue
        if matches(node):
            found.append(node)
        elif not _is_projection(lifted, node) and _match_core(lifted, node) is None:
            stack += node.all_input_nodes
    return found


def _is_numeric(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.dtype is not torch.bool)


def _operand_columns(lifted: LiftedProgram, projection: fx.Node, operand: fx.Node) -> list[int]:
    """Return the numbers of the outputs of ``projection`` that ``operand`` holds, head by head.

    The search ends at an op that is no view (a rotation, a norm): such ops leave the outputs in their places.
    """
    ancestors = _ancestors(operand)
    sizes = example_sizes(lifted.program)
    shape = [_example_size(s, sizes) for s in projection.meta["val"].shape]
    value: Any = torch.arange(shape[-1]).expand(shape)
    node = projection
    while node is not operand:
        readers = [u for u in _last_adapter_output(lifted, node).users if u in ancestors and u.op == "call_function"]
        if len(readers) != 1:
            break
        reader = readers[0]
        if reader.target in CASTS:
            node = reader
            continue
        if reader.target not in _MOVE_OPS and not has_view_schema(reader.target):
            break
        value = _run_view(reader, value, sizes)
        node = reader
    return list(dict.fromkeys(value.flatten().tolist()))


def _last_adapter_output(lifted: LiftedProgram, node: fx.Node) -> fx.Node:
    """Return the output of the last adapter at ``node``, or ``node`` itself where no adapter is."""
    region_outputs = {tag["base"]: n for n in lifted.graph.nodes if (tag := region_tag(n)) is not None}
    while node.name in region_outputs:
        node = region_outputs[node.name]
    return node


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """Return a node and all tensors that it is computed from."""
    seen, stack = {node}, [node]
    while stack:
        fresh = {n for n in stack.pop().all_input_nodes if n not in seen and _is_numeric(n)}
        seen |= fresh
        stack += fresh
    return seen


def _run_view(node: fx.Node, value: Any, sizes: Mapping[str, int]) -> Any:
    """Return the result of the view ``node`` on ``value``, with the program's example sizes."""

    def argument_value(n: fx.Node) -> Any:
        found = n.meta.get("val")
        return value if _is_numeric(n) else _example_size(found, sizes)

    args, kwargs = fx.map_arg((node.args, node.kwargs), argument_value)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _example_size(size: Any, sizes: Mapping[str, int]) -> int:
    return int(evaluate_at_sizes(size_expression(size), sizes))
