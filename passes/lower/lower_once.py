"""Lower equal ops of a graph once.

Takes the graph of a program for inference, and a function that lowers a graph to the ops that a compiler knows. Layers
that are equal are then not traced one by one. Ops with equal arguments, on tensors that look alike, are lowered
together, and the result takes the place of each of them. The lowered graph computes what the function makes of the
whole graph, to the bit.

What is not understood raises :class:`NotOnce`, such as ops that write, subgraphs, or sizes that only data tell. So does
an op whose lowered form gives a tensor of another layout than the graph says. The ops that read it would be lowered for
the wrong layout.

The fake tensors of equal nodes are one object. So they do not tell which nodes share memory: who needs that computes
them again, as inductor does.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from torch import SymInt, Tensor, fx

from adaptc.passes.graph.lifted import fake_mode_of
from adaptc.passes.graph.mutation import is_metadata_assert, is_pure
from adaptc.torch_typing import is_dict, is_list_or_tuple, symbolic_expression

aten = torch.ops.aten

#: (a graph, a value for each of its placeholders) -> a lowered graph that has as many placeholders and outputs
Lower = Callable[[fx.Graph, Sequence[Any]], fx.Graph]

#: metadata that tells where in the model a node comes from; that of the node replaces that of its lowered form
_ORIGIN = ("stack_trace", "nn_module_stack", "torch_fn", "from_node", "custom", "seq_nr")
#: operations of which the sizes of lowered graphs are made
_ARITHMETIC: Mapping[Any, Callable[[Any, Any], Any]] = {sympy.Add: operator.add, sympy.Mul: operator.mul}


class NotOnce(Exception):
    """The reason why a graph must be lowered as a whole."""


class Lowered(NamedTuple):
    """A lowered graph, the number of ops that there were, and how many of them were lowered."""

    graph: fx.Graph
    ops: int
    distinct: int


def lower_once(graph: fx.Graph, attributes: Mapping[str, Tensor], lower: Lower) -> Lowered:
    """Return a lowered copy of ``graph``.

    ``attributes`` maps the names of the attributes that the graph may read to fake tensors. The copy has a placeholder
    for each of them, in this order, and then those of the graph. Raises NotOnce where ops cannot be lowered one by one.
    """
    cases = _Cases(fake_mode_of(graph), attributes)
    for node in graph.nodes:
        cases.see(node)
    written = _Writer(cases.keys, cases.lowered(lower)).write(graph, attributes)
    return Lowered(written, len(cases.keys), len(cases.cases))


class _Case(NamedTuple):
    """An op to lower: the first of equal nodes, and the nodes that it reads."""

    node: fx.Node
    inputs: tuple[fx.Node, ...]


class _Form(NamedTuple):
    """An op as it was lowered: placeholders for what it reads, its nodes in order without sizes, and its results."""

    inputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]


class _Cases:
    """The distinct ops of a graph by keys that are equal for equal ops, and the key of each node."""

    def __init__(self, mode: Any, attributes: Mapping[str, Tensor]) -> None:
        self.mode, self.attributes = mode, attributes
        self.cases: dict[Any, _Case] = {}
        self.keys: dict[fx.Node, Any] = {}
        self._looks: dict[fx.Node, Any] = {}

    def see(self, node: fx.Node) -> None:
        """Add a node. Raises NotOnce for one that is not understood."""
        if node.op == "output":
            return
        value = node.meta.get("val")
        if node.op == "get_attr":
            if (value := self.attributes.get(str(node.target))) is None:
                raise NotOnce(f"{node.target} is neither a parameter nor a buffer")
        elif is_metadata_assert(node):
            self._check(node)
        elif (
            node.op == "call_function" and node.target is not operator.getitem and not isinstance(value, (SymInt, int))
        ):
            self._add(node)
        elif node.op not in ("call_function", "placeholder"):
            raise NotOnce(f"the graph has a {node.op} of {node.target}")
        self._looks[node] = self._look(value)

    def _check(self, node: fx.Node) -> None:
        if any(a is not None for a in node.args[1:3]):
            raise NotOnce(f"{node.target} checks sizes")
        tensor = node.args[0]
        assert isinstance(tensor, fx.Node)
        assert callable(node.target)
        value = self.attributes[str(tensor.target)] if tensor.op == "get_attr" else tensor.meta["val"]
        node.target(value, *node.args[1:], **node.kwargs)

    def _add(self, node: fx.Node) -> None:
        if not is_pure(node):
            raise NotOnce(f"{node.target} may do more than compute its value")
        inputs = tuple(node.all_input_nodes)
        numbers = {n: i for i, n in enumerate(inputs)}
        arguments = self._arguments(node.args, numbers), self._arguments(node.kwargs, numbers)
        self.keys[node] = key = (node.target, arguments, *(self._looks[n] for n in inputs))
        self.cases.setdefault(key, _Case(node, inputs))

    def _arguments(self, value: Any, numbers: Mapping[fx.Node, int]) -> Any:
        if isinstance(value, fx.Node):
            return fx.Node, numbers[value]
        if is_list_or_tuple(value):
            return tuple, *(self._arguments(v, numbers) for v in value)
        if is_dict(value):
            return dict, *((k, self._arguments(v, numbers)) for k, v in value.items())
        return self._look(value)

    def _look(self, value: Any) -> Any:
        """Return a key that is equal for values which lowering does not tell apart."""
        if isinstance(value, Tensor):
            own = getattr(value, "fake_mode", None) is self.mode
            if not own or value.layout is not torch.strided or value.is_conj() or value.is_neg():
                raise NotOnce("the graph has tensors of special kinds")
            sizes = (*value.shape, *value.stride(), value.storage_offset())
            return Tensor, value.dtype, value.device, *map(_expression, sizes)
        if isinstance(value, SymInt):
            return SymInt, _expression(value)
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            raise NotOnce("the graph computes with numbers other than sizes")
        if is_list_or_tuple(value):
            return tuple, *map(self._look, value)
        return type(value), repr(value)  # the text tells 0.0 from -0.0

    def lowered(self, lower: Lower) -> dict[Any, _Form]:
        """Return the lowered form of each case. All are lowered as one graph that has nothing but them."""
        graph, values = fx.Graph(), list[Any]()
        inputs, outputs = dict[Any, list[fx.Node]](), dict[Any, list[fx.Node]]()
        for key, case in self.cases.items():
            inputs[key] = [graph.placeholder(f"{case.node.name}_{i}") for i in range(len(case.inputs))]
            with self.mode:
                values += [self._alone(n) for n in case.inputs]
        for key, case in self.cases.items():
            node = graph.node_copy(case.node, dict(zip(case.inputs, inputs[key], strict=True)).__getitem__)
            count = _count(case.node)
            parts = (
                [node] if count is None else [graph.call_function(operator.getitem, (node, i)) for i in range(count)]
            )
            outputs[key] = parts
        graph.output(tuple(n for parts in outputs.values() for n in parts))
        return self._forms(inputs, outputs, lower(graph, values))

    def _forms(self, inputs: Mapping[Any, Any], outputs: Mapping[Any, Any], made: fx.Graph) -> dict[Any, _Form]:
        places: Sequence[fx.Node] = list(made.find_nodes(op="placeholder"))
        results: Any = made.output_node().args[0]
        if (len(places), len(results)) != tuple(sum(map(len, x.values())) for x in (inputs, outputs)):
            raise NotOnce("ops change their inputs or outputs when they are lowered")
        order = {node: i for i, node in enumerate(made.nodes)}
        forms: dict[Any, _Form] = {}
        place, result = iter(places), iter(results)
        for key, case in self.cases.items():
            starts, ends = tuple(next(place) for _ in inputs[key]), tuple(next(result) for _ in outputs[key])
            forms[key] = _Form(starts, _between(starts, ends, order), ends)
            whole = case.node.meta["val"]
            for old, new in zip([whole] if isinstance(whole, Tensor) else whole, ends, strict=True):
                if self._look(old) != self._look(new.meta["val"]):
                    raise NotOnce(f"{case.node.target} gives {new.meta['val']} when it is lowered, not {old}")
        return forms

    def _alone(self, node: fx.Node) -> Any:
        """Return the value of a node with memory of its own."""
        value = self.attributes[str(node.target)] if node.op == "get_attr" else node.meta["val"]
        if not isinstance(value, Tensor):
            return value
        alone = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        offset = value.storage_offset()
        return alone.as_strided(value.shape, value.stride(), offset) if _expression(offset) != 0 else alone


def _count(node: fx.Node) -> int | None:
    """Return how many tensors an op gives; None for one that is no list. Raises NotOnce for other values."""
    value = node.meta.get("val")
    if is_list_or_tuple(value) and all(isinstance(v, Tensor) for v in value):
        return len(value)
    if not isinstance(value, Tensor):
        raise NotOnce(f"{node.target} gives something else than tensors")
    return None


def _expression(size: Any) -> Any:
    """Return a size as an int or an expression, the same for sizes that are written in two ways.

    The stride of a reshaped tensor may be the least of a size and its multiples. sympy finds that this is the size,
    and torch's own class for it does not.
    """
    if not isinstance(size, SymInt):
        return size
    return symbolic_expression(size).replace(_is_extreme, _by_sympy)


def _is_extreme(expression: Any) -> bool:
    return type(expression).__name__ in ("Min", "Max")


def _by_sympy(extreme: Any) -> Any:
    return getattr(sympy, type(extreme).__name__)(*extreme.args)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (SymInt, int))


def _between(starts: Iterable[fx.Node], ends: Iterable[Any], order: Mapping[fx.Node, int]) -> tuple[fx.Node, ...]:
    """Return the nodes that compute ``ends`` from the placeholders ``starts``, in order, without sizes."""
    known, found, todo = set(starts), set[fx.Node](), list(ends)
    while todo:
        node = todo.pop()
        if not isinstance(node, fx.Node) or (node not in known and node.op != "call_function" and not _is_size(node)):
            raise NotOnce(f"lowering makes {node}, which no op of its own computes")
        if node not in known and node not in found and not _is_size(node):
            found.add(node)
            todo += node.all_input_nodes
    return tuple(sorted(found, key=order.__getitem__))


class _Writer:
    """A lowered graph in the making.

    ``new`` maps nodes to their copies, and nodes of several results to tuples. ``sizes`` maps the expression of a size
    to its node, and ``axes`` to a tensor that has it along an axis.
    """

    def __init__(self, keys: Mapping[fx.Node, Any], forms: Mapping[Any, _Form]) -> None:
        self.keys, self.forms = keys, forms
        self.graph = fx.Graph()
        self.new: dict[fx.Node, Any] = {}
        self.sizes: dict[Any, fx.Node] = {}
        self.axes: dict[Any, tuple[fx.Node, int]] = {}

    def write(self, graph: fx.Graph, attributes: Mapping[str, Tensor]) -> fx.Graph:
        places = {name: self._placeholder(value) for name, value in attributes.items()}
        for node in graph.nodes:
            if node.op == "placeholder":
                self.new[node] = self._placeholder(node.meta.get("val"))
            elif node.op == "get_attr":
                self.new[node] = places[str(node.target)]
            elif node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self.new.__getitem__)).meta.update(node.meta)
            elif node in self.keys:
                self.new[node] = self._form(node)
            elif node.target is operator.getitem:
                whole, index = node.args
                self.new[node] = self.new[whole][index]
            elif _is_size(node):
                self.new[node] = self._size(node)
        self.graph.eliminate_dead_code()
        return self.graph

    def _placeholder(self, value: Any) -> fx.Node:
        return self._seen(self.graph.placeholder(f"arg{len(self.graph.nodes)}"), value)

    def _seen(self, node: fx.Node, value: Any) -> fx.Node:
        node.meta["val"] = value
        for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(size, SymInt):
                self.axes.setdefault(_expression(size), (node, axis))
        return node

    def _form(self, node: fx.Node) -> Any:
        """Write the lowered form of a node and return its result, or the tuple of its results."""
        form, origin = self.forms[self.keys[node]], {k: node.meta[k] for k in _ORIGIN if k in node.meta}
        own = {place: self.new[n] for place, n in zip(form.inputs, node.all_input_nodes, strict=True)}

        def of(n: fx.Node) -> Any:
            return own[n] if n in own else self._size(n)

        for n in form.nodes:
            args, kwargs = fx.map_arg(n.args, of), fx.map_arg(n.kwargs, of)
            own[n] = copy = self.graph.create_node("call_function", n.target, args, kwargs, n.name)  # pyright: ignore[reportArgumentType]
            copy.meta = {**n.meta, **origin}
            self._seen(copy, n.meta["val"])
        results = tuple(own[n] for n in form.results)
        return results if _count(node) is not None else results[0]

    def _size(self, node: fx.Node) -> Any:
        return self._number(sympy.sympify(_expression(node.meta["val"])))

    def _number(self, wanted: Any) -> Any:
        """Return the node of a size that is given as an expression, or an int."""
        if wanted.is_Integer:
            return int(wanted)
        if wanted in self.sizes:
            return self.sizes[wanted]
        if wanted in self.axes:
            tensor, axis = self.axes[wanted]
            made = self.graph.call_function(aten.sym_size.int, (tensor, axis))
            made.meta["val"] = tensor.meta["val"].shape[axis]
        elif wanted.func in _ARITHMETIC:
            join = functools.partial(self._joined, _ARITHMETIC[wanted.func])
            made = functools.reduce(join, [self._number(a) for a in wanted.args])
        else:
            raise NotOnce(f"no tensor before its use has the size {wanted}")
        self.sizes[wanted] = made
        return made

    def _joined(self, op: Callable[[Any, Any], Any], a: Any, b: Any) -> fx.Node:
        node = self.graph.call_function(op, (a, b))
        node.meta["val"] = op(*(x.meta["val"] if isinstance(x, fx.Node) else x for x in (a, b)))
        return node
