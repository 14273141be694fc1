"""Stand in for layers of a program, for code that asks a model for a layer to read its tensors or to hook its output.

:func:`insert_embedding_hook` changes a graph so that the output of the input embeddings passes through such a module.
The graph computes the same as before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from adaptc.errors import AdaptcError
from adaptc.passes.graph.module_paths import module_path, program_module_paths
from adaptc.state.core import ProgramCore


class LayerStandIn(nn.Module):
    """A stand-in for a layer of a program, with the layer's current ``weight`` and ``bias``.

    It returns its input unchanged. Where a graph calls it on the layer's output, hooks on it see and change that
    output. ``weight`` and ``bias`` are given as the module that holds the tensor and the tensor's name there. ``bias``
    is None for a layer without one.
    """

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


class DropoutStandIn(nn.Dropout):
    """A stand-in for all dropout layers of a graph, for code that looks for such layers to set their ``p`` to 0.

    ``switch`` is called with False when that code turns dropout off.
    """

    def __init__(self, switch: Callable[[bool], None]) -> None:
        nn.Module.__init__(self)
        self.inplace = False
        vars(self).update(_switch=switch, _on=True)

    @property
    def p(self) -> float:  # type: ignore[override]  # torch has a plain attribute
        """Return 0.0 where dropout is off, else 0.5 as a mark that it is on; the graph holds the rate of each layer.
        Only 0 can be assigned, which turns dropout off; any other value raises AdaptcError."""
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


def insert_embedding_hook(
    graph: fx.GraphModule, program: ProgramCore, stand_in: LayerStandIn | None = None
) -> LayerStandIn | None:
    """Lead the output of the input embeddings through ``stand_in``, or through a new :class:`LayerStandIn`, and return
    that module.

    Returns None, and changes nothing, where the program does not know its input embeddings or the graph does not look
    up their weight.
    """
    source = program.adaptation.source
    path = None if source is None else source.input_embedding
    known = program_module_paths(program)
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
        weight = node.args[0]
        if path and module_path(node, known) == path and weight.op == "get_attr":
            holder, _, name = str(weight.target).rpartition(".")
            stand_in = stand_in or LayerStandIn((graph.get_submodule(holder), name))
            target = next(n for i in range(10**6) if not hasattr(graph, n := f"input_embeddings{i or ''}"))
            graph.add_submodule(target, stand_in)
            with graph.graph.inserting_after(node):
                through = graph.graph.call_module(target, (node,))
            through.meta = dict(node.meta)
            node.replace_all_uses_with(through, delete_user_cb=lambda user, through=through: user is not through)
            graph.recompile()
            return stand_in
    return None
