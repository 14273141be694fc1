"""Check that the parts of a program's file fit one another: names exist, and tensors are as the graph has them.

torch assumes this. Where it is not so, torch fails late, or computes with other numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from adaptc.safe_pt2.containers import read_tree
from adaptc.safe_pt2.names import identifier, plain
from adaptc.safe_pt2.refusal import UnsafeFile
from adaptc.safe_pt2.schema import schema

_SYMS = (schema.SymIntArgument, schema.SymFloatArgument, schema.SymBoolArgument)


@dataclasses.dataclass
class Uses:
    """The requirements of a program on the process that loads it.

    ``targets`` maps each operator to the names of its arguments. ``types`` are the types of its inputs and outputs.
    """

    targets: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    types: set[str] = dataclasses.field(default_factory=set)


def check_consistent(
    parts: schema.ExportedProgram, weights: schema.PayloadConfig, constants: schema.PayloadConfig
) -> Uses:
    """Return what the program uses. Raises UnsafeFile, with the place in the program's JSON, where parts do not fit."""
    uses = Uses()
    module = parts.graph_module
    _step(".graph_module.graph", lambda: _graph(module.graph, uses))
    for text in module.graph.inputs:
        if text.type == "as_string":
            plain(text.value)  # torch writes it into the source of guards
    _step(".graph_module.signature", lambda: _signature(module, weights, constants))
    for at, entry in enumerate(module.module_call_graph):
        if entry.signature is not None:
            _step(f".graph_module.module_call_graph[{at}]", lambda e=entry: _calls(module, e, uses))
    if not module.module_call_graph or module.module_call_graph[0].signature is None:
        raise UnsafeFile("it does not say how the program is called", ".graph_module.module_call_graph")
    return uses


def _step(place: str, check: Any) -> None:
    try:
        check()
    except UnsafeFile as error:
        raise error.inside(place) from None


def _names(value: Any) -> Iterator[str]:
    """Yield the names of the graph's values that occur in an argument."""
    if isinstance(value, list):
        for v in value:
            yield from _names(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from _names(v)
    elif isinstance(value, (schema.TensorArgument, schema.TokenArgument)):
        yield value.name
    elif isinstance(value, _SYMS):
        if value.type == "as_name":
            yield value.value
    elif isinstance(value, (schema.Argument, schema.OptionalTensorArgument)):
        yield from _names(value.value)


def _subgraphs(value: Any, uses: Uses) -> Iterator[schema.GraphArgument]:
    if isinstance(value, list):
        for v in value:
            yield from _subgraphs(v, uses)
    elif isinstance(value, dict):
        for v in value.values():
            yield from _subgraphs(v, uses)
    elif isinstance(value, schema.Argument):
        if value.type == "as_graph":
            yield value.value
        elif value.type == "as_operator":
            uses.targets.setdefault(value.value, set())
        else:
            yield from _subgraphs(value.value, uses)


def _graph(graph: schema.Graph, uses: Uses) -> None:
    known = {n for i in graph.inputs for n in _names(i)}
    described = graph.tensor_values.keys() | graph.sym_int_values.keys()
    described |= graph.sym_bool_values.keys() | graph.sym_float_values.keys()
    for at, node in enumerate(graph.nodes):
        names = [i.name for i in node.inputs if i.name]
        if len(set(names)) != len(names):
            raise UnsafeFile("it has two arguments of one name", f".nodes[{at}].inputs")
        uses.targets.setdefault(node.target, set()).update(names)
        for argument in node.inputs:
            _defined(_names(argument.arg), known, f".nodes[{at}].inputs")
            for inner in _subgraphs(argument.arg, uses):
                _step(f".nodes[{at}].inputs[{argument.name!r}]", lambda g=inner: _graph(g.graph, uses))
        known.update(n for o in node.outputs for n in _names(o))
    _defined((n for o in graph.outputs for n in _names(o)), known, ".outputs")
    for name in known - described:
        raise UnsafeFile(f"the graph has {name!r}, and nothing says of what shape it is")


def _defined(names: Iterator[str], known: set[str], place: str) -> None:
    for name in names:
        if name not in known:
            raise UnsafeFile(f"it reads {name!r}, which nothing before it computes", place)


def _signature(module: schema.GraphModule, weights: schema.PayloadConfig, constants: schema.PayloadConfig) -> None:
    specs, graph = module.signature, module.graph
    if len(specs.input_specs) != len(graph.inputs) or len(specs.output_specs) != len(graph.outputs):
        raise UnsafeFile(
            f"it names {len(specs.input_specs)} inputs and {len(specs.output_specs)} outputs, and the graph has "
            f"{len(graph.inputs)} and {len(graph.outputs)}"
        )
    for at, spec in enumerate(specs.input_specs):
        of: tuple[str, schema.PayloadConfig] | None = None
        if spec.type == "parameter":
            of = spec.parameter.parameter_name, weights
        elif spec.type == "buffer":
            of = spec.buffer.buffer_name, weights if spec.buffer.persistent else constants
        elif spec.type == "tensor_constant":
            of = spec.tensor_constant.tensor_constant_name, constants
        if of is not None:
            _step(f".input_specs[{at}]", lambda o=of, s=spec: _tensor(o[0], s.value.arg.name, o[1], graph))


def _tensor(fqn: str, name: str, table: schema.PayloadConfig, graph: schema.Graph) -> None:
    """Raise UnsafeFile where a stored tensor has another dtype or shape than the graph was made for."""
    if fqn not in table.config:
        raise UnsafeFile(f"no tensor called {fqn!r} is in the file")
    if name not in graph.tensor_values:
        raise UnsafeFile(f"the graph has no tensor {name!r}, which {fqn!r} should be")
    found, wanted = table.config[fqn].tensor_meta, graph.tensor_values[name]
    if found is None:
        return  # read_tensors() refuses it
    sizes = [[s.value if s.type == "as_int" else None for s in m.sizes] for m in (found, wanted)]
    same = len(sizes[0]) == len(sizes[1]) and all(None in (a, b) or a == b for a, b in zip(*sizes, strict=True))
    if not same or found.dtype != wanted.dtype:
        raise UnsafeFile(
            f"{fqn!r} is stored as a {schema.ScalarType(found.dtype).name} of {sizes[0]}, and the graph reads a "
            f"{schema.ScalarType(wanted.dtype).name} of {sizes[1]}"
        )


def _calls(module: schema.GraphModule, entry: schema.ModuleCallEntry, uses: Uses) -> None:
    signature = entry.signature
    assert signature is not None
    trees = [_read(f".{n}", getattr(signature, n)) for n in ("in_spec", "out_spec")]
    for tree in trees:
        uses.types |= tree.types
    for key in trees[0].keywords or ():
        identifier(str(key))  # torch writes it into the source of forward
    if entry.fqn:
        return
    specs = module.signature
    inputs = sum(s.type in ("user_input", "constant_input") for s in specs.input_specs)
    outputs = sum(s.type in ("user_output", "loss_output") for s in specs.output_specs)
    if [t.leaves for t in trees] != [inputs, outputs]:
        raise UnsafeFile(
            f"its trees have {trees[0].leaves} inputs and {trees[1].leaves} outputs, and the signature {inputs} and "
            f"{outputs}"
        )


def _read(place: str, text: str) -> Any:
    try:
        return read_tree(text)
    except UnsafeFile as error:
        raise error.inside(place) from None
