"""Make lifted tensors, such as an adapter's slots, inputs that a caller gives, with free sizes.

It is for runtimes that know no constants which can be replaced. A program that was converted for one then takes the
adapter of a call as it takes the tokens.

Before: a program in which the tensors are parameters or buffers that no call writes to. After: an equal program whose
last keyword inputs they are. The values of all nodes are symbolic in the free sizes. A tensor without axes has become
an input of one element, since there are files of adapters that hold no other ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from adaptc.errors import PassError
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.pass_infra import Pass, PassResult
from adaptc.passes.graph.propagate import propagate_fakes
from adaptc.passes.graph.pytree import update_call_inputs
from adaptc.passes.graph.symbolic_fakes import FreeSizeFakes
from adaptc.passes.lower.free_axes import FreeSize


@dataclass(frozen=True)
class SlotsToInputs(Pass):
    """A pass that turns lifted tensors into inputs; its count is that of the tensors.

    ``arguments`` maps FQNs to the names of the inputs, in their order. ``free`` has the free axes of these tensors, by
    FQN; axes with one name have one size. ``max_size`` is the largest rank, None for any. ``free_inputs`` has free axes
    of inputs that there are already, by name. The ``data`` of the result maps the symbols in the program's shapes to
    the names of the free sizes.
    """

    name: ClassVar[str] = "slots_to_inputs"

    arguments: Mapping[str, str]
    free: Mapping[str, Mapping[int, FreeSize]] = field(repr=False)
    max_size: int | None = None
    free_inputs: Mapping[str, Mapping[int, FreeSize]] = field(default_factory=dict[str, Mapping[int, FreeSize]])

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        lifted = LiftedProgram(subject)
        placeholders = lifted.graph.find_nodes(op="placeholder")
        known_sizes = {n for p in placeholders for n in getattr(p.meta.get("val"), "shape", ()) if isinstance(n, int)}
        # Nothing is free below the rank of nothing: an adapter without a site has no rows there.
        fakes = FreeSizeFakes(mode=lifted.fake_mode, taken_hints=known_sizes, limits=(0, self.max_size))
        nodes: dict[str, fx.Node] = {}
        for fqn, argument in self.arguments.items():
            nodes[fqn] = _to_input(lifted, fqn, argument)
        examples: dict[str, Tensor] = {}
        for fqn, node in nodes.items():
            value = lifted.state_dict.pop(fqn).detach()
            if not value.ndim:
                value = value.reshape(1)
                _read_as_scalar(lifted, node)
            node.meta["val"] = _with_free_axes(fakes, value, self.free.get(fqn, {}))
            examples[node.name] = value
        freed = {lifted.nodes[name]: free for name, free in self.free_inputs.items()}
        for node, free in freed.items():
            node.meta["val"] = _with_free_axes(fakes, node.meta["val"], free)
        for size in fakes.sizes.values():
            lifted.ranges[size.node.expr] = fakes.shape_env.var_to_range[size.node.expr]
        propagate_fakes(lifted.graph, {*nodes.values(), *freed}, subject.graph_module)
        inputs = [lifted.input_specs[n.name] for n in lifted.graph.find_nodes(op="placeholder")]
        arguments = [s.arg for s in inputs if s.kind == InputKind.USER_INPUT]
        lifted.module_calls, lifted.example_inputs = update_call_inputs(
            lifted.module_calls, lifted.example_inputs, arguments, examples
        )
        return PassResult(
            lifted.finish(), len(nodes), data={str(size.node.expr): name for name, size in fakes.sizes.items()}
        )


def _with_free_axes(fakes: FreeSizeFakes, value: Tensor, free: Mapping[int, FreeSize]) -> Tensor:
    """Return a fake like ``value``, whose sizes along the axes in ``free`` are symbols."""
    sizes = {i: fakes.size(f.unit_name, f.unit) * f.times for i, f in free.items()}
    with fakes.mode:
        shape = [sizes.get(i, n) for i, n in enumerate(value.shape)]
        return torch.empty(shape, dtype=value.dtype, device=value.device)


def _to_input(lifted: LiftedProgram, fqn: str, argument: str) -> fx.Node:
    """Make the lifted tensor ``fqn`` the last input, called ``argument``; return its placeholder."""
    node = lifted.placeholders.pop(fqn)
    if any(n.name == argument for n in lifted.graph.nodes):
        raise PassError(f"the program has a value called {argument!r} already, and {fqn!r} is to have that name")
    if lifted.fqns_of(node):
        raise PassError(f"{fqn!r} is tied to {lifted.fqns_of(node)[0]!r}, and cannot be an input by itself")
    del lifted.input_specs[node.name], lifted.nodes[node.name]
    lifted.graph.find_nodes(op="placeholder")[-1].append(node)
    node.name = node.target = argument
    lifted.input_specs[argument] = InputSpec(InputKind.USER_INPUT, TensorArgument(argument), None)
    lifted.nodes[argument] = node
    return node


def _read_as_scalar(lifted: LiftedProgram, node: fx.Node) -> None:
    """Let what reads an input of one element read a tensor without axes, but for products that broadcast it anyway."""
    readers = [r for r in node.users if not _broadcasts(r, node)]
    if not readers:
        return
    with lifted.graph.inserting_before(next(n for n in lifted.graph.nodes if n.op != "placeholder")):
        scalar = lifted.graph.call_function(torch.ops.aten.reshape.default, (node, []))
    lifted.nodes[scalar.name] = scalar
    for reader in readers:
        reader.replace_input_with(node, scalar)


def _broadcasts(reader: fx.Node, node: fx.Node) -> bool:
    """Return whether ``reader`` has the same value where ``node`` has an axis of one element.

    A tensor without axes leaves the other one's dtype as it is, and a tensor with axes may widen it.
    """
    others = [n.meta["val"] for n in reader.all_input_nodes if n is not node]
    return (
        reader.target is torch.ops.aten.mul.Tensor
        and len(others) == 1
        and others[0].ndim > 0
        and others[0].dtype == node.meta["val"].dtype
    )
