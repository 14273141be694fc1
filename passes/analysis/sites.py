"""Find every site of a program: where a parameter is consumed, and by which kind of op.

A site belongs to a module path and a parameter name, also when the weight is tied to another module's. The consumers of
one placeholder are told apart by the module they were traced in. Finding sites changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from adaptc.passes.analysis.program_facts import module_types
from adaptc.passes.graph.higher_order import subgraph_input_of
from adaptc.passes.graph.lifted import LiftedProgram, fqns_by_placeholder
from adaptc.passes.graph.module_paths import module_path, module_paths_of
from adaptc.passes.graph.ops import CASTS, LAYER_OPS, LINEAR_META, TRANSPOSED_CONVS, Op, argument, custom_meta, op_of


@dataclass(frozen=True)
class Site:
    """A parameter of a module, with the nodes that consume it.

    ``kind`` is 'weight' when no table entry fits and only the weight form is defined. ``tied`` says that nodes outside
    of this site read the same placeholder. ``module_type`` is the qualified class name of the owning module, '' when
    the program does not say. ``is_linear_class`` says that this class derives from a class of linear layers.
    """

    module: str
    param: str
    kind: str
    shape: tuple[int, ...]
    consumers: tuple[str, ...]
    tied: bool = False
    module_type: str = ""
    is_linear_class: bool = False

    @property
    def fqn(self) -> str:
        return f"{self.module}.{self.param}" if self.module else self.param


def find_consumers(placeholder: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield (consumer, the node it reads) for the users of a parameter, seen through casts."""
    stack = [placeholder]
    while stack:
        source = stack.pop()
        for user in source.users:
            if is_cast(user, source):
                stack.append(user)
            elif user.op != "output" and "_assert" not in str(user.target):
                yield user, source


def has_other_readers(placeholder: fx.Node, readers: Collection[str]) -> bool:
    """Return whether a parameter is read by other nodes than those called ``readers``, seen through casts."""
    return any(node.name not in readers for node, _ in find_consumers(placeholder))


def mark_linear(program: ExportedProgram, modules: Collection[str]) -> None:
    """Mark the nodes that read the weights of ``modules``: their classes derive from linear layers."""
    fqns = fqns_by_placeholder(program.graph_signature)
    for node in program.graph.find_nodes(op="placeholder"):
        owner, _, name = fqns.get(node.name, "").rpartition(".")
        if name == "weight" and owner in modules:
            for reader, _ in find_consumers(node):
                reader.meta["custom"] = {**custom_meta(reader), LINEAR_META: True}


def is_cast(user: fx.Node, source: fx.Node) -> bool:
    """Return whether ``user`` only casts ``source``, so that its own users are the consumers."""
    return user.target in CASTS and bool(user.args) and user.args[0] is source and subgraph_input_of(user) is None


def isolate_readers(graph: fx.Graph, source: fx.Node, consumer_nodes: Collection[fx.Node]) -> list[fx.Node]:
    """Return the direct users of ``source`` that lead to the ``consumer_nodes`` consumers and to no others.

    A cast that other consumers share is copied into ``graph`` for the wanted ones.
    """
    found: list[fx.Node] = []
    for user in list(source.users):
        if user in consumer_nodes:
            found.append(user)
        elif is_cast(user, source):
            reached = {n for n, _ in find_consumers(user)}
            if reached.isdisjoint(consumer_nodes):
                continue
            if not reached.issubset(consumer_nodes):
                inner = isolate_readers(graph, user, consumer_nodes)
                with graph.inserting_after(user):
                    twin = graph.node_copy(user, lambda n: n)
                for reader in inner:
                    reader.replace_input_with(user, twin)
                user = twin
            found.append(user)
    return found


def layer_kind_of(node: fx.Node, source: fx.Node, ndim: int) -> str:
    """Return the kind by which ``node`` consumes ``source`` as its weight, which has ``ndim`` axes.

    Gives 'weight' where the node does something else with it, or reads only a part of it.
    """
    subgraph_input = subgraph_input_of(node)
    if subgraph_input is not None:
        return subgraph_input.kind
    if node.target in LAYER_OPS:
        kind, xi, wi, bi, _ = LAYER_OPS[node.target]
        read = [argument(node, i) for i in (xi, wi, bi) if i is not None]
        plain = kind != "addmm" or all(argument(node, i) == 1 for i in (3, 4))
        if argument(node, wi) is source and read.count(source) == 1 and plain and ndim >= 2:
            return kind
    if node.target in TRANSPOSED_CONVS and argument(node, 1) is source:
        return "conv_transpose"
    return "weight"


def find_sites(
    program: ExportedProgram,
    types: Mapping[str, str] | None = None,
    lifted: LiftedProgram | None = None,
    kind: InputKind = InputKind.PARAMETER,
) -> list[Site]:
    """Return all sites in graph order of the placeholders, aliases included.

    ``types`` (module path -> class name) overrides what the graph's own module stacks say. ``lifted`` is the program
    opened, if the caller has it open; it is only read. ``kind`` is BUFFER for persistent buffers instead of parameters.
    """
    lifted = lifted or LiftedProgram(program, edit=False)
    types = {**module_types(program), **(types or {})}
    module_paths = module_paths_of([*lifted.state_dict, *lifted.constants])
    found: list[Site] = []
    by_node: dict[fx.Node, list[str]] = {}
    for fqn, node in lifted.placeholders.items():
        by_node.setdefault(node, []).append(fqn)
    for node in lifted.graph.find_nodes(op="placeholder"):
        if lifted.input_specs[node.name].kind == kind:
            fqns = [f for f in by_node.get(node, []) if f in lifted.state_dict]
            found.extend(_sites_of(lifted, node, fqns, types, module_paths))
    return found


def layer_ops(program: ExportedProgram, lifted: LiftedProgram) -> dict[str, Op]:
    """Return the op that reads the weight of each module, by the module's path."""
    sites = [s for s in find_sites(program, lifted=lifted) if s.param == "weight"]
    return {s.module: op_of(s.kind, lifted.tensor(s.fqn), lifted.nodes[s.consumers[0]]) for s in sites}


def _sites_of(
    lifted: LiftedProgram, node: fx.Node, fqns: list[str], types: Mapping[str, str], module_paths: Collection[str]
) -> Iterator[Site]:
    all_consumers = list(find_consumers(node))
    consumers_by_fqn: dict[str, list[tuple[fx.Node, fx.Node]]] = {}
    for fqn in fqns:
        owner = fqn.rpartition(".")[0]
        consumers_by_fqn[fqn] = [
            (n, s) for n, s in all_consumers if fqn in possible_fqns(n) or _calling_module(n, module_paths) == owner
        ]
    claimed = {n for pairs in consumers_by_fqn.values() for n, _ in pairs}
    for fqn in fqns:
        # Another module may read a parameter for its own one (MultiheadAttention reads the weight of its out_proj).
        site_consumers = consumers_by_fqn[fqn] or ([] if claimed else all_consumers)
        value = lifted.state_dict[fqn]
        if site_consumers and isinstance(value, Tensor):
            module, _, param = fqn.rpartition(".")
            kinds = {layer_kind_of(n, s, value.ndim) for n, s in site_consumers}
            yield Site(
                module=module,
                param=param,
                kind=kinds.pop() if len(kinds) == 1 else "weight",
                shape=tuple(value.shape),
                consumers=tuple(n.name for n, _ in site_consumers),
                tied=len({n for n, _ in site_consumers}) != len({n for n, _ in all_consumers}),
                module_type=types.get(module, ""),
                is_linear_class=any(custom_meta(n).get(LINEAR_META) for n, _ in site_consumers),
            )


def possible_fqns(node: fx.Node) -> tuple[str, ...]:
    """Return the names of one tied parameter, any of which a layer inside a block may mean; () where it is known."""
    subgraph_input = subgraph_input_of(node)
    return () if subgraph_input is None else subgraph_input.rivals


def _calling_module(node: fx.Node, module_paths: Collection[str]) -> str | None:
    """Return the path of the module that a consumer was traced in, also inside a block; None where unknown."""
    subgraph_input = subgraph_input_of(node)
    return module_path(node, module_paths) if subgraph_input is None else subgraph_input.owner
