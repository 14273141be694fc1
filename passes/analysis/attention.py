"""Find the attention blocks of a program and the projections that make their query, key and value operands.

For: default targets. A user who names no ``target_modules`` gets the query and value projections, read from the graph,
so a model type that nobody has listed in a table is served too.

Before: a valid ``ExportedProgram``, in the training dialect or decomposed. After: nothing is changed.

One forward sweep (see ``attention_flow``) tells what is near each node. Two rules then decide:
- an op that declares arguments called query, key and value is attention (SDPA and its fused kernels);
- so is a softmax over a product of two activations whose result enters another product. A router or a classifier takes
  its softmax over a projection, or multiplies nothing with it, so it never qualifies.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.export import ExportedProgram
from torch.fx import Node

from adaptc.passes.analysis.attention_flow import AttentionFlow
from adaptc.passes.ir.module_paths import module_path


@dataclass(frozen=True)
class Attention:
    """One attention computation. An operand lists module paths in graph order; empty when no projection makes it."""

    node: str
    query: tuple[str, ...]
    key: tuple[str, ...]
    value: tuple[str, ...]


def find_attention(program: ExportedProgram) -> list[Attention]:
    """Every attention block of ``program``, in graph order; a module that is called twice is listed twice.

    An operand's module paths are those of the nearest nodes that make it from a parameter: linear, ``addmm`` and other
    products, convolutions. The call suffix (``@1``) is removed. Projections from outside the module that holds the
    attention count only when the operand has no other and that one is unique (layers that share keys and values): an
    operand taken straight from the residual stream is made by no projection.
    """
    flow = AttentionFlow(program)
    return [_attention(flow, *block) for block in flow.blocks]


def default_targets(program: ExportedProgram) -> list[str]:
    """The query and value projections of ``program`` as target names, query first, in order of first appearance.

    A name is the last path component (``"q_proj"``), as in PEFT's table of default targets, or the full paths where
    that component also names a module that is neither query nor value. A fused projection gives its one name, an
    attention module that owns its projection weights (``nn.MultiheadAttention``) its own. No attention gives [].
    """
    flow = AttentionFlow(program)
    attentions = [_attention(flow, *block) for block in flow.blocks]
    wanted = dict.fromkeys(path for a in attentions for path in (*a.query, *a.value) if path)
    shared = {_last(path) for path in flow.consumers() if path not in wanted}
    return list(dict.fromkeys(path if _last(path) in shared else _last(path) for path in wanted))


def _attention(flow: AttentionFlow, node: Node, operands: tuple[Iterable[Node], ...]) -> Attention:
    paths = [list(dict.fromkeys(flow.module(n) for n in sorted(nodes))) for nodes in operands]
    here = module_path(node, flow.known)
    while here and not any(_within(path, here) for operand in paths for path in operand):
        here = here.rpartition(".")[0]
    near = [tuple(path for path in operand if _within(path, here)) for operand in paths]
    query, key, value = (n or (tuple(far) if len(far) == 1 else ()) for n, far in zip(near, paths, strict=True))
    return Attention(node.name, query, key, value)


def _within(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(module + ".")


def _last(path: str) -> str:
    return path.rpartition(".")[2]
