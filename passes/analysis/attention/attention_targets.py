"""Find the attention blocks of a program and the projections that make their query, key and value operands.

Default targets come from here. A user who names no ``target_modules`` gets the query and value projections, read from
the graph. So a model type that no table lists is served too.

Takes a valid ``ExportedProgram``, in the training dialect or decomposed, and does not change it.

One forward sweep (``attention_flow``) finds the projections and scores near each node. Two rules then decide:
- an op that declares arguments called query, key and value is attention (SDPA and its fused kernels);
- so is a softmax over a matmul of two activations whose result enters another matmul. A router or a classifier takes
  its softmax over a projection, or multiplies nothing with it, so it never qualifies.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.export import ExportedProgram
from torch.fx import Node

from adaptc.passes.analysis.attention.attention_dataflow import AttentionFlow
from adaptc.passes.graph.module_paths import module_path


@dataclass(frozen=True)
class Attention:
    """An attention computation, with the module paths of its projections.

    ``query``, ``key`` and ``value`` list paths in graph order. An operand that no projection makes has none.
    """

    node: str
    query: tuple[str, ...]
    key: tuple[str, ...]
    value: tuple[str, ...]


def find_attention(program: ExportedProgram) -> list[Attention]:
    """Return every attention block of ``program``, in graph order; a module that is called twice is listed twice.

    An operand's module paths are those of the nearest nodes that make it from a parameter: linear, ``addmm`` and other
    matmuls, convolutions. The call suffix (``@1``) is removed.

    A projection outside the module that holds the attention counts only where it is the operand's only projection.
    Layers that share keys and values need this. An operand taken straight from the residual stream reaches many outer
    projections, and is made by none of them.
    """
    flow = AttentionFlow(program)
    return [_make_attention(flow, *block) for block in flow.blocks]


def default_targets(program: ExportedProgram) -> list[str]:
    """Return the query and value projections of ``program`` as target names, in order of first appearance.

    Of each attention the query projections come first. A name is the last path component (``"q_proj"``), as in PEFT's
    table of default targets. Where that component also names a module that is neither query nor value, the full path
    is the name.

    A fused projection gives its one name. An attention module that owns its projection weights
    (``nn.MultiheadAttention``) gives its own name. A program without attention gives [].
    """
    flow = AttentionFlow(program)
    attentions = [_make_attention(flow, *block) for block in flow.blocks]
    target_paths = dict.fromkeys(path for a in attentions for path in (*a.query, *a.value) if path)
    ambiguous_names = {_last_component(path) for path in flow.consumer_modules() if path not in target_paths}
    return list(
        dict.fromkeys(
            path if _last_component(path) in ambiguous_names else _last_component(path) for path in target_paths
        )
    )


def _make_attention(flow: AttentionFlow, node: Node, operands: tuple[Iterable[Node], ...]) -> Attention:
    paths = [list(dict.fromkeys(flow.module_of(n) for n in sorted(nodes))) for nodes in operands]
    attention_module = module_path(node, flow.module_paths)
    while attention_module and not any(_is_within(path, attention_module) for operand in paths for path in operand):
        attention_module = attention_module.rpartition(".")[0]
    inner_paths = [tuple(path for path in operand if _is_within(path, attention_module)) for operand in paths]
    query, key, value = (n or (tuple(far) if len(far) == 1 else ()) for n, far in zip(inner_paths, paths, strict=True))
    return Attention(node.name, query, key, value)


def _is_within(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(module + ".")


def _last_component(path: str) -> str:
    return path.rpartition(".")[2]
