"""Compute the weights of an adapter's experts at each token of a call, without the call's own result.

The adapter's coefficients depend on a first pass of the model, as X-LoRA's do. Only the part of the graph that computes
this pass runs, and nothing is changed. The adapter's method says what to show of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from adaptc.binding.binding import Binding
from adaptc.errors import ConfigError, listing
from adaptc.passes.graph.graph_lock import hold_graph_lock
from adaptc.passes.graph.lifted import copy_graph
from adaptc.passes.graph.mutation import erase_dead_nodes
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.coefficients import Coefficient
from adaptc.passes.protocol.regions import BASE_PASS_KEY, COEFFICIENT_ROLE, node_tag
from adaptc.program.wrapper import check_program
from adaptc.runtime.executor import Executor
from adaptc.state.core import ProgramCore
from adaptc.state.graph_engine import graph_runner
from adaptc.state.runner import Runner


def check_scalings(program: ProgramCore | Runner, adapter_name: str | None) -> None:
    """Raise what :func:`expert_scalings` would raise for this program and name, whatever the inputs. It is ConfigError
    where the program runs no such adapter, or runs several and ``adapter_name`` chooses none."""
    _, executor, binding, _ = _executor_and_state(program)
    _find_xlora(executor.attachments, binding.values, adapter_name)


def expert_scalings(
    program: ProgramCore | Runner, *args: Any, adapter_name: str | None = None, **inputs: Any
) -> Tensor:
    """Return the weights of the experts, (batch, tokens, adapted layers, experts), for the inputs of a call.
    ``adaptc.debug.xlora_scalings`` tells more."""
    _, executor, binding, state = _executor_and_state(program)
    attachment, name, c = _find_xlora(executor.attachments, binding.values, adapter_name)
    arguments = executor.arguments_with_state(binding, state)
    flat = executor.inputs(args, inputs, arguments.added_tokens)
    with hold_graph_lock():
        part = _cut_after_first_pass(executor.module, attachment.reads[name])
    slots = [binding.values[attachment.slots[s]].detach() for s in c.slots]
    with torch.no_grad():
        hidden = part.forward(*arguments.lifted, *flat)
        assert c.make_visible is not None
        found = c.make_visible(hidden, *slots)
    there = sum(
        b.adapter == attachment.adapter and name in b.reads and b.id in binding.methods for b in executor.attachments
    )
    return found.expand(-1, -1, there, -1) if found.shape[2] == 1 else found


def _executor_and_state(program: Any) -> tuple[ProgramCore, Executor, Binding, Mapping[str, Tensor]]:
    """Return what calls of a program, or of what is bound to one, run. Raises AdaptcError for anything else."""
    runner = graph_runner(program)
    if runner is not None:
        return runner.prepared.executor_and_state()
    check_program(program, "xlora_scalings")
    return program.snapshot_executor()


def _find_xlora(attachments: Any, values: Any, adapter_name: str | None) -> tuple[Attachment, str, Coefficient]:
    found: dict[str, tuple[Attachment, str, Coefficient]] = {}
    for a in attachments:
        for name, c in a.method.extra_inputs.coefficients().items():
            if c.make_visible is not None and all(a.slots[s] in values for s in c.slots):
                found.setdefault(a.adapter, (a, name, c))
    if adapter_name is not None:
        found = {n: f for n, f in found.items() if n == adapter_name}
    if len(found) != 1:
        told = listing(map(repr, found)) if found else "none"
        what = "" if adapter_name is None else f" called {adapter_name!r}"
        raise ConfigError(
            f"xlora_scalings is of one X-LoRA adapter{what} that a program runs, and of such this one has {told}"
            + (": say which with adapter_name" if found else "")
        )
    return next(iter(found.values()))


def _cut_after_first_pass(module: fx.GraphModule, coefficient: str) -> fx.GraphModule:
    """Return a graph that ends in the last hidden state of the first pass that ``coefficient`` is made of."""
    graph = copy_graph(module.graph)
    stack, seen = [n for n in graph.nodes if n.name == coefficient], set[fx.Node]()
    while stack:
        node = stack.pop()
        tag = node_tag(node)
        if tag is not None and tag.get(BASE_PASS_KEY):
            break
        stack += [n for n in node.all_input_nodes if n not in seen]
        seen |= set(node.all_input_nodes)
    else:
        raise AssertionError(f"{coefficient!r} is made of no first pass")
    graph.output_node().args = (node,)
    for other in reversed(graph.nodes):
        if other is node:
            break
        # The pass writes to its cache after its result; these nodes stay, or the next call would miss these tokens.
        tag = node_tag(other)
        if other.op not in ("output", "placeholder") and (tag is None or tag["role"] != COEFFICIENT_ROLE):
            graph.erase_node(other)
    erase_dead_nodes(graph)
    return fx.GraphModule(module, graph)
