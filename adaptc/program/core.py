"""The state of a program with adapters: frozen values that say what it is, and what it remembers while it runs.

    frozen       adaptation, binding, options, originals, origin     replaced as a whole, never written to
    disposable   ``RunState``: the code of calls, memos, a lock        another one may take its place at any time

It *is* a ``torch.export.ExportedProgram``: everything that takes one takes it. A swap only replaces the binding; the
state dict and the graph's fake values follow when somebody looks at them. There is one constructor, and copies by
``with_binding`` and ``with_options`` share code and base until one of them changes.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.recipes import Recipes
from adaptc.errors import AdaptcError, BackendError
from adaptc.passes.adapt.choose_forms import compilable
from adaptc.passes.adapt.move import Move, usable
from adaptc.passes.adapt.respecialize import Respecialize
from adaptc.passes.ir.lifted import Lifted, copy_graph
from adaptc.passes.ir.ops import Op
from adaptc.passes.ir.regions import set_header, site_op
from adaptc.passes.ir.storage import storage_key
from adaptc.program.adaptation import Adaptation
from adaptc.runtime.executor import Arguments, Executor
from adaptc.runtime.options import RunOptions


@dataclass(frozen=True, eq=False)
class Origin:
    """The program a merge was made of, and the binding it had."""

    program: ProgramCore
    binding: Binding


@dataclass(eq=False)
class RunState:
    """What a program remembers while it runs. ``stale``: state dict and graph do not follow the binding yet.
    ``owns_graph``: no other program shares the graph. ``traces``, ``merged``: what was traced and merged before.
    ``base``: the program without adapters, once somebody asked for it."""

    stale: bool = True
    owns_graph: bool = False
    executor: Executor | None = None
    arguments: Arguments | None = None
    base: Any = None
    traces: dict[Any, fx.Graph] = field(default_factory=dict)
    merged: dict[Any, Any] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def forget_code(self) -> None:
        """Calls that follow make their code anew."""
        self.executor = self.arguments = self.base = None


class ProgramCore(ExportedProgram):
    """See the module docstring. ``program`` gives the exported parts: a program that a pass has just made, which then
    belongs to this one, or another program with adapters, with which this one shares them."""

    def __init__(
        self,
        program: ExportedProgram,
        adaptation: Adaptation,
        binding: Binding | None = None,
        options: RunOptions | None = None,
        originals: Mapping[str, Tensor] | None = None,
        origin: Origin | None = None,
    ) -> None:
        shared = isinstance(program, ProgramCore)
        # torch's constructor would compile the graph's code and validate it once more, a tenth of a second for a small
        # language model, and there is no other public way from one program object to another.
        vars(self).update(vars(program))
        self._state_dict: dict[str, Any] = dict(self._state_dict)
        self._adaptation, self._binding = adaptation, binding
        # Without adapters a program computes what its graph says, to the bit.
        self._options = RunOptions(fuse=bool(adaptation.attachments)) if options is None else options
        self._originals, self._origin = dict(originals or {}), origin
        #: whether a merge took its base tensors away
        self.given_up = shared and program.given_up
        #: the report of the merge that made it
        self.merge_report: Any = None
        self._run = RunState(stale=not (shared and program.follows(binding)), owns_graph=not shared)
        if shared:
            program.share_graph()
        if shared and program.adaptation is adaptation:
            self._ops, self._recipes = program.ops, program.recipes
            self._run.merged, self._run.traces = program.memos()
        else:
            lifted = Lifted(program, edit=False)
            self._ops = {a.id: site_op(lifted, a) for a in adaptation.attachments}
            self._recipes = Recipes(adaptation.attachments, self._ops)
        self._check_forms(self._options)

    # -- what it is ----------------------------------------------------------------------------------------------------

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
        return self._binding

    @property
    def binding(self) -> Binding:
        """The current binding. Raises AdaptcError where the program has no adapters."""
        if self._binding is None:
            raise AdaptcError("the program has no adapter; it was merged or unloaded")
        return self._binding

    @property
    def options(self) -> RunOptions:
        """How it runs."""
        return self._options

    @property
    def originals(self) -> Mapping[str, Tensor]:
        """Base parameters that the current adapter, or one before it, has its own version of, as they were."""
        return self._originals

    @property
    def origin(self) -> Origin | None:
        """What it was merged from, where that was kept."""
        return self._origin

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

    # -- others like it ------------------------------------------------------------------------------------------------

    def with_binding(self, binding: Binding | None) -> Self:
        """A program of its own with another current binding; code and base are shared until one of them changes."""
        return self._sharing(binding, self._options)

    def with_options(self, **changes: Any) -> Self:
        """The same with other options (see :class:`RunOptions`)."""
        return self._sharing(self._binding, replace(self._options, **changes))

    def with_tensors(self, tensors: Mapping[str, Any]) -> Self:
        """The same on other tensors of the same shapes, all those of its state dict; for programs without adapters."""
        new = self._sharing(None, self._options)
        new.replace_tensors(tensors)
        return new

    def replace_tensors(self, tensors: Mapping[str, Any]) -> None:
        """Its state dict, as a whole: before it runs for the first time."""
        self._state_dict = dict(tensors)

    def _sharing(self, binding: Binding | None, options: RunOptions) -> Self:
        with self._run.lock:
            new = type(self)(self, self._adaptation, binding, options, self._originals, self._origin)
            new.merge_report = self.merge_report
            return new

    def to(self, device: torch.device | str) -> Self:
        """A program on that device, its current adapter included; this one, and what is bound to it, stay.

        A binding made for this program is refused by the other: bind the adapter there, or move it, ``binding.to``.
        Raises BackendError for a device that there is not.
        """
        target = usable(device)
        if target == self.device:
            return self
        moved = Move(target)(self).program
        return self._like(moved, lambda t: t.to(target), lambda b: b.to(target))

    def _like(
        self,
        program: ExportedProgram,
        tensor: Callable[[Tensor], Tensor],
        binding: Callable[[Binding], Binding],
        origin: Origin | None = None,
    ) -> Self:
        own = None if self._binding is None else binding(self._binding)
        originals = {k: _mapped(t, tensor) for k, t in self._originals.items()}
        origin = self._origin if origin is None else origin
        new = type(self)(program, self._adaptation, own, self._options, originals, origin)
        new.merge_report = self.merge_report
        return new

    def __copy__(self) -> Self:
        return self.with_binding(self._binding)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        lifted = Lifted(self)
        for tensors in (lifted.state_dict, lifted.constants):
            clones: dict[Any, Any] = {}
            for name, t in tensors.items():
                if isinstance(t, Tensor):
                    key = storage_key(t)
                    clones[key] = tensors[name] = clones.get(key, memo.get(id(t), _mapped(t, Tensor.clone)))
                    memo[id(t)] = clones[key]
        origin = copy.deepcopy(self._origin, memo)
        return self._like(lifted.finish(), Tensor.clone, lambda b: copy.deepcopy(b, memo), origin)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AdaptcError(
            "a program cannot be pickled: write it with adaptc.save(program, 'name.pt2') and read it with adaptc.load, "
            "in another process too; copy.deepcopy(program) gives one with tensors of its own"
        )

    # -- running -------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the current binding; same output type as the captured model. Safe while other threads swap."""
        executor, arguments = self.executor(), self._run.arguments
        if arguments is None or arguments.executor is not executor:
            arguments = self.arguments()
        return executor(arguments, args, kwargs)

    def executor(self) -> Executor:
        """The code of calls, made on first use."""
        self._check_whole()
        made = self._run.executor
        if made is None:
            with self._run.lock:
                made = self._run.executor
                if made is None:
                    a = self._adaptation
                    self._refresh()
                    made = self._run.executor = Executor(
                        self, a.attachments, self._ops, self._options, a.fills, a.training, self._originals
                    )
        return made

    def arguments(self) -> Arguments:
        """What the current binding gives to that code."""
        with self._run.lock:
            executor, arguments = self.executor(), self._run.arguments
            if arguments is None or arguments.executor is not executor:
                arguments = self._run.arguments = executor.arguments(self._binding or Binding.none())
            return arguments

    @property
    def running(self) -> tuple[Executor | None, Arguments | None]:
        """The code of calls and what the current binding gives to it, as far as calls have made them."""
        return self._run.executor, self._run.arguments

    def install(self, binding: Binding) -> None:
        """Make ``binding`` the current one; the caller has checked that it fits."""
        run = self._run
        with run.lock:
            arguments = None if run.executor is None else run.executor.arguments(binding)
            self._binding, run.arguments, run.stale = binding, arguments, True

    def set_options(self, **changes: Any) -> None:
        """Change how it runs. Raises as :class:`RunOptions` does, and has then changed nothing."""
        options = replace(self._options, **changes)
        if options != self._options:
            self._check_forms(options)
            with self._run.lock:
                self._options = options
                self._run.forget_code()

    def _check_forms(self, options: RunOptions) -> None:
        for a in self._adaptation.attachments:
            if compilable(a, options.backend) != a:
                raise BackendError(
                    f"site {a.fqn!r} has its adapter around a convolution, whose rank inductor would fix: make the "
                    f"program for it, with compile(..., backend={options.backend!r}), or save it and "
                    f"load(path, backend={options.backend!r})"
                )

    # -- the exported program follows ----------------------------------------------------------------------------------

    def follows(self, binding: Binding | None) -> bool:
        """Whether graph and state dict are those of ``binding`` already."""
        return self._binding is binding and not self._run.stale

    def share_graph(self) -> None:
        """Another program uses the graph from now on: whoever has to change it copies it first."""
        self._run.owns_graph = False

    def memos(self) -> tuple[dict[Any, Any], dict[Any, fx.Graph]]:
        """What was merged and traced before, which programs that share the graph share, too."""
        return self._run.merged, self._run.traces

    def remembered_base(self, make: Callable[[], Any]) -> Any:
        """The program without adapters: the one made before, or one made now."""
        with self._run.lock:
            if self._run.base is None:
                self._run.base = make()
            return self._run.base

    def _own_graph(self) -> fx.Graph:
        if not self._run.owns_graph:
            self._graph_module = fx.GraphModule(self._graph_module, copy_graph(self._graph_module.graph))
            self._run.owns_graph = True
        return self._graph_module.graph

    def _refresh(self) -> None:
        """Bring state dict and fake values in line with the current binding."""
        run = self._run
        if not run.stale:
            return
        with run.lock:
            binding = self._binding
            if binding is not None and run.stale:
                self._follow(binding)
            run.stale = False  # and not before: other threads do not wait for what is up to date

    def _follow(self, binding: Binding) -> None:
        graph, state = self._own_graph(), self._state_dict
        names = {s.target: s.arg.name for s in self._graph_signature.input_specs if s.target is not None}
        a = self._adaptation
        Respecialize(a.attachments, self._ops, names, binding.values, self._run.traces)(graph)
        set_header(graph, a.header(binding))
        state.update(binding.values)
        for fqn, tensor in self._originals.items():
            state[fqn] = tensor
        for fqn, tensor in binding.base.items():
            self._originals.setdefault(fqn, state[fqn])
            state[fqn] = tensor

    def release(self, fqn: str) -> None:
        """Give up a base tensor, and what an adapter made of it (a merge that does not keep the base)."""
        self.given_up = True
        self._state_dict.pop(fqn, None)
        self._originals.pop(fqn, None)
        if self._binding is not None and fqn in self._binding.base:
            base = {k: v for k, v in self._binding.base.items() if k != fqn}
            self._binding = replace(self._binding, base=base)
        # What was remembered of merges at other sites holds base tensors too.
        self._run.forget_code()
        self._run.merged = {}

    def _check_whole(self) -> None:
        if self.given_up:
            raise AdaptcError(
                "this program was merged with keep_base=False, which gave up its base: use the merged program, or "
                "merge with keep_base=True"
            )

    @property
    def base_tensors(self) -> Mapping[str, Tensor]:
        """FQN -> base parameter as it was before any adapter changed it (PiSSA and OLoRA do)."""
        self._check_whole()
        # Whether state and originals follow the current binding makes no difference: its slots are left out, and for
        # what it changes of the base the originals count.
        with self._run.lock:
            slots = {} if self._binding is None else self._binding.values
            return {k: v for k, v in {**self._state_dict, **self._originals}.items() if k not in slots}

    def spec(self, trainable: bool = False) -> BindingSpec:
        """What a binding must fill."""
        a = self._adaptation
        return BindingSpec(a.attachments, self._ops, self.base_tensors, a.autocast, trainable, a.unread, a.residual)

    @property
    def graph_module(self) -> fx.GraphModule:
        self._refresh()
        return self._graph_module

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
        self._refresh()
        return self._state_dict

    @state_dict.setter
    def state_dict(self, value: Mapping[str, Any]) -> None:
        raise AttributeError("use adaptc.swap to change adapter tensors; base tensors are fixed")


def _mapped(t: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function`` of a tensor, as a parameter if it is one."""
    new = function(t.detach())
    return nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
