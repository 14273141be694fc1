"""Run the base of a program on batches, node by node, and look at what its sites read or at their weights' gradients.

Inputs of sites are handed to a callback as soon as they are known, and freed when their last reader has run. So no more
is held than in a call. The program does not change: buffers that the graph writes to are copied first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind, OutputKind

from adaptc.errors import AdaptcError, short_repr
from adaptc.passes.graph.ops import LAYER_OPS, argument
from adaptc.passes.graph.pytree import pytree
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.train.set_mode import SetMode
from adaptc.progress import Stage
from adaptc.runtime.mutated_buffers import copy_sharing_memory, written_placeholders
from adaptc.state.core import ProgramCore
from adaptc.state.merge_program import unload_program

#: called with the input of a layer, (..., in)
Look = Callable[[Tensor], None]
LABELS = "labels"
aten = torch.ops.aten


class BaseRuns:
    """The base of a program, to be run on batches. ``training``: whether it has its dropout, as in training."""

    def __init__(self, program: ProgramCore, training: bool = False) -> None:
        unloaded: Any = unload_program(program)
        base: Any = SetMode(True)(unloaded).output if training and program.adaptation.training else unloaded
        self._module, self._device = base.graph_module, program.device
        self._inputs = program.adaptation.inputs(unloaded)
        self.nodes: Mapping[str, fx.Node] = {n.name: n for n in base.graph.nodes}
        signature = base.graph_signature
        written = written_placeholders(base.graph)
        tensors: dict[str, Any] = {**base.constants, **base.state_dict}
        lifted = [s for s in signature.input_specs if s.kind != InputKind.USER_INPUT]
        names = [str(s.target) for s in lifted if s.arg.name in written]
        plain = {n: t for n, t in tensors.items() if isinstance(t, Tensor)}
        tensors |= copy_sharing_memory(plain, names) if names else {}
        self._lifted = {s.arg.name: (str(s.target), tensors[str(s.target)]) for s in lifted}
        self._outputs = [i for i, s in enumerate(signature.output_specs) if s.kind == OutputKind.USER_OUTPUT]
        self._out_spec = base.call_spec.out_spec

    def input_nodes(self, a: Attachment) -> tuple[fx.Node, ...]:
        """Return the nodes whose values the layer of ``a`` reads, one for each of its calls; empty where it is no layer
        with an input."""
        found: list[fx.Node] = []
        for name in a.consumers:
            node = self.nodes[name]
            if node.target not in LAYER_OPS:
                return ()
            found.append(_before_views(argument(node, LAYER_OPS[node.target][1])))
        return tuple(found)

    def run(
        self,
        batch: Any,
        looks: Mapping[fx.Node, Sequence[Look]],
        weights: Mapping[str, Tensor],
        ends_early: bool = False,
    ) -> Any:
        """Return the outputs for ``batch``, in the form of the model's outputs where torch knows it.

        ``looks``: node -> what is called with its value. ``weights``: FQN -> a tensor in the place of that weight.
        ``ends_early`` is for :func:`look_at_inputs`.
        """
        args, kwargs = self._arguments(batch)
        flat = self._inputs(args, kwargs)
        lifted = [weights.get(fqn, value) for fqn, value in self._lifted.values()]
        found = _LookingInterpreter(self._module, looks, ends_early).run(*lifted, *flat)
        outputs = [found[i] for i in self._outputs]
        return pytree.tree_unflatten(outputs, self._out_spec)

    def _arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        batch = pytree.tree_map(self._usable, _plain(batch))
        if isinstance(batch, dict):
            taken = {*self._inputs.names, *self._inputs.call_names.positional}
            return (), {n: v for n, v in batch.items() if n != LABELS or n in taken}
        return tuple(batch), {}

    def _usable(self, value: Any) -> Any:
        """Return a value of a batch on the device of the program, and as a tensor that gradients may need."""
        if not isinstance(value, Tensor):
            return value
        made_here = value.clone() if value.is_inference() else value
        return made_here.to(self._device)


def _before_views(node: fx.Node) -> fx.Node:
    """Return the node whose rows ``node`` has, perhaps flattened: what a ``Conv1D`` of transformers is called with."""
    while node.target in (aten.view.default, aten.reshape.default):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source.meta["val"].shape[-1:] != node.meta["val"].shape[-1:]:
            break
        node = source
    return node


def _plain(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return dict(batch.items())
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, (tuple, list)):
        return tuple(batch)
    raise AdaptcError(
        f"a batch is a dict of inputs, a tuple of them, or one tensor, and here is {short_repr(batch)}; give an "
        "iterable of batches, such as a DataLoader"
    )


class _LookingInterpreter(fx.Interpreter):
    """An interpreter that hands the values of some nodes to callbacks."""

    def __init__(self, module: fx.GraphModule, looks: Mapping[fx.Node, Sequence[Look]], ends_early: bool) -> None:
        """``ends_early``: whether to raise :class:`_AllSeen` after the last of these nodes."""
        super().__init__(module)
        self._looks = {n.name: calls for n, calls in looks.items()}
        self._last = next((n.name for n in reversed(module.graph.nodes) if n.name in self._looks), None)
        self._last = self._last if ends_early else None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for look in self._looks.get(n.name, ()):
            look(value.detach())
        if n.name == self._last:
            raise _AllSeen
        return value


class _AllSeen(Exception):
    """The end of a run whose outputs nobody reads."""


def counted(batches: Iterable[Any], running: Stage) -> Iterator[Any]:
    """Yield the batches while the status line of ``running`` counts them. Raises AdaptcError where there is none."""
    with contextlib.suppress(TypeError):
        running.total = len(batches)  # type: ignore[arg-type]
    running.done = 0
    for batch in batches:
        yield batch
        running.done += 1
    if not running.done:
        raise AdaptcError("batches has no batch, so there is no data to make first values of")


def mask_of(batch: Any, label_mask_value: int | None) -> Tensor | None:
    """Return which positions (batch, tokens) of a batch count: those of its attention_mask, where it has one, whose
    label is not ``label_mask_value``, where it has labels. None for all."""
    if not isinstance(batch, Mapping):
        return None
    mask, labels = batch.get("attention_mask"), batch.get(LABELS)
    mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if label_mask_value is None or not isinstance(labels, Tensor) or labels.ndim != 2:
        return mask
    labelled = labels != label_mask_value
    return labelled if mask is None else mask & labelled


def rows_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows (rows, in) of a layer's input at the positions of ``mask``.

    Raises AdaptcError where the input has other positions than the batch.
    """
    rows = x.reshape(-1, x.shape[-1])
    if mask is None:
        return rows
    if rows.shape[0] != mask.numel():
        raise AdaptcError(
            f"its input of shape {tuple(x.shape)} has no rows for the {tuple(mask.shape)} tokens of a batch; leave the "
            "site out with exclude_modules, or give batches without attention_mask and labels"
        )
    return rows[mask.reshape(-1).to(x.device)]


@torch.no_grad()
def look_at_inputs(runs: BaseRuns, batch: Any, looks: Mapping[fx.Node, Sequence[Look]]) -> None:
    """Run one batch, and call ``looks`` with the values of their nodes. What comes after them, such as a head, is not
    computed."""
    with contextlib.suppress(_AllSeen):
        runs.run(batch, looks, {}, ends_early=True)
