"""Show the current binding in the exported program: in its graph, and in its state dict.

torch's own methods read both. They are made when somebody looks at them after a swap, and kept until the next one.
Nobody can assign them: passes make another program, and swaps another binding.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

from torch import fx

from adaptc.binding.binding import Binding
from adaptc.passes.adapt.respecialize import Respecialize
from adaptc.passes.graph.graph_lock import hold_graph_lock
from adaptc.passes.graph.lifted import copy_graph
from adaptc.passes.graph.torch_caches import drop_dead_code
from adaptc.passes.protocol.regions import set_program_record
from adaptc.state.running import CallState, ExportedView
from adaptc.state.values import ProgramProperties


class ExportedParts(ProgramProperties):
    """The graph and the tensors of a program with adapters, which follow its binding."""

    def _updated_export(self) -> ExportedView:
        """Return the graph and tensors that show the current binding, made now if nobody has looked since it was
        installed."""
        run = self._run_state
        found, binding = run.exported, run.call_state.binding
        if binding is None or found.shows_binding(binding):
            return found
        with hold_graph_lock():
            found, binding = run.exported, run.call_state.binding
            if binding is not None and not found.shows_binding(binding):
                found = self._export_binding(found, binding)
                self._set_export(found)
            return found

    def _export_binding(self, old: ExportedView, binding: Binding) -> ExportedView:
        a, graph = self._adaptation, copy_graph(old.module.graph)
        names = {s.target: s.arg.name for s in self._graph_signature.input_specs if s.target is not None}
        Respecialize(a.attachments, self._ops, names, binding.values, self._run_state.traced_regions, old.module)(graph)
        set_program_record(graph, a.header(binding))
        new = {**self.base_tensors_or_empty(), **binding.values, **binding.changed_base}
        drop_dead_code()
        tensors = {k: new.get(k, t) for k, t in old.tensors.items()}
        return ExportedView(fx.GraphModule(old.module, graph), tensors, weakref.ref(binding))

    def _set_export(self, exported: ExportedView) -> None:
        """Put ``exported`` where torch's own methods see it."""
        self._run_state.exported = exported
        self._graph_module, self._state_dict = exported.module, exported.tensors

    @property
    def graph_module(self) -> fx.GraphModule:
        return self._updated_export().module

    @graph_module.setter
    def graph_module(self, value: fx.GraphModule) -> NoReturn:
        raise AttributeError("the graph of a program is changed by passes, which return a new program")

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @graph.setter
    def graph(self, value: fx.Graph) -> NoReturn:
        raise AttributeError("the graph of a program is changed by passes, which return a new program")

    @property
    def state_dict(self) -> dict[str, Any]:
        self._check_base_kept()
        return self._updated_export().tensors

    @state_dict.setter
    def state_dict(self, value: Mapping[str, Any]) -> NoReturn:
        raise AttributeError("use adaptc.swap to change adapter tensors; base tensors are fixed")

    def release_base_tensor(self, fqn: str) -> None:
        """Give up a base tensor, and what an adapter made of it, for a merge that does not keep the base."""
        run = self._run_state
        with run.lock:
            self.base_released = True
            binding = run.call_state.binding
            if binding is not None and fqn in binding.changed_base:
                binding = replace(binding, changed_base={k: v for k, v in binding.changed_base.items() if k != fqn})
            # The memory of merges at other sites holds base tensors too, and would keep them alive.
            run.call_state, run.merged_programs = CallState(binding, run.call_state.options), {}
            self._base_tensors = {k: t for k, t in self._base_tensors.items() if k != fqn}
            shown = {k: t for k, t in run.exported.tensors.items() if k != fqn}
            self._set_export(
                ExportedView(run.exported.module, shown, None if binding is None else weakref.ref(binding))
            )
