"""Stand in for layers of a program, for code that asks a model for a layer to read its tensors or to hook its output.

:func:`insert_embedding_hook` changes a graph so that the output of the input embeddings passes through such a module.
The graph computes the same as before.

Parameters are held to their constraints: before each call that gradients are taken of, they become what their methods'
``constrained`` makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn

from adaptc.errors import AdaptcError
from adaptc.passes.graph.module_paths import module_path, program_module_paths
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import Method
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


class Constraints:
    """The constraints on the adapter that ``program`` is bound to; most adapters have none."""

    def __init__(self, program: ProgramCore) -> None:
        self._sites: list[tuple[Method, Op, Mapping[str, str]]] = []
        binding = program.current
        for a in program.adaptation.attachments if binding is not None else ():
            method, op = binding.methods.get(a.id), program.ops[a.id]  # type: ignore[union-attr]
            if method is not None and method.constrained(op, {n: binding.values[f] for n, f in a.slots.items()}):  # type: ignore[union-attr]
                self._sites.append((method, op, a.slots))

    def enforce(self, module: nn.Module) -> None:
        """Move the parameters of ``module`` back, in place; only those that train, and only where gradients are on."""
        if not self._sites or not torch.is_grad_enabled():
            return
        compiling = torch.compiler.is_compiling()
        with torch.no_grad():
            for method, op, fqns in self._sites:
                slots = {n: _tensor_of(module, f) for n, f in fqns.items()}
                for name, value in method.constrained(op, slots).items():
                    if slots[name].requires_grad:
                        # A write that autograd counts would fail the backward of an earlier call that read this
                        # parameter. Without an optimizer's step in between, the same value is written, so it need not
                        # be counted; a step is counted by the optimizer itself, unless it is fused.
                        (slots[name] if compiling else slots[name].data).copy_(value)


def _tensor_of(module: nn.Module, fqn: str) -> Tensor:
    path, _, name = fqn.rpartition(".")
    return getattr(module.get_submodule(path), name)
