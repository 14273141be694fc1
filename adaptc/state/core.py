"""Keep the state of a program with adapters: frozen values that say what it is, and what it remembers while it runs.

    frozen       adaptation, binding, options, originals, origin     replaced as a whole, never written to
    disposable   ``RunState``: the code of calls, memos, a lock        another one may take its place at any time

The program *is* a ``torch.export.ExportedProgram``: everything that takes one takes it. A swap only replaces the
binding. The state dict and the graph's fake values follow when somebody looks at them. There is one constructor. The
copies that ``with_binding`` and ``with_options`` make share code and base until one of them changes.

Any thread may do anything at any time. A call reads one value, :class:`Running`, and the exported program shows another
one, :class:`Exported`. Both are made aside, are frozen, and are put in place by one assignment, so an interrupted
change changes nothing. Code that looks more than once takes a ``snapshot()`` first, which nobody else swaps.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from adaptc.binding.binding import Binding
from adaptc.binding.binding_plan_cache import Recipes
from adaptc.errors import AdaptcError, SwapError
from adaptc.passes.adapt.move import Move, usable
from adaptc.passes.adapt.respecialize import Respecialize
from adaptc.passes.graph.graph_lock import on_graphs
from adaptc.passes.graph.lifted import Lifted, copy_graph
from adaptc.passes.graph.torch_caches import forget_code
from adaptc.passes.protocol.regions import set_header, site_op
from adaptc.runtime.dynamo_boundary import outside
from adaptc.runtime.executor import Arguments, Executor
from adaptc.runtime.options import RunOptions
from adaptc.state.adaptation import Adaptation
from adaptc.state.check_options import check_options
from adaptc.state.copy_tensors import clone_tensors, mapped
from adaptc.state.overrides import MOST, SCALE, as_seen, key_of, view_of
from adaptc.state.running import Exported, Running, RunState, called, called_as
from adaptc.state.values import ProgramValues
from adaptc.torch_modes import plainly


@dataclass(frozen=True, eq=False)
class MergedFrom:
    """The program that a merged program was made from, and the binding that it had then."""

    program: ProgramCore
    binding: Binding


class ProgramCore(ProgramValues):
    """An exported program with a binding that calls read and that a swap replaces.

    ``program`` gives the exported parts. It is a program that a pass has just made, which then belongs to this one, or
    another program with adapters, which then shares them.
    """

    def __init__(
        self,
        program: ExportedProgram,
        adaptation: Adaptation,
        binding: Binding | None = None,
        options: RunOptions | None = None,
        originals: Mapping[str, Tensor] | None = None,
        origin: MergedFrom | None = None,
    ) -> None:
        # Without adapters a program computes what its graph says, to the bit, which fused matmuls would not.
        options = RunOptions(fuse=bool(adaptation.attachments)) if options is None else options
        # torch's constructor would compile the graph's code and validate it once more, a tenth of a second for a small
        # language model, and there is no other public way from one program object to another.
        vars(self).update(vars(program))
        self._adaptation, self._origin = adaptation, origin
        self.given_up = False
        self._called = outside(called)
        #: the report of the merge that made the program; None for all others
        self.merge_report: Any = None
        now = Running(binding, options)
        if isinstance(program, ProgramCore) and program.adaptation is adaptation:
            same, known = program.running, program.memory
            if same.options == options:
                now = same if same.binding is binding else replace(now, executor=same.executor)
            self._run = RunState(now, known.exported, known.traces, known.merged)
            self._ops, self._recipes, self._base = program.ops, program.recipes, program.bare_state()
            self._meant = program.meant
            self.given_up = program.given_up
        else:
            state = dict(program.state_dict)
            self._run = RunState(now, Exported(program.graph_module, state))
            lifted = Lifted(program, edit=False)
            self._ops = {a.id: site_op(lifted, a) for a in adaptation.attachments}
            self._recipes = Recipes(adaptation.attachments, self._ops)
            slots = self._recipes.needed
            self._base = {k: t for k, t in state.items() if k not in slots} | dict(originals or {})
            if binding is not None:
                self._recipes.note(binding)
            tensors = {k: t for k, t in self._base.items() if isinstance(t, Tensor)}
            self._meant = {k: (t.shape, t.dtype, t.device) for k, t in tensors.items()}
        self._show(self._run.exported)
        check_options(options, self._adaptation, self._base.values())

    @property
    def origin(self) -> MergedFrom | None:
        """Return the program that this one was merged from, and its binding; None where they were not kept."""
        return self._origin

    # -- others like it ------------------------------------------------------------------------------------------------

    def with_binding(self, binding: Binding | None) -> Self:
        """Return a program with another current binding; code and base are shared until one of the two programs
        changes."""
        return self._sharing(binding, self.options)

    def with_options(self, **changes: Any) -> Self:
        """Return a program that shares graph and weights but runs with ``changes`` applied to its
        :class:`RunOptions`."""
        now = self._run.now
        return self._sharing(now.binding, replace(now.options, **changes))

    def snapshot(self) -> Self:
        """Return a copy that shares everything and stays as the program is now, for code that looks at it more than
        once: no other thread swaps it or sets its options."""
        self._exported()  # made once for all snapshots
        now = self._run.now
        return self._sharing(now.binding, now.options)

    def with_tensors(self, tensors: Mapping[str, Any]) -> Self:
        """Return a program that shares the graph, on other tensors of the same shapes. ``tensors`` is a whole state
        dict; for programs without adapters."""
        new = self._sharing(None, self.options)
        new.replace_tensors(tensors)
        return new

    def replace_tensors(self, tensors: Mapping[str, Any]) -> None:
        """Replace the whole state dict, before the program runs for the first time."""
        run = self._run
        self._base, self._meant = dict(tensors), {}
        run.now = Running(None, run.now.options)
        self._show(Exported(run.exported.module, self._base))

    def _sharing(self, binding: Binding | None, options: RunOptions) -> Self:
        new = type(self)(self, self._adaptation, binding, options, origin=self._origin)
        new.merge_report = self.merge_report
        return new

    def to(self, device: torch.device | str) -> Self:
        """Return a program on ``device``, with its current adapter; this program, and what is bound to it, stay where
        they are.

        A binding made for this program is refused by the other: bind the adapter there, or move it with ``binding.to``.
        Raises BackendError for a device that does not exist.
        """
        target = usable(device)
        if target == self.device:
            return self
        with on_graphs():
            still = self.snapshot()
            moved = Move(target)(still).program
            return still.like(moved, lambda t: t.to(target), lambda b: b.to(target))

    def like(
        self,
        program: ExportedProgram,
        tensor: Callable[[Tensor], Tensor],
        binding: Callable[[Binding], Binding],
        origin: MergedFrom | None = None,
    ) -> Self:
        """Return a program with the exported parts of ``program``, which has copies of this one's tensors.

        ``tensor`` and ``binding`` make the copies of the originals and of the current binding. ``origin``: None keeps
        this program's own.
        """
        now = self._run.now
        own = None if now.binding is None else binding(now.binding)
        originals = {k: mapped(t, tensor) for k, t in self.originals.items()}
        origin = self._origin if origin is None else origin
        new = type(self)(program, self._adaptation, own, now.options, originals, origin)
        new.merge_report = self.merge_report
        return new

    def __copy__(self) -> Self:
        return self.snapshot()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        with on_graphs():
            still = self.snapshot()
            lifted = Lifted(still)
            clone_tensors(lifted, memo)
            origin = copy.deepcopy(self._origin, memo)
            return still.like(lifted.finish(), Tensor.clone, lambda b: copy.deepcopy(b, memo), origin)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AdaptcError(
            "a program cannot be pickled: write it with adaptc.save(program, 'name.pt2') and read it with adaptc.load, "
            "in another process too; copy.deepcopy(program) gives one with tensors of its own"
        )

    # -- running -------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the current binding; same output type as the captured model. Safe while other threads swap.

        Inputs may have any strides and any size of free dimensions. ``adapter_scale``: for this call alone, a factor as
        for ``set_scale``, or a dict of names and factors as for ``set_active``. The last few are remembered, each with
        its hoisted values. Buffers that the model writes to, such as caches, are the program's: each call sees what
        calls before it wrote, whatever was swapped in between. ``torch.compile`` leaves the call as it is. Raises an
        AdaptcError that names the input which does not fit.
        """
        return self._called(self, args, kwargs)

    def pinned(self, scale: Any = None) -> Callable[..., Any]:
        """Return a callable that keeps the current binding, for calls that belong together; its ``binding`` is that
        binding.

        It shares the code, and the buffers that calls write to, with the program. Making it does not look at the graph.
        ``scale``: as ``adapter_scale`` of calls.
        """
        now = self.ready_for(scale)
        made: Any = partial(outside(called_as), now)
        made.binding = now.binding
        return made

    def pinned_to(self, scale: Any = None) -> tuple[Self, Executor, Binding, Mapping[str, Tensor]]:
        """Return what calls that begin now run: the program, its code, the binding, and no state, since they share the
        program's."""
        now = self.ready_for(scale)
        assert now.executor is not None
        return self, now.executor, now.binding or Binding.none(), {}

    def executor(self) -> Executor:
        """Return the code of calls, made on first use."""
        made = self.ready().executor
        assert made is not None
        return made

    def arguments(self) -> Arguments:
        """Return the inputs that the current binding gives to the code of calls."""
        made = self.ready().arguments
        assert made is not None
        return made

    def ready(self) -> Running:
        """Return what calls read, with their code, which is made now if it was not.

        Raises AdaptcError for a program whose base a merge took.
        """
        run = self._run
        while True:
            self._check_whole()
            now = run.now
            executor = now.executor or self._code(now.options)
            with run.lock:
                if run.now.options is now.options:
                    arguments = executor.arguments(run.now.binding or Binding.none())
                    run.now = replace(run.now, executor=executor, arguments=arguments)
                    return run.now

    def ready_for(self, scale: Any) -> Running:
        """Return what a call of this thread reads that asks for ``scale``, with its code (see ``views``).

        Raises ConfigError for adapters and methods that ``scale`` is not for. Raises SwapError where there is no
        adapter, or no base to turn adapters off for.
        """
        key, now = key_of(self, scale), self.ready()
        if key is None or (now.binding is None and scale is None):
            return now
        if now.binding is None:
            raise SwapError(f"{SCALE}={scale!r}: the program has no adapter; it was merged or unloaded")
        found = now.others.get(key)
        if found is None:
            with plainly():
                found = as_seen(self.spec(), now.binding, view_of(self), scale)
            with self._run.lock:
                while len(now.others) >= MOST:
                    now.others.pop(next(iter(now.others)))
                now.others[key] = found
        assert now.executor is not None
        return replace(now, binding=found, arguments=now.executor.arguments(found))

    def _code(self, options: RunOptions) -> Executor:
        with on_graphs():
            now = self._run.now
            if now.executor is not None and now.options is options:  # another thread was first
                return now.executor
            self._check_whole()
            forget_code()
            self._exported()
            a, still = self._adaptation, self._sharing(now.binding, options)
            return Executor(still, a.attachments, self._ops, options, a.inputs(still), a.training, self.bare_state())

    def install(self, binding: Binding) -> None:
        """Make ``binding`` the current one; the caller has checked that it fits."""
        run = self._run
        with run.lock:
            self._check_whole()
            now = run.now
            arguments = None if now.executor is None else now.executor.arguments(binding)
            run.now = replace(now, binding=binding, arguments=arguments, others={})

    def exchange(self, old: Binding, new: Binding) -> bool:
        """Make ``new`` the current binding if ``old`` still is; return whether it was."""
        with self._run.lock:
            same = self._run.now.binding is old
            if same and new is not old:
                self.install(new)
            return same

    def follow(self) -> None:
        """Make calls read base tensors of :attr:`state_dict` again after they were given other memory. Needed only
        after writes that torch does not count: ``param.data = tensor``, ``param.set_(tensor)``,
        ``torch.utils.swap_tensors``.

        The model's own parameters are other objects, which share this memory until they are given another. ``swap``,
        ``bind``, ``merge`` and ``save`` do this of themselves; what is bound already stays as it is. Raises AdaptcError
        for a tensor that now has another shape, dtype or device than the program was made for.
        """
        self.check_base()
        with self._run.lock:
            now = self._run.now
            self._run.switch(Running(now.binding, now.options))

    def set_options(self, **changes: Any) -> None:
        """Change how the program runs. Raises as :class:`RunOptions` does; then nothing has changed."""
        options = replace(self.options, **changes)
        check_options(options, self._adaptation, self._base.values())
        with self._run.lock:
            now = self._run.now
            if options != now.options:
                self._run.switch(Running(now.binding, options))

    # -- the exported program follows ----------------------------------------------------------------------------------

    def remembered_base(self, make: Callable[[], Any]) -> Any:
        """Return the program without adapters that was made before, or that ``make`` makes now."""
        while (now := self._run.now).base is None:
            with on_graphs():
                made = self._run.now.base or make()
            with self._run.lock:
                if self._run.now.options is now.options:
                    self._run.now = replace(self._run.now, base=made)
        return now.base

    def _exported(self) -> Exported:
        """Return the graph and tensors that show the current binding, made now if nobody has looked since it was
        installed."""
        run = self._run
        found, binding = run.exported, run.now.binding
        if binding is None or found.shows(binding):
            return found
        with on_graphs():
            found, binding = run.exported, run.now.binding
            if binding is not None and not found.shows(binding):
                found = self._follow(found, binding)
                self._show(found)
            return found

    def _follow(self, old: Exported, binding: Binding) -> Exported:
        a, graph = self._adaptation, copy_graph(old.module.graph)
        names = {s.target: s.arg.name for s in self._graph_signature.input_specs if s.target is not None}
        Respecialize(a.attachments, self._ops, names, binding.values, self._run.traces, old.module)(graph)
        set_header(graph, a.header(binding))
        new = {**self.bare_state(), **binding.values, **binding.base}
        forget_code()
        tensors = {k: new.get(k, t) for k, t in old.tensors.items()}
        return Exported(fx.GraphModule(old.module, graph), tensors, weakref.ref(binding))

    def _show(self, exported: Exported) -> None:
        """Put ``exported`` where torch's own methods see it."""
        self._run.exported = exported
        self._graph_module, self._state_dict = exported.module, exported.tensors

    def release(self, fqn: str) -> None:
        """Give up a base tensor, and what an adapter made of it, for a merge that does not keep the base."""
        run = self._run
        with run.lock:
            self.given_up = True
            binding = run.now.binding
            if binding is not None and fqn in binding.base:
                binding = replace(binding, base={k: v for k, v in binding.base.items() if k != fqn})
            # The memory of merges at other sites holds base tensors too, and would keep them alive.
            run.now, run.merged = Running(binding, run.now.options), {}
            self._base = {k: t for k, t in self._base.items() if k != fqn}
            shown = {k: t for k, t in run.exported.tensors.items() if k != fqn}
            self._show(Exported(run.exported.module, shown, None if binding is None else weakref.ref(binding)))

    def held_still(self) -> Any:
        """Return the lock under which nobody swaps the program, as a context manager."""
        return self._run.lock

    @property
    def graph_module(self) -> fx.GraphModule:
        return self._exported().module

    @graph_module.setter
    def graph_module(self, value: fx.GraphModule) -> None:
        raise AttributeError("the graph of a program is changed by passes, which return a new program")

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @graph.setter
    def graph(self, value: fx.Graph) -> None:
        raise AttributeError("the graph of a program is changed by passes, which return a new program")

    @property
    def state_dict(self) -> dict[str, Any]:
        self._check_whole()
        return self._exported().tensors

    @state_dict.setter
    def state_dict(self, value: Mapping[str, Any]) -> None:
        raise AttributeError("use adaptc.swap to change adapter tensors; base tensors are fixed")
