"""Plan how a program is cut into stages: what each of them computes, and which tensors it gets from the one before.

A stage begins with the first node of a module, and runs up to the next stage. Takes an opened program in the training
dialect. Nothing is known of the model: what crosses a cut follows from who reads what.

- What follows from keyword inputs, buffers and sizes alone is computed in each stage that reads it: masks, rotary
  angles. All stages get the same keyword inputs.
- Every other tensor that a later stage reads is passed on, from stage to stage. A cut inside of a residual block passes
  on two tensors where one between blocks passes on one.
- A parameter that two stages read is a parameter of both. Only a frozen one can be: of a trained one each stage would
  have part of the gradient.

What a schedule cannot send is refused by name: values that are no tensors, and sizes that depend on data. So is memory
that one stage writes to and another one reads.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from adaptc.errors import ConfigError, did_you_mean, listing
from adaptc.passes.graph.higher_order import module_with_graph
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.module_paths import clean_path, module_paths_of
from adaptc.passes.graph.mutation import has_effect, is_metadata_assert, is_pure, memory_groups, written_inputs
from adaptc.passes.protocol.regions import node_tag
from adaptc.torch_typing import shape_of

_SIZE_OF = torch.ops.aten.sym_size.int


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage: the names of its ``nodes``.

    ``received`` are the values from the stage before, and ``send`` those for the next one, in graph order.
    """

    nodes: frozenset[str]
    received: tuple[str, ...]
    send: tuple[str, ...]


def plan_stages(opened: LiftedProgram, boundaries: Sequence[str], trained: Collection[str]) -> list[StagePlan]:
    """Return the plan of each stage, in order; they are one more than ``boundaries``.

    ``boundaries``: for each stage but the first, the path of the module that it begins with. ``trained``: the FQNs of
    parameters that are trained. Sizes of values are read from inputs afterwards, where these have them.

    Raises ConfigError for a path of no module, and for modules that do not run in this order. Raises ConfigError, too,
    for a value that no schedule can send; it is named.
    """
    read_sizes_from_inputs(opened)
    return list(_Planner(opened, boundaries, trained).plans())


def read_sizes_from_inputs(opened: LiftedProgram) -> None:
    """Let each node that reads a size of a value read it from a keyword input that has the same symbolic size."""
    sources: dict[str, tuple[fx.Node, int]] = {}
    for node in keyword_nodes(opened):
        value = node.meta.get("val")
        for axis, size in enumerate(shape_of(value)) if isinstance(value, Tensor) else ():
            if not isinstance(size, int):
                sources.setdefault(str(size), (node, axis))
    for node in opened.graph.find_nodes(op="call_function", target=_SIZE_OF):
        node.args = sources.get(str(node.meta["val"]), node.args)


def positional_nodes(opened: LiftedProgram) -> list[fx.Node]:
    """Return the placeholders of the program's positional inputs."""
    return _user_nodes(opened)[: _positional_count(opened)]


def keyword_nodes(opened: LiftedProgram) -> list[fx.Node]:
    """Return the placeholders of the program's keyword inputs."""
    return _user_nodes(opened)[_positional_count(opened) :]


def _user_nodes(opened: LiftedProgram) -> list[fx.Node]:
    nodes = opened.graph.find_nodes(op="placeholder")
    return [n for n in nodes if opened.input_specs[n.name].kind == InputKind.USER_INPUT]


def _positional_count(opened: LiftedProgram) -> int:
    spec = opened.program.call_spec.in_spec
    return 0 if spec is None else spec.children()[0].num_leaves


def module_starts(opened: LiftedProgram) -> dict[str, int]:
    """Return module path -> the position of its first node, for the modules that run, in the order of these nodes.

    Nodes that an adapter adds at a layer count as the layer's.
    """
    held = module_paths_of([*opened.state_dict, *opened.constants])
    starts: dict[str, int] = {}
    for i, node in enumerate(opened.graph.nodes):
        for path in _paths_of(node, held):
            starts.setdefault(path, i)
    return starts


def _paths_of(node: fx.Node, held: Collection[str]) -> Iterator[str]:
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    yield from (p for entry in stack.values() if (p := clean_path(entry[0], held)))
    tag = node_tag(node)
    path = "" if tag is None else _weight_of(tag).rpartition(".")[0]
    while path:
        yield path
        path = path.rpartition(".")[0]


def _weight_of(tag: Mapping[str, Any]) -> str:
    """Return the FQN of the parameter at whose site a node with this tag stands; '' for a node of no site."""
    return str(tag.get("site", "")).partition("|")[0]


class _Planner:
    """The facts that the plans of all stages of one program follow from."""

    def __init__(self, opened: LiftedProgram, boundaries: Sequence[str], trained: Collection[str]) -> None:
        self.opened, self.boundaries, self.trained = opened, boundaries, trained
        #: what holds the graphs of blocks, by which nodes find them
        self.owner = module_with_graph(opened.program.graph_module, opened.graph)
        self.nodes: list[fx.Node] = list(opened.graph.nodes)
        self.order = {n: i for i, n in enumerate(self.nodes)}
        self.starts = self._check_starts()
        self.memory = memory_groups(opened.graph)
        self.copied = self._copied_nodes()
        self.stage_of = self._stages_of_nodes()
        self.inputs = [self._inputs_of(s) for s in range(len(boundaries) + 1)]

    def _check_starts(self) -> list[int]:
        found = self.found = module_starts(self.opened)
        for path in self.boundaries:
            if path not in found:
                raise ConfigError(
                    f"boundaries: {path!r} is no module that the program runs{did_you_mean(path, [*found])}"
                )
        starts = [found[p] for p in self.boundaries]
        if any(b <= a for a, b in pairwise(starts)):
            ordered = sorted(dict.fromkeys(self.boundaries), key=found.__getitem__)
            raise ConfigError(
                f"boundaries: each stage begins after the one before, and these modules begin in the order {ordered}; "
                f"given were {list(self.boundaries)}"
            )
        return starts

    def _copied_nodes(self) -> set[fx.Node]:
        """Return the nodes that each stage computes itself where it needs them."""
        copied: set[fx.Node] = set()
        written = {self.memory[t] for n in self.nodes for t in written_inputs(n)}
        positional = set(positional_nodes(self.opened))
        for node in self.nodes:
            if self.memory[node] in written:
                continue
            if node.op == "placeholder":
                is_parameter = self.opened.input_specs[node.name].kind == InputKind.PARAMETER
                same = not is_parameter and node not in positional
            else:
                same = node.op == "get_attr" or _is_size(node)
                same = same or (_is_repeatable(node) and all(n in copied for n in node.all_input_nodes))
            if same:
                copied.add(node)
        return copied

    def _stages_of_nodes(self) -> dict[fx.Node, int]:
        """Return the stage of each node that one stage computes; parameters and copied nodes have none."""
        stages: dict[fx.Node, int] = dict.fromkeys(positional_nodes(self.opened), 0)
        for i, node in enumerate(self.nodes):
            if node.op in ("placeholder", "output") or node in self.copied:
                continue
            stages[node] = sum(i >= start for start in self.starts)
            sources = [stages[n] for n in self._reached([node]) if n in stages and n is not node]
            # An entry of a tuple is taken where the tuple is made. A check runs as soon as it can.
            if node.target is operator.getitem or not _has_value(node):
                stages[node] = max(sources, default=0)
        return stages

    def _reached(self, roots: Iterable[fx.Node]) -> set[fx.Node]:
        """Return the nodes that ``roots`` read, directly or by way of copied nodes, the copied ones included."""
        todo, found = [n for r in roots for n in r.all_input_nodes], set[fx.Node]()
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                todo += node.all_input_nodes if node in self.copied else ()
        return found

    def _inputs_of(self, stage: int) -> set[fx.Node]:
        """Return what the nodes of a stage read that is not computed by one stage alone before it, and what is."""
        own = [n for n, s in self.stage_of.items() if s == stage and n.op != "placeholder"]
        return self._reached(own) | self._outputs_of(stage)

    def _outputs_of(self, stage: int) -> set[fx.Node]:
        """Return the outputs that a stage has to have: the last one the user's, and each the updates that it made."""
        values: Any = self.opened.graph.output_node().args[0]
        found: set[fx.Node] = set()
        for value, spec in zip(values, self.opened.output_specs, strict=True):
            if isinstance(value, fx.Node):
                is_user = spec.kind == OutputKind.USER_OUTPUT
                where = len(self.starts) if is_user else self.stage_of.get(value, 0)
                if where == stage:
                    found |= {value} | (self._reached([value]) if value in self.copied else set())
        return found

    def plans(self) -> Iterator[StagePlan]:
        last = len(self.starts)
        last_read: dict[fx.Node, int] = {}
        for s, read in enumerate(self.inputs):
            last_read |= {n: s for n in read if n in self.stage_of}
        crossing = [
            [n for n in self.nodes if n in last_read and self.stage_of[n] < s <= last_read[n]] for s in range(last + 2)
        ]
        for s, boundary in enumerate(self.boundaries, 1):
            for node in crossing[s]:
                self._check_can_be_sent(node, boundary)
        self._check_shared_parameters()
        self._check_writes()
        always = {n.name for n in keyword_nodes(self.opened)}
        for s in range(last + 1):
            own = {n for n, stage in self.stage_of.items() if stage == s}
            if not any(n.op == "call_function" and _has_value(n) for n in own):
                raise ConfigError(
                    f"boundaries: the stage before {self.boundaries[min(s, last - 1)]!r} would compute nothing: leave "
                    "that boundary out"
                )
            rest = {n for n in self.inputs[s] if n not in self.stage_of} | self._unread_tensors(s)
            yield StagePlan(
                frozenset({n.name for n in own | rest} | always),
                tuple(n.name for n in crossing[s]),
                tuple(n.name for n in crossing[s + 1]),
            )

    def _unread_tensors(self, stage: int) -> set[fx.Node]:
        """Return the placeholders that a stage has for other reasons than that it reads them: the weights of its sites,
        which methods know, and tensors that no stage reads, of modules that run in it."""
        placeholders = self.opened.placeholders
        own = [node_tag(n) for n, s in self.stage_of.items() if s == stage]
        found = {placeholders[f] for tag in own if tag is not None and (f := _weight_of(tag)) in placeholders}
        for fqn, node in placeholders.items():
            if not node.users:
                at = self.found.get(fqn.rpartition(".")[0], 0)
                found |= {node} if sum(at >= start for start in self.starts) == stage else set()
        return found

    def _check_can_be_sent(self, node: fx.Node, boundary: str) -> None:
        value = node.meta.get("val")
        where = f"the cut before {boundary!r} would have to pass on {node.name!r}{_place(node)}"
        way = "Choose another module to begin the stage with"
        if not isinstance(value, Tensor):
            raise ConfigError(f"{where}, which is no tensor but a {type(value).__name__}. {way}")
        if free_unbacked_symbols(value):
            raise ConfigError(f"{where}, whose sizes {tuple(shape_of(value))} depend on data. {way}")

    def _check_shared_parameters(self) -> None:
        for node in self.opened.graph.find_nodes(op="placeholder"):
            stages = [s for s, read in enumerate(self.inputs) if node in read]
            names = [f for f in self.opened.fqns_of(node) if f in self.trained]
            if len(stages) > 1 and names:
                raise ConfigError(
                    f"{names[0]!r} is trained and read by the stages {stages}: each would have a part of its gradient. "
                    "Choose boundaries that leave its readers in one stage, or adapt these layers one by one (no tied "
                    "or shared tensors)"
                )

    def _check_writes(self) -> None:
        """Raise ConfigError where one stage writes to memory that another one reads."""
        touched: dict[Any, set[int]] = {}
        for s, read in enumerate(self.inputs):
            for node in read:
                touched.setdefault(self.memory[node], set()).add(self.stage_of.get(node, s))
        for node, s in self.stage_of.items():
            touched.setdefault(self.memory[node], set()).add(s)
        for node, s in self.stage_of.items():
            for target in written_inputs(node):
                if others := touched[self.memory[target]] - {s}:
                    raise ConfigError(
                        f"{node.name!r}{_place(node)} in stage {s} writes to {target.name!r}, which the stages "
                        f"{sorted(others)} read. Choose boundaries that leave them in one stage"
                    )


def _place(node: fx.Node) -> str:
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if entry[0]]
    return f" of {paths[-1]!r}" if paths else ""


def _has_value(node: fx.Node) -> bool:
    """Return whether the node has a value that others may read; checks have none."""
    return node.meta.get("val") is not None or bool(node.users)


def _is_size(node: fx.Node) -> bool:
    """Return whether the node is a size, or computed from numbers: what a stage finds out from the tensors it has."""
    value: Any = node.meta.get("val")
    if node.op != "call_function" or not isinstance(
        value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
    ):
        return False
    return node.target is _SIZE_OF or not (has_effect(node) or any(map(_is_tensor, node.all_input_nodes)))


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _is_repeatable(node: fx.Node) -> bool:
    """Return whether the node has the same value in every stage, given the same inputs."""
    if bodies := list(_bodies(node)):
        return not list(written_inputs(node)) and all(map(_is_repeatable_body, bodies))
    return is_pure(node) or is_metadata_assert(node)


def _bodies(node: fx.Node) -> Iterator[fx.GraphModule]:
    owner = node.graph.owning_module
    for n in node.all_input_nodes:
        body = getattr(owner, str(n.target), None) if n.op == "get_attr" else None
        if isinstance(body, fx.GraphModule):
            yield body


def _is_repeatable_body(body: fx.GraphModule) -> bool:
    return all(n.op != "call_function" or _is_size(n) or _is_repeatable(n) for n in body.graph.nodes)


def choose_boundaries(opened: LiftedProgram, count: int) -> list[str]:
    """Return boundaries that cut a program into ``count`` stages of about equal work, between its repeated blocks.

    Blocks are counted modules (``layers.0``, ``layers.1``, ...), of the list that reads the most parameters. A stage's
    work is the number of elements of the weights that its layers read.

    Raises ConfigError where there is no such list, or where it has fewer blocks than stages are asked for.
    """
    starts = module_starts(opened)
    lists: dict[str, list[str]] = {}
    for path in starts:
        parent, _, name = path.rpartition(".")
        if name.isdecimal():
            lists.setdefault(parent, []).append(path)
    work = _work_by_position(opened)
    chains = {
        p: blocks for p, blocks in lists.items() if [starts[b] for b in blocks] == sorted({starts[b] for b in blocks})
    }
    if not chains:
        raise ConfigError("the program has no modules that are counted (layers.0, layers.1, ...): give boundaries=")
    total = {p: sum(work[starts[blocks[0]] :]) * len(blocks) for p, blocks in chains.items()}
    chain = chains[max(total, key=total.__getitem__)]
    # A stage may end with what the next block begins with, and this reads no weights.
    ends = [*(starts[b] for b in chain), len(work)]
    blocks = [b for b, (start, end) in zip(chain, pairwise(ends), strict=True) if any(work[start:end])]
    if len(blocks) < count:
        raise ConfigError(
            f"stages={count}: the program has {len(blocks)} repeated blocks, {listing(map(repr, blocks))}: ask for at "
            "most as many stages, or give boundaries="
        )
    ends = [0, *(starts[b] for b in blocks[1:]), len(work)]
    costs = [sum(work[a:b]) for a, b in pairwise(ends)]
    return [blocks[i] for i in _even_cuts(costs, count)]


def _work_by_position(opened: LiftedProgram) -> list[int]:
    """Return for each node how many elements of parameters it multiplies with; rows that are looked up are no work."""
    parameters = {
        n for n in opened.graph.find_nodes(op="placeholder") if opened.input_specs[n.name].kind == InputKind.PARAMETER
    }
    return [
        0
        if n.target is torch.ops.aten.embedding.default
        else sum(p.meta["val"].numel() for p in n.all_input_nodes if p in parameters)
        for n in opened.graph.nodes
    ]


def _even_cuts(costs: Sequence[int], count: int) -> list[int]:
    """Return the ``count - 1`` positions at which a sequence is cut so that the largest sum of a piece is smallest."""
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for piece in range(count):
        new: dict[int, tuple[int, list[int]]] = {}
        for end in range(piece + 1, len(costs) - (count - piece - 1) + 1):
            options = [(max(most, sum(costs[at:end])), [*cuts, at]) for at, (most, cuts) in best.items() if at < end]
            if options:
                new[end] = min(options, key=lambda option: option[0])
        best = new
    return best[len(costs)][1][1:]
