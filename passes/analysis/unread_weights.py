"""Find the weights of a program that it never reads, since its model never calls their layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx
from torch.export import ExportGraphSignature

from adaptc.passes.graph.lifted import fqns_by_placeholder
from adaptc.passes.graph.storage import storage_key


def unread_weights(graph: fx.Graph, signature: ExportGraphSignature, weights: Mapping[str, Tensor]) -> frozenset[str]:
    """Return the names of the ``weights`` that no node of ``graph`` reads, under any of their names."""
    names = fqns_by_placeholder(signature)
    used = {names.get(n.name, "") for n in graph.find_nodes(op="placeholder") if n.users}
    read = {storage_key(t) for fqn, t in weights.items() if fqn in used}
    return frozenset(fqn for fqn, t in weights.items() if storage_key(t) not in read)
