"""Cut one stage out of a program, as ``plan_stages`` planned it: a program that takes what the stage before returns.

The stage takes the received values as positional inputs, in the plan's order, and all keyword inputs of the program. It
returns a tuple of tensors: what it sends, or the program's outputs that are tensors. Nodes keep their names, tags and
parameters. The program is not changed, and shares its tensors with the stage. A value that a stage only passes on is an
output that is an input. Values are sent as contiguous tensors, whatever strides they have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind, TensorArgument

from adaptc.errors import ConfigError
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.pass_infra import Pass, PassResult
from adaptc.passes.graph.propagate import propagate_fakes
from adaptc.passes.graph.symbolic_fakes import suppress_size_guards
from adaptc.passes.stages.plan_stages import StagePlan, read_sizes_from_inputs


def tensor_outputs(opened: LiftedProgram) -> list[int]:
    """Return the positions of the user's outputs that are tensors; others are the same in each call (None)."""
    specs = [s for s in opened.output_specs if s.kind == OutputKind.USER_OUTPUT]
    return [i for i, s in enumerate(specs) if isinstance(s.arg, TensorArgument)]


def check_inputs(opened: LiftedProgram) -> None:
    """Raise ConfigError where a keyword input is not one value, but a list or a dict of several."""
    spec = opened.program.call_spec.in_spec
    keywords = None if spec is None else spec.children()[1]
    children: list[tuple[Any, Any]] = []
    if keywords is not None:
        children = list(zip(keywords.context, keywords.children(), strict=True))
    for name, child in children:
        if not child.is_leaf():
            raise ConfigError(
                f"the input {name!r} is a nest of values, and stages take tensors: capture the model without it"
            )


def _is_contiguous(node: fx.Node) -> bool:
    value: Tensor = node.meta["val"]
    with suppress_size_guards([value]):
        return value.is_contiguous()


def _contiguous(value: Tensor) -> Tensor:
    with suppress_size_guards([value]), torch.no_grad():
        return value.contiguous()


def _insert_contiguous(node: fx.Node) -> fx.Node:
    """Return a node with the value of ``node`` in the layout in which tensors are sent."""
    with node.graph.inserting_after(node):
        new = node.graph.call_function(torch.ops.aten.contiguous.default, (node,))
    new.meta = {k: v for k, v in node.meta.items() if k != "custom"} | {"val": _contiguous(node.meta["val"])}
    return new


@dataclass(frozen=True)
class CutStage(Pass):
    """A pass that leaves of a program one stage of it; its count is that of the values passed in and out.

    ``plan``: that of the stage. ``is_last``: whether it returns the program's outputs.
    """

    name: ClassVar[str] = "cut_stage"

    plan: StagePlan
    is_last: bool

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        opened = LiftedProgram(subject)
        read_sizes_from_inputs(opened)
        outputs = (
            opened.user_outputs(tensor_outputs(opened)) if self.is_last else [opened.nodes[n] for n in self.plan.send]
        )
        inputs: dict[fx.Node, fx.Node] = {}
        changed: set[fx.Node] = set()
        for name in self.plan.received:
            node = opened.nodes[name]
            new = inputs[node] = opened.replace_by_input(node)
            if not _is_contiguous(node):
                new.meta["val"] = _contiguous(new.meta["val"])
                changed.add(new)
        nodes = {opened.nodes[n] for n in self.plan.nodes if n in opened.nodes} | set(inputs.values())
        results = [inputs.get(n, n) for n in outputs]
        if not self.is_last:
            results = [n if _is_contiguous(n) else _insert_contiguous(n) for n in results]
        opened.keep_only(nodes | set(results), results)
        propagate_fakes(opened.graph, changed, opened.program.graph_module)
        for tensors in (opened.state_dict, opened.constants):
            # A tied weight keeps all of its names, by which files may hold it.
            kept = {id(tensors[f]) for f in opened.placeholders if f in tensors}
            for fqn in [f for f, t in tensors.items() if f not in opened.placeholders and id(t) not in kept]:
                del tensors[fqn]
        made: Any = opened.finish_subprogram((0,) * len(outputs))
        return PassResult(made, len(inputs) + len(outputs))
