"""Read what a program with adapters is: the values it was made of, and those it runs by now.

The constructor in ``core`` sets these values. Reading one computes, copies and changes nothing. Values that are
replaced while a program runs are read here in one place, and are replaced in ``core`` and ``follow_binding``.

``clone_tensors`` copies a program's tensors, so that what was one tensor stays one. :class:`Constraints` holds the
parameters of an adapter to what their methods allow, before each call that gradients are taken of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.binding_plan_cache import BindingPlanCache
from adaptc.binding.stored_adapters import StoredAdapters
from adaptc.errors import AdaptcError
from adaptc.passes.adapt.embedding_max_norm import max_norms_of
from adaptc.passes.analysis.unread_weights import unread_weights
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import Op
from adaptc.passes.graph.storage import storage_key
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Method
from adaptc.runtime.options import RunOptions
from adaptc.state.adaptation import Adaptation
from adaptc.state.running import CallState, RunState, check_base_meta


class ProgramProperties(ExportedProgram):
    """An exported program with the values that a program with adapters is made of, to read."""

    _adaptation: Adaptation
    _ops: Mapping[str, Op]
    _binding_plans: BindingPlanCache
    _run_state: RunState
    _base_tensors: dict[str, Any]
    _expected_meta: Mapping[str, Any]
    #: whether a merge with ``keep_base=False`` took its base tensors
    base_released: bool

    @property
    def adaptation(self) -> Adaptation:
        return self._adaptation

    @property
    def ops(self) -> Mapping[str, Op]:
        """Return a map from the id of each attachment to the op at its site."""
        return self._ops

    @property
    def current(self) -> Binding | None:
        """Return the current binding; None where the program has no adapters."""
        return self._run_state.call_state.binding

    @property
    def binding(self) -> Binding:
        """Return the current binding.

        Raises:
            AdaptcError: the program has no adapters.
        """
        binding = self._run_state.call_state.binding
        if binding is None:
            raise AdaptcError("the program has no adapter; it was merged or unloaded")
        return binding

    @property
    def adapters(self) -> StoredAdapters:
        """Return the adapters of the file that the program was loaded from, by name; none for any other program.

        ``swap``, ``bind`` and ``bank.add`` take these names.
        """
        return self._adaptation.stored

    @property
    def options(self) -> RunOptions:
        """Return the options by which the program runs."""
        return self._run_state.call_state.options

    @property
    def originals(self) -> Mapping[str, Tensor]:
        """Return the original base parameters, by FQN, that the state dict has in the current adapter's own version."""
        state = self.state_dict
        return {k: t for k, t in self.base_tensors_or_empty().items() if k in state and state[k] is not t}

    @property
    def binding_plans(self) -> BindingPlanCache:
        """Return the plans for making bindings, which are remembered from one adapter to the next."""
        return self._binding_plans

    @property
    def device(self) -> torch.device:
        """Return the device of the first site's parameter, else of the first tensor in the state dict; the CPU where
        there is none."""
        attachments, state = self._adaptation.attachments, self._state_dict
        if attachments and attachments[0].fqn in state:
            return state[attachments[0].fqn].device
        return next((t.device for t in state.values() if isinstance(t, Tensor)), torch.device("cpu"))

    @property
    def call_state(self) -> CallState:
        """Return the values that calls read, with their code where calls have made it."""
        return self._run_state.call_state

    @property
    def run_state(self) -> RunState:
        """Return the memory of the running program: memos, modules, bound callables and their code."""
        return self._run_state

    @property
    def base_tensors(self) -> Mapping[str, Tensor]:
        """Return FQN -> base parameter as it was before any adapter changed it (PiSSA and OLoRA do). Raises AdaptcError
        where a merge took the base."""
        self._check_base_kept()
        return self._base_tensors

    @property
    def expected_meta(self) -> Mapping[str, Any]:
        """Return FQN -> (shape, dtype, device) of each base tensor when the program was made."""
        return self._expected_meta

    def base_tensors_or_empty(self) -> dict[str, Tensor]:
        """Return :attr:`base_tensors` as far as they are left, also of a program whose base a merge took."""
        return self._base_tensors

    def spec(self, trainable: bool = False) -> BindingSpec:
        """Return what a binding must fill. Raises AdaptcError where a base tensor is no longer what the program was
        made for."""
        self.check_base()
        a = self._adaptation
        # Read off the graph that was shown last: no adapter changes the bounds, and an up-to-date graph would have to
        # wait for the lock on graphs.
        bounds = max_norms_of(self._run_state.exported.module.graph, self._graph_signature)
        base = self.base_tensors
        idle = cache(partial(unread_weights, self._run_state.exported.module.graph, self._graph_signature, base))
        return BindingSpec(a.attachments, self._ops, base, a.autocast, trainable, a.unread, a.residual, bounds, idle)

    def check_base(self) -> None:
        """Raise AdaptcError where a base tensor is no longer what the program was made for."""
        check_base_meta(self._base_tensors, self._expected_meta)

    def _check_base_kept(self) -> None:
        if self.base_released:
            raise AdaptcError(
                "this program was merged with keep_base=False, which gave up its base: use the merged program, or "
                "merge with keep_base=True"
            )


def clone_tensors(lifted: LiftedProgram, memo: dict[int, Any]) -> None:
    """Replace the tensors of ``lifted`` by clones. ``memo``: that of the ``copy.deepcopy`` that this is part of."""
    for tensors in (lifted.state_dict, lifted.constants):
        clones: dict[Any, Any] = {}
        for name, t in tensors.items():
            if isinstance(t, Tensor):
                key = storage_key(t)
                clones[key] = tensors[name] = clones.get(key, memo.get(id(t), map_tensor(t, Tensor.clone)))
                memo[id(t)] = clones[key]


def map_tensor(t: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``function`` of a tensor, as a parameter if the tensor is one."""
    new = function(t.detach())
    return nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new


class Constraints:
    """The constraints on the adapter ``binding``, None for no adapter; most adapters have none."""

    def __init__(self, attachments: Sequence[Attachment], ops: Mapping[str, Op], binding: Binding | None) -> None:
        self._sites: list[tuple[Method, Op, Mapping[str, str]]] = []
        for a in attachments if binding is not None else ():
            method, op = binding.methods.get(a.id), ops[a.id]  # type: ignore[union-attr]
            if method is not None and method.constrained(op, {n: binding.values[f] for n, f in a.slots.items()}):  # type: ignore[union-attr]
                self._sites.append((method, op, a.slots))

    def enforce(self, tensor_of: Callable[[str], Tensor]) -> None:
        """Move parameters back, in place; only those that train, and only where gradients are on. ``tensor_of`` gives
        the tensor of an FQN."""
        if not self._sites or not torch.is_grad_enabled():
            return
        compiling = torch.compiler.is_compiling()
        with torch.no_grad():
            for method, op, fqns in self._sites:
                slots = {n: tensor_of(f) for n, f in fqns.items()}
                for name, value in method.constrained(op, slots).items():
                    if slots[name].requires_grad:
                        # A write that autograd counts would fail the backward of an earlier call that read this
                        # parameter. Without an optimizer's step in between, the same value is written, so it need not
                        # be counted; a step is counted by the optimizer itself, unless it is fused.
                        (slots[name] if compiling else slots[name].data).copy_(value)
