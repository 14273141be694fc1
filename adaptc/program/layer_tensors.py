"""Layers of a program as objects, for who asks a model for one of them: its tensors, and hooks on what it gives.

Before: the graph of a module. After: the same, with what the input embeddings give led through a module that can have
hooks; it computes what it did.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from adaptc.errors import AdaptcError
from adaptc.passes.ir.module_paths import module_path, owners_of
from adaptc.program.core import ProgramCore


class Tensors(nn.Module):
    """The ``weight`` and ``bias`` of a layer of a program, as they are now; hooks on it see and change what the layer
    gives. ``bias``: of a layer that has one; each is given as the module that holds it, and its name there."""

    def __init__(self, weight: tuple[nn.Module, str], bias: tuple[nn.Module, str] | None = None) -> None:
        super().__init__()
        vars(self).update(_weight=weight, _bias=bias)

    @property
    def weight(self) -> Tensor:
        return getattr(*vars(self)["_weight"])

    @property
    def bias(self) -> Tensor | None:
        return None if vars(self)["_bias"] is None else getattr(*vars(self)["_bias"])

    @property
    def num_embeddings(self) -> int:
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.weight.shape[1]

    def forward(self, y: Tensor) -> Tensor:
        return y


class AllDropout(nn.Dropout):
    """Stands for all layers of dropout of a graph, for who looks for such layers to set their ``p`` to 0. ``switch``:
    called with whether they are to act."""

    def __init__(self, switch: Callable[[bool], None]) -> None:
        nn.Module.__init__(self)
        self.inplace = False
        vars(self).update(_switch=switch, _on=True)

    @property
    def p(self) -> float:  # type: ignore[override]  # torch has a plain attribute
        """0 where they are off; what each has otherwise is in the graph."""
        return 0.5 if vars(self)["_on"] else 0.0

    @p.setter
    def p(self, value: float) -> None:
        if value:
            raise AdaptcError(
                f"dropout of {value} is not set: a program has that of the model and the config it was compiled with, "
                "and p = 0 turns it off; compile it again for another one"
            )
        vars(self)["_on"] = False
        vars(self)["_switch"](False)

    def __repr__(self) -> str:
        return f"all dropout, {'as captured' if vars(self)['_on'] else 'off'}"


def open_port(graph: fx.GraphModule, program: ProgramCore, port: Tensors | None = None) -> Tensors | None:
    """Lead what the input embeddings give through a module that can have hooks, a new one or ``port``."""
    source = program.adaptation.source
    path = None if source is None else source.input_embedding
    known = owners_of(program)
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
        weight = node.args[0]
        if path and module_path(node, known) == path and weight.op == "get_attr":
            holder, _, name = str(weight.target).rpartition(".")
            port = port or Tensors((graph.get_submodule(holder), name))
            target = next(n for i in range(10**6) if not hasattr(graph, n := f"input_embeddings{i or ''}"))
            graph.add_submodule(target, port)
            with graph.graph.inserting_after(node):
                through = graph.graph.call_module(target, (node,))
            through.meta = dict(node.meta)
            node.replace_all_uses_with(through, delete_user_cb=lambda user, through=through: user is not through)
            graph.recompile()
            return port
    return None
