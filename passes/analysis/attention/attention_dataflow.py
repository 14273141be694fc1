"""Collect what each node of a program is computed from, for ``attention``: projections, scores, attention weights.

One sweep in graph order carries, for every node,
- the nearest *projections* among its ancestors: matmuls of an activation with a parameter, and convolutions;
- the nearest *scores* among its ancestors: matmuls of two activations, with the layout of their axes;
- the softmaxes over scores whose *weights* it still holds.
Projections end at a softmax, because its result weighs features and is not a feature itself. The values that it is
multiplied with carry theirs on. Integers carry nothing, so masks, positions and routing indices need not be recognised.

The sweep is linear in the graph. The alternative, networkx ancestors of each operand in turn, is quadratic in depth:
an operand that no projection makes is reached by the whole residual stream.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from adaptc.passes.graph.module_paths import module_path, program_module_paths
from adaptc.passes.graph.mutation import has_view_schema
from adaptc.passes.graph.ops import argument
from adaptc.passes.protocol.regions import node_tag
from adaptc.torch_typing import is_list_or_tuple

T = TypeVar("T")

#: op -> positions of its two factors. The second factor's free axis is the last axis of the result.
_MATMUL_FACTORS = {
    "linear": (0, 1),
    "matmul": (0, 1),
    "mm": (0, 1),
    "bmm": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "_grouped_mm": (0, 1),
}
_CONVOLUTIONS = frozenset({"convolution", *(f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3))})
_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax", "special_softmax"})
#: ops that consume a weight without being a projection; the projections before them are not passed on
_BARRIERS = frozenset({"embedding", "embedding_bag", "lstm", "gru", "rnn_tanh", "rnn_relu"})
#: ops that read some tensor argument for its shape, dtype or device alone -> how many arguments are data
_DATA_ARGUMENTS = {
    **{f"{fill}_like": 0 for fill in ("zeros", "ones", "full", "empty", "rand", "randn")},
    **{f"new_{fill}": 0 for fill in ("zeros", "ones", "full", "empty")},
    **dict.fromkeys(("type_as", "expand_as", "view_as", "reshape_as"), 1),
}
_RESHAPES = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"})
_TRANSPOSES = frozenset({"transpose", "swapaxes", "swapdims", "t", "mT"})
_INTEGER_DTYPES = frozenset({torch.bool, torch.int16, torch.int32, torch.int64})
_OPERANDS = ("query", "key", "value")

ScoreAxes = tuple[
    Node, tuple[int | None, ...]
]  # the matmul, and for each axis of the node that carries the score the matmul's axis (negative)
AttentionBlock = tuple[
    Node, tuple[frozenset[Node], ...]
]  # the attention node, and the projections of query, key and value


@dataclass(frozen=True)
class AttentionSources:
    """The projections, scores and attention weights that reach a node.

    ``depends_on_inputs`` says that the node depends on the program's inputs. ``params`` are the parameters it is made
    of.
    """

    depends_on_inputs: bool = False
    params: frozenset[Node] = frozenset()
    projections: frozenset[Node] = frozenset()
    scores: frozenset[ScoreAxes] = frozenset()
    weights: frozenset[Node] = frozenset()

    def __or__(self, other: AttentionSources) -> AttentionSources:
        return AttentionSources(
            self.depends_on_inputs or other.depends_on_inputs,
            self.params | other.params,
            self.projections | other.projections,
            self.scores | other.scores,
            self.weights | other.weights,
        )

    @property
    def is_weight(self) -> bool:
        return bool(self.params) and not self.depends_on_inputs and not self.projections


_NO_SOURCES = AttentionSources()


class AttentionFlow:
    """The sweep over ``program`` and its results; ``blocks`` are the attention nodes in graph order."""

    def __init__(self, program: ExportedProgram) -> None:
        self.sources: dict[Node, AttentionSources] = {}
        self.parameter_names: dict[Node, str] = {}
        self._weights_by_projection: dict[Node, frozenset[Node]] = {}
        self._values_by_softmax: dict[Node, frozenset[Node]] = {}
        self.module_paths = program_module_paths(program)
        self._read_inputs(program)
        declared: dict[Node, tuple[frozenset[Node], ...]] = {}
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            operands = self._declared_operands(node)
            if operands is not None:
                declared[node] = operands
            self.sources[node] = (
                self._op_sources(node) if operands is None else self._attention_sources(node, operands[2])
            )
            self._write_back(node)
        derived = {
            softmax: (*self._score_projections(softmax), mixed) for softmax, mixed in self._values_by_softmax.items()
        }
        self.blocks: list[AttentionBlock] = sorted({**declared, **derived}.items())

    def _read_inputs(self, program: ExportedProgram) -> None:
        placeholders = program.graph.find_nodes(op="placeholder")
        for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
            if spec.kind == InputKind.PARAMETER and spec.target is not None:
                self.parameter_names[node] = spec.target
                self.sources[node] = AttentionSources(params=frozenset([node]))
            else:
                self.sources[node] = AttentionSources(depends_on_inputs=spec.kind == InputKind.USER_INPUT)

    def module_of(self, projection: Node) -> str:
        """Return the path of the module whose weight ``projection`` applies.

        A module may apply the weight of a submodule (MultiheadAttention that of its ``out_proj``). Then the path is
        the submodule's.
        """
        return self._owner_path(projection, self._weights_by_projection.get(projection, ()))

    def consumer_modules(self) -> set[str]:
        """Return the paths of all modules whose parameters some node reads."""
        return {self._owner_path(user, (p,)) for p in self.parameter_names for user in p.users}

    def _owner_path(self, node: Node, params: Iterable[Node]) -> str:
        path = module_path(node, self.module_paths)
        if node_tag(node) is not None:  # an adapter's own weights stand for the module they adapt
            return path
        owners = {self.parameter_names[p].split(".parametrizations.")[0].rpartition(".")[0] for p in params}
        inner = [o for o in owners if not path or o.startswith(path + ".")]
        return inner[0] if len(inner) == 1 and path not in owners else path

    def _declared_operands(self, node: Node) -> tuple[frozenset[Node], ...] | None:
        """Return the projections of query, key and value of an op that is attention by its schema; None for others."""
        names = [a.name for a in _schema_arguments(node)]
        if "qkv_weight" in names:  # the projections are inside the op
            self._weights_by_projection[node] = self._sources_at(argument(node, names.index("qkv_weight"))).params
            return (frozenset([node]),) * 3
        if set(_OPERANDS) <= set(names) and not any("grad" in n for n in names):
            return tuple(self._sources_at(argument(node, names.index(n))).projections for n in _OPERANDS)
        if _op_name(node) == "flex_attention":
            return tuple(self._sources_at(operand).projections for operand in node.args[:3])
        return None

    def _attention_sources(self, node: Node, value_projections: frozenset[Node]) -> AttentionSources:
        merged = self._merge(node, node.all_input_nodes)
        return AttentionSources(merged.depends_on_inputs, merged.params, value_projections - {node})

    def _op_sources(self, node: Node) -> AttentionSources:
        name = _op_name(node)
        merged = self._merge(node, node.all_input_nodes[: _DATA_ARGUMENTS.get(name)])
        if name in _SOFTMAX:
            return AttentionSources(
                merged.depends_on_inputs, merged.params, weights=frozenset([node]) if merged.scores else frozenset()
            )
        if name in _CONVOLUTIONS:
            return self._projection_sources(node, merged, argument(node, 1))
        if name in _BARRIERS:
            return AttentionSources(merged.depends_on_inputs, merged.params)
        factors = _factors(node)
        if factors is not None:
            return self._matmul_sources(node, merged, *factors)
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype in _INTEGER_DTYPES:
            return AttentionSources(merged.depends_on_inputs, merged.params)
        return merged

    def _merge(self, node: Node, inputs: Iterable[Node]) -> AttentionSources:
        sources = [near for near in map(self._sources_at, inputs) if near is not _NO_SOURCES]
        if not sources or isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)):
            return _NO_SOURCES  # a size says nothing about the data
        return AttentionSources(
            any(n.depends_on_inputs for n in sources),
            _union(n.params for n in sources),
            _union(n.projections for n in sources),
            frozenset(_follow_score(node, s) for n in sources for s in n.scores),
            _union(n.weights for n in sources),
        )

    def _projection_sources(self, node: Node, merged: AttentionSources, weight: Any) -> AttentionSources:
        self._weights_by_projection[node] = self._sources_at(weight).params
        return AttentionSources(merged.depends_on_inputs, merged.params, frozenset([node]))

    def _matmul_sources(self, node: Node, merged: AttentionSources, left: Node, right: Node) -> AttentionSources:
        a, b = self._sources_at(left), self._sources_at(right)
        # A weight kept as a buffer (a quantized one) is known by the op alone: rotary frequencies are buffers too.
        if b.is_weight or (_op_name(node) == "linear" and not b.depends_on_inputs):
            return self._projection_sources(node, merged, right)
        if a.is_weight:
            return self._projection_sources(node, merged, left)
        if a.weights and b.weights and not merged.projections:  # two weightings composed are one weighting
            return AttentionSources(merged.depends_on_inputs, merged.params, weights=merged.weights)
        for weighting, mixed in ((a, b), (b, a)):
            for softmax in weighting.weights:
                self._values_by_softmax[softmax] = self._values_by_softmax.get(softmax, frozenset()) | mixed.projections
        if merged.weights:
            return AttentionSources(merged.depends_on_inputs, merged.params, merged.projections)
        rank = _rank(node)
        return AttentionSources(
            merged.depends_on_inputs, merged.params, merged.projections, frozenset([(node, tuple(range(-rank, 0)))])
        )

    def _score_projections(self, softmax: Node) -> tuple[frozenset[Node], frozenset[Node]]:
        """Return the projections of the queries and of the keys of a softmax, which runs along the axis of the keys."""
        source = softmax.args[0]
        scores = self._sources_at(source).scores
        matmuls = [(*f, axes, n) for n, axes in scores if (f := _factors(n)) is not None]
        # Scores against positions alone (disentangled attention) come second to scores of inputs against inputs.
        primary = [
            p for p in matmuls if self._sources_at(p[0]).depends_on_inputs and self._sources_at(p[1]).depends_on_inputs
        ] or matmuls
        query: frozenset[Node] = frozenset()
        key: frozenset[Node] = frozenset()
        for left, right, axes, product in primary:
            rows, columns = self._sources_at(left).projections, self._sources_at(right).projections
            if _is_left_axis(product, axes[int(argument(softmax, 1))]):
                rows, columns = columns, rows
            query, key = query | rows, key | columns
        return query, key

    def _write_back(self, node: Node) -> None:
        """Add what ``node`` carries to the arguments it writes to (a cache), and to the tensors these are views of.

        Later readers of the arguments then see it.
        """
        for position, declared in enumerate(_schema_arguments(node)):
            if declared.alias_info is None or not declared.alias_info.is_write:
                continue
            base = argument(node, position)
            while isinstance(base, Node):
                self.sources[base] = self._sources_at(base) | self.sources[node]
                base = base.args[0] if base.args and has_view_schema(base.target) else None

    def _sources_at(self, node: Any) -> AttentionSources:
        return self.sources.get(node, _NO_SOURCES) if isinstance(node, Node) else _NO_SOURCES


def _schema_arguments(node: Node) -> list[Any]:
    schema = getattr(node.target, "_schema", None)
    return [] if schema is None else schema.arguments


def _op_name(node: Node) -> str:
    """Return the name of an ATen op without overload and in-place mark, or that of a higher-order op.

    Ops of other libraries give ''.
    """
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", "")
    namespace, _, name = schema.name.partition("::")
    return name.removesuffix("_") if namespace == "aten" else ""


def _factors(node: Node) -> tuple[Node, Node] | None:
    name = _op_name(node)
    if name == "einsum":
        operands = list(argument(node, 1))
        pair = operands if len(operands) == 2 else []
    else:
        pair = [argument(node, i) for i in _MATMUL_FACTORS.get(name, ())]
    return (pair[0], pair[1]) if len(pair) == 2 and all(isinstance(p, Node) for p in pair) else None


def _is_left_axis(matmul: Node, axis: int | None) -> bool:
    """Return whether this axis of a matmul's result comes from the left factor alone."""
    if axis is None:
        return False
    if _op_name(matmul) != "einsum":
        return axis == -2
    inputs, _, output = str(argument(matmul, 0)).replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    letter = output[axis] if -axis <= len(output) else ""
    return letter in left and letter not in right


def _follow_score(node: Node, score: ScoreAxes) -> ScoreAxes:
    """Return ``score`` with its axes as ``node`` lays them out; an elementwise op aligns them at the last one."""
    matmul, axes = score
    name, rank = _op_name(node), _rank(node)
    if name == "permute" and len(node.args[1]) == len(axes):  # type: ignore[arg-type]
        return matmul, tuple(axes[d] for d in node.args[1])  # type: ignore[union-attr]
    if name in _TRANSPOSES and len(axes) > 1:
        i, j = node.args[1:3] if len(node.args) > 2 else (-2, -1)
        swapped = list(axes)
        swapped[i], swapped[j] = swapped[j], swapped[i]  # type: ignore[index]
        return matmul, tuple(swapped)
    if name in _RESHAPES:
        return matmul, _reshape_axes(axes, _shape(node.args[0]), _shape(node))
    return matmul, (*[None] * (rank - len(axes)), *axes[max(len(axes) - rank, 0) :])


def _reshape_axes(axes: tuple[int | None, ...], old: list[str], new: list[str]) -> tuple[int | None, ...]:
    """Return ``axes`` after a reshape from sizes ``old`` to ``new``; None for an axis that the reshape does not keep.

    Axes are matched from the last one on. Axes of size one may be added or dropped in between.
    """
    new_axes: list[int | None] = [None] * len(new)
    i, j = len(old) - 1, len(new) - 1
    while i >= 0 and j >= 0:
        if old[i] == new[j]:
            new_axes[j] = axes[i]
            i, j = i - 1, j - 1
        elif old[i] == "1":
            i -= 1
        elif new[j] == "1":
            j -= 1
        else:
            break
    return tuple(new_axes)


def _rank(node: Node) -> int:
    return len(_shape(node))


def _shape(node: Any) -> list[str]:
    """Return the sizes as text: comparing symbolic sizes as numbers would add guards to the program."""
    value = node.meta.get("val")
    value = value[0] if is_list_or_tuple(value) and value else value
    return [str(size) for size in value.shape] if isinstance(value, torch.Tensor) else []


def _union(sets: Iterable[frozenset[T]]) -> frozenset[T]:
    return frozenset(chain.from_iterable(sets))
