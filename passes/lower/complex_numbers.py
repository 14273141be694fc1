"""Write complex numbers as pairs of real ones, for compilers that make no code for complex numbers.

Rotary positions are often a product of complex numbers:

    before    view_as_real(view_as_complex(x) * rotary)
    after     stack([x0 * cos - x1 * sin, x0 * sin + x1 * cos], -1)

Each complex value becomes two real values of its shape. Values that are computed from each other are all written so, or
none of them is. An op that is not known here, such as a Fourier transform, keeps all of them complex, and so does a
write to their memory.

A block in which autocast is off, where many models compute their positions, becomes a part of the graph around it. So
the pass is for graphs that run without autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx

from adaptc.passes.graph.mutation import find_written_nodes, is_metadata_assert
from adaptc.passes.graph.pass_infra import GraphPass, PassResult
from adaptc.passes.graph.propagate import propagate_fakes

aten = torch.ops.aten

#: ops that move, copy or negate elements, so that both parts go through the same op
_PART_BY_PART = frozenset(
    (
        aten.alias.default,
        aten.cat.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.expand.default,
        aten.flatten.using_ints,
        aten.index.Tensor,
        aten.index_select.default,
        aten.movedim.int,
        aten.narrow.default,
        aten.neg.default,
        aten.permute.default,
        aten.repeat.default,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.stack.default,
        aten.transpose.int,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.view.default,
    )
)
#: casts, with the position of their dtype among the arguments; None where it is a keyword alone
_CASTS: Mapping[Any, int | None] = {
    aten._to_copy.default: None,
    aten.to.device: 2,
    aten.to.dtype: 1,
    aten.to.dtype_layout: None,
}
#: ops whose tensors must all be complex, of one dtype; sums take numbers, too
_OF_ONE_DTYPE = frozenset((aten.add.Tensor, aten.sub.Tensor, aten.cat.default, aten.stack.default))


class Pair(NamedTuple):
    """The nodes or numbers of the real and the imaginary parts of a value; ``imaginary`` is None for a real one."""

    real: Any
    imaginary: Any = None


@dataclass(frozen=True)
class SplitComplex(GraphPass):
    """A pass that writes complex values as pairs; its count is that of the values. ``notes`` name ops not known.

    ``modules`` holds the graphs of blocks; None where there are none. Without ``updates_values`` the new nodes have no
    fake values, for a graph that will be traced again.
    """

    name: ClassVar[str] = "split_complex"

    modules: torch.nn.Module | None = None
    updates_values: bool = True

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        if self.modules is not None:
            _inline_blocks_without_autocast(subject, self.modules)
        chosen, notes = set[fx.Node](), list[str]()
        groups = _groups_of(subject)
        written, _ = find_written_nodes(subject) if groups else (set[fx.Node](), None)
        for group in groups:
            unknown = [n for n in group if not _is_known(n)]
            notes += [f"{n.name}: {n.target} is not written with pairs" for n in unknown]
            if changed := [n for n in group if n in written]:
                unknown += changed
                notes.append(f"{changed[0].name}: its memory is written to")
            chosen |= set[fx.Node]() if unknown else group
        writer = _PairWriter(subject)
        for node in [n for n in subject.nodes if n in chosen]:
            writer.write(node)
        for node in reversed(writer.replaced):
            subject.erase_node(node)
        if self.updates_values and writer.made:
            propagate_fakes(subject, writer.made, self.modules)
        return PassResult(subject, len(writer.pairs), tuple(notes))


def _inline_blocks_without_autocast(graph: fx.Graph, modules: torch.nn.Module) -> None:
    """Put the nodes of blocks with complex values, in which autocast is off, in place of the blocks."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.wrap_with_autocast):
        _, _, is_enabled, _, body, *operands = node.args
        block: Any = getattr(modules, str(body.target))
        inside = list(block.graph.nodes)
        has_complex = any(map(_is_complex, inside))
        if is_enabled or not has_complex or any(n.op == "get_attr" for n in inside):
            continue
        new = dict(zip(block.graph.find_nodes(op="placeholder"), operands, strict=True))
        with graph.inserting_before(node):
            for n in inside:
                if n.op == "call_function":
                    new[n] = graph.node_copy(n, new.__getitem__)
        results: Any = fx.map_arg(block.graph.output_node().args[0], new.__getitem__)
        for reader in list(node.users):  # each takes one result
            reader.replace_all_uses_with(results[reader.args[1]])
            graph.erase_node(reader)
        graph.erase_node(node)
        if not body.users:
            graph.erase_node(body)


def _value_of(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def _is_complex(node: Any) -> bool:
    return isinstance(value := _value_of(node), Tensor) and value.is_complex()


def _groups_of(graph: fx.Graph) -> list[set[fx.Node]]:
    """Return the nodes that have or read complex values, those that are computed from each other in one set."""
    group_of: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        read = [n for n in node.all_input_nodes if _is_complex(n)]
        if read or _is_complex(node):
            joined = {node}.union(*(group_of[n] for n in read))
            group_of |= dict.fromkeys(joined, joined)
    groups = {id(g): g for g in group_of.values()}.values()
    return [g for g in groups if any(n.op == "call_function" for n in g)]


def _is_known(node: fx.Node) -> bool:
    dtype = node.meta["val"].dtype if _is_complex(node) else None
    if is_metadata_assert(node):
        return True
    if dtype is torch.complex32 or node.op not in ("placeholder", "get_attr", "call_function"):
        return False
    if node.op != "call_function":
        return True
    read = [v.dtype for n in node.all_input_nodes if isinstance(v := _value_of(n), Tensor)]
    if node.target in _OF_ONE_DTYPE:
        return set(read) == {dtype}
    if node.target is aten.complex.default:
        return len({str(tuple(_value_of(n).shape)) for n in node.args}) == 1
    if node.target in _CASTS:
        return dtype is not None
    return node.target in _PART_BY_PART or node.target in _RULES


class _PairWriter:
    """A graph that is being written with pairs.

    ``pairs``: a complex node -> its pair. ``made``: the new nodes. ``replaced``: the nodes that nothing reads now.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.pairs: dict[fx.Node, Pair] = {}
        self.made: list[fx.Node] = []
        self.replaced: list[fx.Node] = []

    def write(self, node: fx.Node) -> None:
        """Write the pair of a complex node, or what replaces a real node that reads pairs."""
        if node.op != "call_function":  # an input stays as it is
            after_inputs = next(n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr"))
            with self.graph.inserting_before(after_inputs if node.op == "placeholder" else node.next):
                both = self.call(aten.view_as_real.default, node)
                self.pairs[node] = Pair(*(self.call(aten.select.int, both, -1, i) for i in range(2)))
            return
        self.replaced.append(node)
        if is_metadata_assert(node):
            return
        with self.graph.inserting_before(node):
            if node.target in _CASTS:
                made = self._cast(node)
            elif node.target in _PART_BY_PART:
                made = Pair(*(self._apply_to_part(node, i) for i in range(2)))
            else:
                made = _RULES[node.target](self, *map(self.pair_of, node.args), **node.kwargs)
        if _is_complex(node):
            self.pairs[node] = made
        else:
            node.replace_all_uses_with(made.real)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        self.made.append(node)
        return node

    def pair_of(self, argument: Any) -> Pair:
        """Return the pair of an argument, which may be real."""
        if isinstance(argument, complex):
            return Pair(argument.real, argument.imag)
        return self.pairs[argument] if _is_complex(argument) else Pair(argument)

    def _apply_to_part(self, node: fx.Node, part: int) -> fx.Node:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.pairs[n][part] if n in self.pairs else n)
        # The parts of a pair lie apart in memory, which a view may not take.
        return self.call(aten.reshape.default if node.target is aten.view.default else node.target, *args, **kwargs)

    def _cast(self, node: fx.Node) -> Pair:
        args, kwargs, place = list(node.args), dict(node.kwargs), _CASTS[node.target]
        dtype = node.meta["val"].dtype.to_real()
        if place is not None and len(args) > place and args[place] is not None:
            args[place] = dtype
        elif kwargs.get("dtype") is not None:
            kwargs["dtype"] = dtype
        parts = self.pair_of(args[0])
        real, *imaginary = (self.call(node.target, p, *args[1:], **kwargs) for p in parts if p is not None)
        return Pair(real, imaginary[0] if imaginary else self.call(aten.zeros_like.default, real))

    # -- arithmetic ----------------------------------------------------------------------------------------------------

    def view_as_complex(self, x: Pair) -> Pair:
        return Pair(*(self.call(aten.select.int, x.real, -1, i) for i in range(2)))

    def view_as_real(self, x: Pair) -> Pair:
        return Pair(self.call(aten.stack.default, [x.real, x.imaginary], -1))

    def polar(self, length: Pair, angle: Pair) -> Pair:
        functions = aten.cos.default, aten.sin.default
        return Pair(*(self.call(aten.mul.Tensor, length.real, self.call(f, angle.real)) for f in functions))

    def complex(self, real: Pair, imaginary: Pair) -> Pair:
        return Pair(real.real, imaginary.real)

    def real(self, x: Pair) -> Pair:
        return Pair(x.real)

    def imag(self, x: Pair) -> Pair:
        return Pair(x.imaginary)

    def abs(self, x: Pair) -> Pair:
        return Pair(self.call(aten.hypot.default, x.real, x.imaginary))

    def conj(self, x: Pair) -> Pair:
        return Pair(x.real, self.call(aten.neg.default, x.imaginary))

    def same(self, x: Pair) -> Pair:
        return x

    def add(self, x: Pair, y: Pair, **options: Any) -> Pair:
        return self._sum(aten.add.Tensor, x, y, options)

    def sub(self, x: Pair, y: Pair, **options: Any) -> Pair:
        return self._sum(aten.sub.Tensor, x, y, options)

    def _sum(self, op: Any, x: Pair, y: Pair, options: Mapping[str, Any]) -> Pair:
        # A real number does not change the imaginary part.
        return Pair(*(a if b is None else self.call(op, a, b, **options) for a, b in zip(x, y, strict=True)))

    def sym_size(self, x: Pair, axis: Pair) -> Pair:
        return Pair(self.call(aten.sym_size.int, x.real, axis.real))

    def mul(self, x: Pair, y: Pair) -> Pair:
        if x.imaginary is None or y.imaginary is None:
            whole, factor = (y, x) if x.imaginary is None else (x, y)
            return Pair(*(self._product(part, factor.real) for part in whole))
        return Pair(
            self.call(aten.sub.Tensor, self._product(x.real, y.real), self._product(x.imaginary, y.imaginary)),
            self.call(aten.add.Tensor, self._product(x.real, y.imaginary), self._product(x.imaginary, y.real)),
        )

    def _product(self, a: Any, b: Any) -> Any:
        tensor, factor = (a, b) if isinstance(a, fx.Node) else (b, a)
        return self.call(aten.mul.Tensor, tensor, factor)


#: op -> the method that writes it, which takes the pairs of the op's arguments
_RULES: Mapping[Any, Callable[..., Pair]] = {
    aten.abs.default: _PairWriter.abs,
    aten.add.Tensor: _PairWriter.add,
    aten.complex.default: _PairWriter.complex,
    aten._conj.default: _PairWriter.conj,
    aten.conj.default: _PairWriter.conj,
    aten.imag.default: _PairWriter.imag,
    aten.mul.Tensor: _PairWriter.mul,
    aten.polar.default: _PairWriter.polar,
    aten.real.default: _PairWriter.real,
    aten.resolve_conj.default: _PairWriter.same,
    aten.sub.Tensor: _PairWriter.sub,
    aten.sym_size.int: _PairWriter.sym_size,
    aten.view_as_complex.default: _PairWriter.view_as_complex,
    aten.view_as_real.default: _PairWriter.view_as_real,
}
