"""Read what a program with adapters is: the values it was made of, and those it runs by now.

The constructor in ``core`` sets these values. Reading one computes, copies and changes nothing. Values that are
replaced while a program runs are read here in one place, and are replaced in ``core``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.binding_plan_cache import Recipes
from adaptc.errors import AdaptcError
from adaptc.passes.adapt.embedding_max_norm import bounds_of
from adaptc.passes.graph.ops import Op
from adaptc.runtime.options import RunOptions
from adaptc.state.adaptation import Adaptation
from adaptc.state.running import Running, RunState, check_replaced


class ProgramValues(ExportedProgram):
    """An exported program with the values that a program with adapters is made of, to read."""

    _adaptation: Adaptation
    _ops: Mapping[str, Op]
    _recipes: Recipes
    _run: RunState
    _base: dict[str, Any]
    _meant: Mapping[str, Any]
    #: whether a merge with ``keep_base=False`` took its base tensors
    given_up: bool

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
        return self._run.now.binding

    @property
    def binding(self) -> Binding:
        """Return the current binding. Raises AdaptcError where the program has no adapters."""
        binding = self._run.now.binding
        if binding is None:
            raise AdaptcError("the program has no adapter; it was merged or unloaded")
        return binding

    @property
    def options(self) -> RunOptions:
        """Return the options by which the program runs."""
        return self._run.now.options

    @property
    def originals(self) -> Mapping[str, Tensor]:
        """Return the original base parameters, by FQN, that the state dict has in the current adapter's own version."""
        state = self.state_dict
        return {k: t for k, t in self.bare_state().items() if k in state and state[k] is not t}

    @property
    def recipes(self) -> Recipes:
        """Return the recipes for making bindings, which are remembered from one adapter to the next."""
        return self._recipes

    @property
    def device(self) -> torch.device:
        """Return the device of the first site's parameter, else of the first tensor in the state dict; the CPU where
        there is none."""
        attachments, state = self._adaptation.attachments, self._state_dict
        if attachments and attachments[0].fqn in state:
            return state[attachments[0].fqn].device
        return next((t.device for t in state.values() if isinstance(t, Tensor)), torch.device("cpu"))

    @property
    def running(self) -> Running:
        """Return the values that calls read, with their code where calls have made it."""
        return self._run.now

    @property
    def memory(self) -> RunState:
        """Return the memory of the running program: memos, modules, bound callables and their code."""
        return self._run

    @property
    def base_tensors(self) -> Mapping[str, Tensor]:
        """Return FQN -> base parameter as it was before any adapter changed it (PiSSA and OLoRA do). Raises AdaptcError
        where a merge took the base."""
        self._check_whole()
        return self._base

    @property
    def meant(self) -> Mapping[str, Any]:
        """Return FQN -> (shape, dtype, device) of each base tensor when the program was made."""
        return self._meant

    def bare_state(self) -> dict[str, Tensor]:
        """Return :attr:`base_tensors` as far as they are left, also of a program whose base a merge took."""
        return self._base

    def spec(self, trainable: bool = False) -> BindingSpec:
        """Return what a binding must fill. Raises AdaptcError where a base tensor is no longer what the program was
        made for."""
        self.check_base()
        a = self._adaptation
        # Read off the graph that was shown last: no adapter changes the bounds, and an up-to-date graph would have to
        # wait for the lock on graphs.
        bounds = bounds_of(self._run.exported.module.graph, self._graph_signature)
        base = self.base_tensors
        return BindingSpec(a.attachments, self._ops, base, a.autocast, trainable, a.unread, a.residual, bounds)

    def check_base(self) -> None:
        """Raise AdaptcError where a base tensor is no longer what the program was made for."""
        check_replaced(self._base, self._meant)

    def _check_whole(self) -> None:
        if self.given_up:
            raise AdaptcError(
                "this program was merged with keep_base=False, which gave up its base: use the merged program, or "
                "merge with keep_base=True"
            )
