"""Keep the state of a program with adapters: frozen values that say what it is, and what it remembers while it runs.

    frozen       adaptation, binding, options, originals, origin     replaced as a whole, never written to
    disposable   ``RunState``: the code of calls, memos, a lock        another one may take its place at any time

The program *is* a ``torch.export.ExportedProgram``: everything that takes one takes it. A swap only replaces the
binding. The state dict and the graph's fake values follow when somebody looks at them. There is one constructor. The
copies that ``with_binding`` and ``with_options`` make share code and base until one of them changes.

Any thread may do anything at any time. A call reads one value, :class:`CallState`, and the exported program shows
another one, :class:`ExportedView`. Both are made aside, are frozen, and are put in place by one assignment, so an
interrupted change changes nothing. Code that looks more than once takes a ``snapshot()`` first, which nobody else
swaps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.export import ExportedProgram

from adaptc.binding.bind_adapter import bind_adapter
from adaptc.binding.binding import Binding
from adaptc.binding.binding_plan_cache import BindingPlanCache
from adaptc.errors import AdaptcError
from adaptc.passes.adapt.move import MoveToDevice, usable_device
from adaptc.passes.graph.graph_lock import hold_graph_lock
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.torch_caches import drop_dead_code
from adaptc.passes.protocol.regions import site_op
from adaptc.runtime.dynamo_boundary import not_traced
from adaptc.runtime.executor import Arguments, Executor
from adaptc.runtime.options import RunOptions
from adaptc.state.adaptation import Adaptation, check_options
from adaptc.state.follow_binding import ExportedParts
from adaptc.state.overrides import MAX_SCALED_BINDINGS, NO_OVERRIDE, apply_override, override_of
from adaptc.state.running import CallState, ExportedView, RunState, call_current
from adaptc.state.values import clone_tensors, map_tensor
from adaptc.torch_modes import outside_modes


@dataclass(frozen=True, eq=False)
class MergeOrigin:
    """The program that a merged program was made from, and the binding that it had then."""

    program: ProgramCore
    binding: Binding


class ProgramCore(ExportedParts):
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
        origin: MergeOrigin | None = None,
    ) -> None:
        # Without adapters a program computes what its graph says, to the bit, which fused matmuls would not.
        options = RunOptions(fuse=bool(adaptation.attachments)) if options is None else options
        # torch's constructor would compile the graph's code and validate it once more, a tenth of a second for a small
        # language model, and there is no other public way from one program object to another.
        vars(self).update(vars(program))
        self._adaptation, self._origin = adaptation, origin
        self.base_released = False
        self._untraced_call = not_traced(call_current)
        #: the report of the merge that made the program; None for all others
        self.merge_report: Any = None
        #: the report of the ``adaptc.quantize`` that made the program; None for all others
        self.quantize_report: Any = None
        call_state = CallState(binding, options)
        if isinstance(program, ProgramCore) and program.adaptation is adaptation:
            same, known = program.call_state, program.run_state
            if same.options == options:
                call_state = same if same.binding is binding else replace(call_state, executor=same.executor)
            self._run_state = RunState(call_state, known.exported, known.traced_regions, known.merged_programs)
            self._ops, self._binding_plans, self._base_tensors = (
                program.ops,
                program.binding_plans,
                program.base_tensors_or_empty(),
            )
            self._expected_meta = program.expected_meta
            self.base_released = program.base_released
        else:
            state = dict(program.state_dict)
            self._run_state = RunState(call_state, ExportedView(program.graph_module, state))
            lifted = LiftedProgram(program, edit=False)
            self._ops = {a.id: site_op(lifted, a) for a in adaptation.attachments}
            self._binding_plans = BindingPlanCache(adaptation.attachments, self._ops)
            slots = self._binding_plans.tensor_names
            self._base_tensors = {k: t for k, t in state.items() if k not in slots} | dict(originals or {})
            if binding is not None:
                self._binding_plans.remember_fitting(binding)
            tensors = {k: t for k, t in self._base_tensors.items() if isinstance(t, Tensor)}
            self._expected_meta = {k: (t.shape, t.dtype, t.device) for k, t in tensors.items()}
        self._set_export(self._run_state.exported)
        check_options(options, self._adaptation, self._base_tensors.values())

    @property
    def origin(self) -> MergeOrigin | None:
        """Return the program that this one was merged from, and its binding; None where they were not kept."""
        return self._origin

    # -- others like it ------------------------------------------------------------------------------------------------

    def with_binding(self, binding: Binding | None) -> Self:
        """Return a program with another current binding; code and base are shared until one of the two programs
        changes."""
        return self._share_with(binding, self.options)

    def with_options(self, **changes: Any) -> Self:
        """Return a program that shares graph and weights but runs with ``changes`` applied to its
        :class:`RunOptions`."""
        now = self._run_state.call_state
        return self._share_with(now.binding, replace(now.options, **changes))

    def snapshot(self) -> Self:
        """Return a copy that shares everything and stays as the program is now, for code that looks at it more than
        once: no other thread swaps it or sets its options."""
        self._updated_export()  # made once for all snapshots
        now = self._run_state.call_state
        return self._share_with(now.binding, now.options)

    def with_tensors(self, tensors: Mapping[str, Any]) -> Self:
        """Return a program that shares the graph, on other tensors of the same shapes. ``tensors`` is a whole state
        dict; for programs without adapters."""
        new = self._share_with(None, self.options)
        new.replace_tensors(tensors)
        return new

    def replace_tensors(self, tensors: Mapping[str, Any]) -> None:
        """Replace the whole state dict, before the program runs for the first time."""
        run = self._run_state
        self._base_tensors, self._expected_meta = dict(tensors), {}
        run.call_state = CallState(None, run.call_state.options)
        self._set_export(ExportedView(run.exported.module, self._base_tensors))

    def _share_with(self, binding: Binding | None, options: RunOptions) -> Self:
        new = type(self)(self, self._adaptation, binding, options, origin=self._origin)
        new.merge_report, new.quantize_report = self.merge_report, self.quantize_report
        return new

    def to(self, device: torch.device | str) -> Self:
        """Return a program on ``device``, with its current adapter; this program, and what is bound to it, stay where
        they are.

        A binding made for this program is refused by the other: bind the adapter there, or move it with ``binding.to``.

        Args:
            device: the device.

        Returns:
            the program there; this one where it is there already.

        Raises:
            BackendError: the device does not exist.
        """
        target = usable_device(device)
        if target == self.device:
            return self
        with hold_graph_lock():
            still = self.snapshot()
            moved = MoveToDevice(target)(still).program
            return still.with_copied_tensors(moved, lambda t: t.to(target), lambda b: b.to(target))

    def with_copied_tensors(
        self,
        program: ExportedProgram,
        copy_tensor: Callable[[Tensor], Tensor],
        copy_binding: Callable[[Binding], Binding],
        origin: MergeOrigin | None = None,
    ) -> Self:
        """Return a program with the exported parts of ``program``, which has copies of this one's tensors.

        ``copy_tensor`` and ``binding`` make the copies of the originals and of the current binding. ``origin``: None
        keeps this program's own.
        """
        now = self._run_state.call_state
        own = None if now.binding is None else copy_binding(now.binding)
        originals = {k: map_tensor(t, copy_tensor) for k, t in self.originals.items()}
        origin = self._origin if origin is None else origin
        new = type(self)(program, self._adaptation, own, now.options, originals, origin)
        new.merge_report, new.quantize_report = self.merge_report, self.quantize_report
        return new

    def __copy__(self) -> Self:
        return self.snapshot()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        with hold_graph_lock():
            still = self.snapshot()
            lifted = LiftedProgram(still)
            clone_tensors(lifted, memo)
            origin = copy.deepcopy(self._origin, memo)
            return still.with_copied_tensors(lifted.finish(), Tensor.clone, lambda b: copy.deepcopy(b, memo), origin)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AdaptcError(
            "a program cannot be pickled: write it with adaptc.save(program, 'name.pt2') and read it with adaptc.load, "
            "in another process too; copy.deepcopy(program) gives one with tensors of its own"
        )

    # -- running -------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the current binding; same output type as the captured model. Safe while other threads swap.

        Inputs may have any strides and any size of free dimensions. Buffers that the model writes to, such as caches,
        are the program's: each call sees what calls before it wrote, whatever was swapped in between. ``torch.compile``
        leaves the call as it is. Raises an AdaptcError that names the input which does not fit.
        """
        return self._untraced_call(self, args, kwargs)

    def snapshot_executor(self) -> tuple[Self, Executor, Binding, Mapping[str, Tensor]]:
        """Return what calls that begin now run: the program, its code, the binding, and no state, since they share the
        program's."""
        now = self.compiled_state_of_call()
        assert now.executor is not None
        return self, now.executor, now.binding or Binding.empty(), {}

    def executor(self) -> Executor:
        """Return the code of calls, made on first use."""
        made = self.compiled_state().executor
        assert made is not None
        return made

    def arguments(self) -> Arguments:
        """Return the inputs that the current binding gives to the code of calls."""
        made = self.compiled_state().arguments
        assert made is not None
        return made

    def compiled_state(self) -> CallState:
        """Return what calls read, with their code, which is made now if it was not.

        Raises AdaptcError for a program whose base a merge took.
        """
        run = self._run_state
        while True:
            self._check_base_kept()
            now = run.call_state
            executor = now.executor or self._make_executor(now.options)
            with run.lock:
                if run.call_state.options is now.options:
                    arguments = executor.arguments(run.call_state.binding or Binding.empty())
                    run.call_state = replace(run.call_state, executor=executor, arguments=arguments)
                    return run.call_state

    def compiled_state_of_call(self) -> CallState:
        """Return what a call of this thread reads, with its code and its view of the program (see ``overrides``).

        Raises ConfigError for adapters and methods that the view's scales are not for. Raises SwapError where there is
        no base to turn adapters off for.
        """
        override, now = override_of(self), self.compiled_state()
        if override == NO_OVERRIDE or now.binding is None:
            return now
        found = now.scaled_bindings.get(override)
        if found is None:
            with outside_modes():
                found = apply_override(self.spec(), now.binding, override)
            with self._run_state.lock:
                while len(now.scaled_bindings) >= MAX_SCALED_BINDINGS:
                    now.scaled_bindings.pop(next(iter(now.scaled_bindings)))
                now.scaled_bindings[override] = found
        assert now.executor is not None
        return replace(now, binding=found, arguments=now.executor.arguments(found))

    def _make_executor(self, options: RunOptions) -> Executor:
        with hold_graph_lock():
            now = self._run_state.call_state
            if now.executor is not None and now.options is options:  # another thread was first
                return now.executor
            self._check_base_kept()
            drop_dead_code()
            self._updated_export()
            a, still = self._adaptation, self._share_with(now.binding, options)
            return Executor(
                still, a.attachments, self._ops, options, a.inputs(still), a.training, self.base_tensors_or_empty()
            )

    def swap_adapter(self, adapter: Any, **options: Any) -> Binding:
        """Bind ``adapter``, make that the current binding, and return it; an error leaves the old one in place.

        ``options``: those of :func:`bind_adapter`. Where adapters act together and threads swap different ones of them,
        all of these changes are kept.
        """
        while True:
            old = self.current
            new = bind_adapter(self, adapter, trainable=self._adaptation.training, **options)
            if old is None or not old.joint_adapters:
                self.install(new)
                return new
            if self.compare_and_swap(old, new):
                return new

    def install(self, binding: Binding) -> None:
        """Make ``binding`` the current one; the caller has checked that it fits."""
        run = self._run_state
        with run.lock:
            self._check_base_kept()
            run.check_not_captured(binding)
            now = run.call_state
            arguments = None if now.executor is None else now.executor.arguments(binding)
            run.call_state = replace(now, binding=binding, arguments=arguments, scaled_bindings={})

    def compare_and_swap(self, old: Binding, new: Binding) -> bool:
        """Make ``new`` the current binding if ``old`` still is; return whether it was."""
        with self._run_state.lock:
            same = self._run_state.call_state.binding is old
            if same and new is not old:
                self.install(new)
            return same

    def resync_base_tensors(self) -> None:
        """Make calls read base tensors of :attr:`state_dict` again after they were given other memory.

        It is needed only after writes that torch does not count: ``param.data = tensor``, ``param.set_(tensor)``,
        ``torch.utils.swap_tensors``. The model's own parameters are other objects, which share this memory until they
        are given another. ``swap``, ``bind``, ``merge`` and ``save`` do this of themselves; what is bound already stays
        as it is.

        Raises:
            AdaptcError: a tensor now has another shape, dtype or device than the program was made for.
        """
        self.check_base()
        with self._run_state.lock:
            now = self._run_state.call_state
            self._run_state.replace_call_state(CallState(now.binding, now.options))

    def set_options(self, **changes: Any) -> None:
        """Change how the program runs. Raises as :class:`RunOptions` does; then nothing has changed."""
        options = replace(self.options, **changes)
        check_options(options, self._adaptation, self._base_tensors.values())
        with self._run_state.lock:
            now = self._run_state.call_state
            if options != now.options:
                self._run_state.replace_call_state(CallState(now.binding, options))

    # -- the base ------------------------------------------------------------------------------------------------------

    def cached_base(self, make: Callable[[], Any]) -> Any:
        """Return the program without adapters that was made before, or that ``make`` makes now."""
        while (now := self._run_state.call_state).base_program is None:
            with hold_graph_lock():
                made = self._run_state.call_state.base_program or make()
            with self._run_state.lock:
                if self._run_state.call_state.options is now.options:
                    self._run_state.call_state = replace(self._run_state.call_state, base_program=made)
        return now.base_program

    def swap_lock(self) -> Any:
        """Return the lock under which nobody swaps the program, as a context manager."""
        return self._run_state.lock
