"""What a program with adapters is, to look at: the values it was made of, and those it runs by now.

Before: an exported program whose constructor (``core``) has set them. After a look: nothing is computed, copied or
changed. What is replaced while a program runs is read here in one place; it is put there in ``core``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.recipes import Recipes
from adaptc.errors import AdaptcError
from adaptc.passes.adapt.bound_rows import bounds_of
from adaptc.passes.ir.ops import Op
from adaptc.program.adaptation import Adaptation
from adaptc.program.running import Running, RunState, check_replaced
from adaptc.runtime.options import RunOptions


class ProgramValues(ExportedProgram):
    """See the module docstring."""

    _adaptation: Adaptation
    _ops: Mapping[str, Op]
    _recipes: Recipes
    _run: RunState
    _base: dict[str, Any]
    _meant: Mapping[str, Any]
    #: whether a merge took its base tensors away
    given_up: bool

    @property
    def adaptation(self) -> Adaptation:
        return self._adaptation

    @property
    def ops(self) -> Mapping[str, Op]:
        """Attachment id -> the op at its site."""
        return self._ops

    @property
    def current(self) -> Binding | None:
        """The current binding; None where the program has no adapters."""
        return self._run.now.binding

    @property
    def binding(self) -> Binding:
        """The current binding. Raises AdaptcError where the program has no adapters."""
        binding = self._run.now.binding
        if binding is None:
            raise AdaptcError("the program has no adapter; it was merged or unloaded")
        return binding

    @property
    def options(self) -> RunOptions:
        """How it runs."""
        return self._run.now.options

    @property
    def originals(self) -> Mapping[str, Tensor]:
        """Base parameters of which the state dict has the current adapter's own version, as they were."""
        state = self.state_dict
        return {k: t for k, t in self.bare_state().items() if k in state and state[k] is not t}

    @property
    def recipes(self) -> Recipes:
        """How bindings are made, remembered from one adapter to the next."""
        return self._recipes

    @property
    def device(self) -> torch.device:
        """Where the first site is, or the first parameter."""
        attachments, state = self._adaptation.attachments, self._state_dict
        if attachments and attachments[0].fqn in state:
            return state[attachments[0].fqn].device
        return next((t.device for t in state.values() if isinstance(t, Tensor)), torch.device("cpu"))

    @property
    def running(self) -> Running:
        """What calls read, with their code as far as they have made it."""
        return self._run.now

    @property
    def memory(self) -> RunState:
        """What programs that share the graph share, too."""
        return self._run

    @property
    def base_tensors(self) -> Mapping[str, Tensor]:
        """FQN -> base parameter as it was before any adapter changed it (PiSSA and OLoRA do)."""
        self._check_whole()
        return self._base

    @property
    def meant(self) -> Mapping[str, Any]:
        """Shape, dtype and device of its base tensors when it was made."""
        return self._meant

    def bare_state(self) -> dict[str, Tensor]:
        """The same of a program that may have given them up."""
        return self._base

    def spec(self, trainable: bool = False) -> BindingSpec:
        """What a binding must fill. Raises AdaptcError where a base tensor is no longer what it was made for."""
        self.check_base()
        a = self._adaptation
        # Of the graph as it was last shown, for no adapter changes them, and whoever wants it anew waits for others.
        bounds = bounds_of(self._run.exported.module.graph, self._graph_signature)
        base = self.base_tensors
        return BindingSpec(a.attachments, self._ops, base, a.autocast, trainable, a.unread, a.residual, bounds)

    def check_base(self) -> None:
        """Raises AdaptcError where a base tensor is no longer what the program was made for."""
        check_replaced(self._base, self._meant)

    def _check_whole(self) -> None:
        if self.given_up:
            raise AdaptcError(
                "this program was merged with keep_base=False, which gave up its base: use the merged program, or "
                "merge with keep_base=True"
            )
