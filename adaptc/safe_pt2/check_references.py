"""Check that the parts of a program's file fit one another: names exist, and tensors are as the graph has them.

torch assumes this. Where it is not so, torch fails late, or computes with other numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from adaptc.archives.containers import read_tree_spec
from adaptc.archives.names import check_identifier, check_plain
from adaptc.archives.refusal import UnsafeFile
from adaptc.safe_pt2.schema import schema

_SYM_ARGUMENTS = (schema.SymIntArgument, schema.SymFloatArgument, schema.SymBoolArgument)


@dataclasses.dataclass
class ProgramRequirements:
    """The requirements of a program on the process that loads it.

    ``targets`` maps each operator to the names of its arguments. ``types`` are the types of its inputs and outputs.
    """

    targets: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    container_types: set[str] = dataclasses.field(default_factory=set)


def check_references(
    program: schema.ExportedProgram, weights: schema.PayloadConfig, constants: schema.PayloadConfig
) -> ProgramRequirements:
    """Return what the program uses. Raises UnsafeFile, with the place in the program's JSON, where parts do not fit."""
    requirements = ProgramRequirements()
    module = program.graph_module
    _check_at(".graph_module.graph", lambda: _check_graph(module.graph, requirements))
    for text in module.graph.inputs:
        if text.type == "as_string":
            check_plain(text.value)  # torch writes it into the source of guards
    _check_at(".graph_module.signature", lambda: _check_signature(module, weights, constants))
    for at, entry in enumerate(module.module_call_graph):
        if entry.signature is not None:
            _check_at(f".graph_module.module_call_graph[{at}]", lambda e=entry: _check_call(module, e, requirements))
    if not module.module_call_graph or module.module_call_graph[0].signature is None:
        raise UnsafeFile("it does not say how the program is called", ".graph_module.module_call_graph")
    return requirements


def _check_at(location: str, check: Any) -> None:
    try:
        check()
    except UnsafeFile as error:
        raise error.prepend_location(location) from None


def _value_names(value: Any) -> Iterator[str]:
    """Yield the names of the graph's values that occur in an argument."""
    if isinstance(value, list):
        for v in value:
            yield from _value_names(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from _value_names(v)
    elif isinstance(value, (schema.TensorArgument, schema.TokenArgument)):
        yield value.name
    elif isinstance(value, _SYM_ARGUMENTS):
        if value.type == "as_name":
            yield value.value
    elif isinstance(value, (schema.Argument, schema.OptionalTensorArgument)):
        yield from _value_names(value.value)


def _subgraphs(value: Any, requirements: ProgramRequirements) -> Iterator[schema.GraphArgument]:
    if isinstance(value, list):
        for v in value:
            yield from _subgraphs(v, requirements)
    elif isinstance(value, dict):
        for v in value.values():
            yield from _subgraphs(v, requirements)
    elif isinstance(value, schema.Argument):
        if value.type == "as_graph":
            yield value.value
        elif value.type == "as_operator":
            requirements.targets.setdefault(value.value, set())
        else:
            yield from _subgraphs(value.value, requirements)


def _check_graph(graph: schema.Graph, requirements: ProgramRequirements) -> None:
    defined = {n for i in graph.inputs for n in _value_names(i)}
    described = graph.tensor_values.keys() | graph.sym_int_values.keys()
    described |= graph.sym_bool_values.keys() | graph.sym_float_values.keys()
    for at, node in enumerate(graph.nodes):
        names = [i.name for i in node.inputs if i.name]
        if len(set(names)) != len(names):
            raise UnsafeFile("it has two arguments of one name", f".nodes[{at}].inputs")
        requirements.targets.setdefault(node.target, set()).update(names)
        for argument in node.inputs:
            _check_defined(_value_names(argument.arg), defined, f".nodes[{at}].inputs")
            for inner in _subgraphs(argument.arg, requirements):
                _check_at(
                    f".nodes[{at}].inputs[{argument.name!r}]", lambda g=inner: _check_graph(g.graph, requirements)
                )
        defined.update(n for o in node.outputs for n in _value_names(o))
    _check_defined((n for o in graph.outputs for n in _value_names(o)), defined, ".outputs")
    for name in defined - described:
        raise UnsafeFile(f"the graph has {name!r}, and nothing says of what shape it is")


def _check_defined(names: Iterator[str], defined: set[str], location: str) -> None:
    for name in names:
        if name not in defined:
            raise UnsafeFile(f"it reads {name!r}, which nothing before it computes", location)


def _check_signature(
    module: schema.GraphModule, weights: schema.PayloadConfig, constants: schema.PayloadConfig
) -> None:
    specs, graph = module.signature, module.graph
    if len(specs.input_specs) != len(graph.inputs) or len(specs.output_specs) != len(graph.outputs):
        raise UnsafeFile(
            f"it names {len(specs.input_specs)} inputs and {len(specs.output_specs)} outputs, and the graph has "
            f"{len(graph.inputs)} and {len(graph.outputs)}"
        )
    for at, spec in enumerate(specs.input_specs):
        stored: tuple[str, schema.PayloadConfig] | None = None
        if spec.type == "parameter":
            stored = spec.parameter.parameter_name, weights
        elif spec.type == "buffer":
            stored = spec.buffer.buffer_name, weights if spec.buffer.persistent else constants
        elif spec.type == "tensor_constant":
            stored = spec.tensor_constant.tensor_constant_name, constants
        if stored is not None:
            _check_at(
                f".input_specs[{at}]", lambda o=stored, s=spec: _check_tensor(o[0], s.value.arg.name, o[1], graph)
            )


def _check_tensor(fqn: str, name: str, table: schema.PayloadConfig, graph: schema.Graph) -> None:
    """Raise UnsafeFile where a stored tensor has another dtype or shape than the graph was made for."""
    if fqn not in table.config:
        raise UnsafeFile(f"no tensor called {fqn!r} is in the file")
    if name not in graph.tensor_values:
        raise UnsafeFile(f"the graph has no tensor {name!r}, which {fqn!r} should be")
    found, expected = table.config[fqn].tensor_meta, graph.tensor_values[name]
    if found is None:
        return  # read_tensors() refuses it
    sizes = [[s.value if s.type == "as_int" else None for s in m.sizes] for m in (found, expected)]
    same = len(sizes[0]) == len(sizes[1]) and all(None in (a, b) or a == b for a, b in zip(*sizes, strict=True))
    if not same or found.dtype != expected.dtype:
        raise UnsafeFile(
            f"{fqn!r} is stored as a {schema.ScalarType(found.dtype).name} of {sizes[0]}, and the graph reads a "
            f"{schema.ScalarType(expected.dtype).name} of {sizes[1]}"
        )


def _check_call(module: schema.GraphModule, entry: schema.ModuleCallEntry, requirements: ProgramRequirements) -> None:
    signature = entry.signature
    assert signature is not None
    trees = [_read_tree_at(f".{n}", getattr(signature, n)) for n in ("in_spec", "out_spec")]
    for tree in trees:
        requirements.container_types |= tree.types
    for key in trees[0].keyword_names or ():
        check_identifier(str(key))  # torch writes it into the source of forward
    if entry.fqn:
        return
    specs = module.signature
    inputs = sum(s.type in ("user_input", "constant_input") for s in specs.input_specs)
    outputs = sum(s.type in ("user_output", "loss_output") for s in specs.output_specs)
    if [t.leaf_count for t in trees] != [inputs, outputs]:
        raise UnsafeFile(
            f"its trees have {trees[0].leaf_count} inputs and {trees[1].leaf_count} outputs, and the signature "
            f"{inputs} and {outputs}"
        )


def _read_tree_at(location: str, text: str) -> Any:
    try:
        return read_tree_spec(text)
    except UnsafeFile as error:
        raise error.prepend_location(location) from None
