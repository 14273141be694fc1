"""Find the weights of a program that it never reads, since its model never calls their layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, fx
from torch.export import ExportGraphSignature

from adaptc.passes.graph.lifted import fqns_by_placeholder
from adaptc.passes.graph.module_paths import clean_path, module_paths_of
from adaptc.passes.graph.storage import storage_key


def unread_weights(graph: fx.Graph, signature: ExportGraphSignature, weights: Mapping[str, Tensor]) -> frozenset[str]:
    """Return the names of the ``weights`` that no node of ``graph`` reads.

    Two layers may share a weight. Where one of them alone is called, the other's name is returned.
    """
    names = fqns_by_placeholder(signature)
    used = {names.get(n.name, "") for n in graph.find_nodes(op="placeholder") if n.users}
    read = {storage_key(t) for fqn, t in weights.items() if fqn in used}
    called, sharing = _called_modules(graph, weights), defaultdict[object, list[str]](list)
    unread = set[str]()
    for fqn, t in weights.items():
        if storage_key(t) in read:
            sharing[storage_key(t)].append(fqn)
        else:
            unread.add(fqn)
    for shared in sharing.values():
        idle = {n for n in shared if n.rpartition(".")[0] not in called}
        unread |= idle if len(idle) < len(shared) else set[str]()
    return frozenset(unread)


def _called_modules(graph: fx.Graph, weights: Mapping[str, Tensor]) -> set[str]:
    """Return the paths of all modules that a node of ``graph``, or of a graph inside of it, was traced in."""
    paths = module_paths_of(weights)
    whole = graph.owning_module
    inner = (m.graph for m in whole.modules() if isinstance(m, fx.GraphModule)) if whole else ()
    stacks: list[dict[str, tuple[str, object]]] = [
        n.meta.get("nn_module_stack") or {} for g in (graph, *inner) for n in g.nodes
    ]
    return {clean_path(path, paths) for stack in stacks for path, _ in stack.values()}
