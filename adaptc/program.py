"""AdaptedProgram: an exported program that knows its adapters.

It *is* a ``torch.export.ExportedProgram``: everything that takes one takes it. On top it is callable, can be swapped,
and keeps itself consistent: a swap only replaces the current binding, and the state dict and the graph's fake values
follow when somebody looks at them.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch import Tensor, fx
from torch.export import ExportedProgram

from adaptc.binding import Binding, Slate
from adaptc.bound import Bound
from adaptc.errors import AdaptcError, ConfigError
from adaptc.fusing import Fusion
from adaptc.hoisting import Held
from adaptc.methods._base import AdapterConfig
from adaptc.passes._kinds import Op
from adaptc.passes._lifted import Lifted, copy_graph, fake_of
from adaptc.passes._method import Attachment
from adaptc.passes._regions import set_header
from adaptc.passes.inject import site_op
from adaptc.passes.respecialize import respecialize
from adaptc.passes.set_mode import set_mode
from adaptc.runtime import Arguments, Executor


@dataclass(frozen=True, eq=False)
class Adaptation:
    """What a program remembers of how it was adapted; ``header()`` is the part that is stored in files."""

    attachments: Sequence[Attachment] = ()
    matches: Mapping[str, Sequence[str]] = field(default_factory=dict)
    left_out: Sequence[Sequence[str]] = ()
    fills: Mapping[str, Sequence[str]] = field(default_factory=dict)
    training: bool = False
    autocast: bool = True
    #: base parameters of which only the adapter's own version is known (a PiSSA program loaded from a file)
    residual: Sequence[str] = ()
    #: key -> FQN of tensors of modules trained as a whole that the program does not read, but files hold
    unread: Mapping[str, str] = field(default_factory=dict)

    def header(self, binding: Binding) -> dict[str, Any]:
        return {
            "format": 1,
            "config": binding.config.to_dict(),
            "present": list(binding.methods),
            "residual": list({**dict.fromkeys(self.residual), **binding.base}),
            "matches": {k: list(v) for k, v in self.matches.items()},
            "left_out": [list(x) for x in self.left_out],
            "fills": {k: list(v) for k, v in self.fills.items()},
            "training": self.training,
            "autocast": self.autocast,
            "unread": dict(self.unread),
            "carried": [k for k in binding.carried if k not in self.unread],
            "parts": {n: {"config": p.config.to_dict(), "present": list(p.methods)} for n, p in binding.parts.items()},
        }


class AdaptedProgram(ExportedProgram):
    """A program with adapters. Made by ``adaptc.compile`` and ``adaptc.load``, not by hand."""

    _ready = False
    _stale = False
    _given_up = False
    _shared = False
    _hoist_limit: int | None = None
    _fuse: bool | frozenset[str] = True
    _kernels: bool | None = None
    _base_program: AdaptedProgram | None = None

    @classmethod
    def adopt(
        cls,
        program: ExportedProgram,
        adaptation: Adaptation,
        binding: Binding | None,
        backend: str,
        originals: Mapping[str, Tensor] | None = None,
    ) -> Self:
        """``program``, already injected, as an AdaptedProgram: itself if a pass just built it as one, or a copy."""
        if isinstance(program, cls) and not program._ready:
            new = program
        else:
            new = Lifted(program).finish(cls)
        lifted = Lifted(new, edit=False)
        new._lock = threading.RLock()
        new._adaptation = adaptation
        new._ops = {a.id: site_op(lifted, a) for a in adaptation.attachments}
        new._originals = dict(originals or {})
        new._origin = None
        new._traces = {}
        new._merged = {}
        new.merge_report = None
        new._binding = binding
        new.backend = backend
        new._executor = None
        new._arguments = None
        new._ready = True
        # Without adapters a program computes what its graph says, to the bit.
        new._fuse = bool(adaptation.attachments)
        if binding is not None:
            new._set(binding)
        return new

    def clone(self, binding: Binding) -> Self:
        """A program of its own with another current binding; code and base are shared until one of them changes."""
        with self._lock:
            self._refresh()
            new = type(self).__new__(type(self))
            new.__dict__.update(self.__dict__)
            new._lock = threading.RLock()
            new._state_dict = dict(self._state_dict)
            new._originals = dict(self._originals)
            new._shared = self._shared = True
        new._set(binding)
        return new

    def _own_graph(self) -> fx.Graph:
        """The graph, copied first if a clone uses it too."""
        if self._shared:
            self._graph_module = fx.GraphModule(self._graph_module, copy_graph(self._graph_module.graph))
            self._shared = False
        return self._graph_module.graph

    _lock: threading.RLock
    _adaptation: Adaptation
    _ops: dict[str, Op]
    _originals: dict[str, Tensor]
    _origin: Any
    _traces: dict[Any, fx.Graph]
    _merged: dict[Any, Any]
    _binding: Binding | None
    _executor: Executor | None
    _arguments: Arguments | None
    backend: str
    merge_report: Any

    # -- what callers see ------------------------------------------------------------------------------------------

    @property
    def adaptation(self) -> Adaptation:
        return self._adaptation

    @property
    def binding(self) -> Binding:
        """The current binding."""
        if self._binding is None:
            raise AdaptcError("the program has no adapter; it was merged or unloaded")
        return self._binding

    @property
    def ops(self) -> Mapping[str, Op]:
        return self._ops

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the current binding; same output type as the captured model. Safe while other threads swap."""
        executor, arguments = self.executor(), self._arguments
        if arguments is None or arguments.executor is not executor:
            arguments = self._make_arguments(executor)
        return executor(arguments, args, kwargs)

    def bind(self, adapter: Any, *, form: str = "apply", memory_limit: int | None = None, **options: Any) -> Bound:
        """A callable that keeps this adapter and can be used from any thread.

        ``adapter``: a PEFT adapter directory, a state dict, or a :class:`Binding`; errors as for ``adaptc.swap``.
        ``form``: "apply" shares the program's code and base; "weight" runs the base's graph on weights of its own, as
        fast as the base, for the memory of the adapted weights (``held`` says how much); "auto" decides by the work
        that the adapter adds to a call and by ``memory_limit``, in bytes, None for any (``why`` gives the reason).
        In the weight form later writes to base tensors are not followed. Raises MergeError where a method has none.
        """
        from adaptc.adapters import as_binding

        return Bound(self, as_binding(self, adapter, **options), form, memory_limit)

    @property
    def base(self) -> AdaptedProgram:
        """The program without adapters, for requests that want none: it shares the weights, and pays for nothing else.

        Equal to the unadapted model up to rounding, since siblings share a product here too; ``adaptc.unload`` gives
        the one that is equal to the bit. Raises MergeError as ``adaptc.unload`` does.
        """
        from adaptc.api import unload

        with self._lock:
            if self._base_program is None:
                new = unload(self)
                new.fuse = self.fuse
                self._base_program = new
            return self._base_program

    @property
    def fuse(self) -> bool | frozenset[str]:
        """Whether layers that read one tensor share a product; False computes every layer on its own.

        It is for the eager backend, fused kernels, and :meth:`module`; code for a compiler on the CPU is never fused.

        Fused weights lie in one buffer, of which the parameters are views: nothing is held twice. A set names the
        weights that may be moved. Setting it makes the code anew.
        """
        return self._fuse

    @fuse.setter
    def fuse(self, value: bool | frozenset[str]) -> None:
        if value != self._fuse:
            with self._lock:
                self._fuse, self._executor, self._arguments, self._base_program = value, None, None, None

    @property
    def kernels(self) -> bool | None:
        """Whether calls run adapters as fused Triton kernels (``adaptc.kernels``), where their methods have them.

        None: where the base is on a GPU. True elsewhere computes what the kernels would, with torch alone. ``report``
        says which sites have none, and why. Setting it makes the code anew.
        """
        return self._kernels

    @kernels.setter
    def kernels(self, value: bool | None) -> None:
        if value != self._kernels:
            with self._lock:
                self._kernels, self._executor, self._arguments = value, None, None

    @property
    def hoist_limit(self) -> int | None:
        """Bytes that values computed once per binding may hold; None for any number, 0 to compute all in every call.

        Over the limit, values that save least work for their bytes are computed in every call. It is kept for slots
        of the size they have when the program is first called. Setting it makes the code anew (inductor compiles).
        Raises ConfigError for anything but None and numbers from 0.
        """
        return self._hoist_limit

    @hoist_limit.setter
    def hoist_limit(self, value: int | None) -> None:
        if value != self._hoist_limit:
            check_limit(value)
            with self._lock:
                self._hoist_limit, self._executor, self._arguments = value, None, None

    @property
    def held(self) -> Held:
        """What is computed once for the current binding; nothing before its first call."""
        arguments = self._arguments
        return Held() if arguments is None else arguments.held

    @property
    def fusion(self) -> Fusion:
        """Which layers that read one tensor share a product; nothing before the first call."""
        executor = self._executor
        return Fusion() if executor is None else executor.fusion

    def module(self, check_guards: bool = True) -> fx.GraphModule:
        """An ``nn.Module`` to train: its parameters are the program's own; only adapter parameters require grad.

        ``train()`` and ``eval()`` switch dropout and batch norm, for programs compiled with ``training=True``. Where
        there is something to train and :attr:`fuse` is on, layers with LoRA, gated activations and the cross entropy of
        a head run as one step each, with backwards of their own: equal gradients, of first order alone.
        """
        module = super().module(check_guards=check_guards)
        trainable = {id(t) for t in self._slot_tensors().values() if t.requires_grad}
        for p in module.parameters():
            p.requires_grad_(id(p) in trainable)
        if trainable and self._fuse:
            from adaptc.training import fuse_training

            fuse_training(module)
        _allow_modes(module, self._adaptation.training)
        return module

    # -- consistency ---------------------------------------------------------------------------------------------------

    def executor(self) -> Executor:
        """The compiled code, made on first use."""
        self._check_whole()
        if self._executor is None:
            with self._lock:
                if self._executor is None:
                    a = self._adaptation
                    self._refresh()
                    self._executor = Executor(
                        self,
                        a.attachments,
                        self._ops,
                        self.backend,
                        a.fills,
                        a.training,
                        self._originals,
                        self._hoist_limit,
                        self._fuse,
                        self._kernels,
                    )
        return self._executor

    def _make_arguments(self, executor: Executor) -> Arguments:
        with self._lock:
            arguments = self._arguments
            if arguments is None or arguments.executor is not executor:
                arguments = self._arguments = executor.arguments(self._binding or _no_binding())
            return arguments

    def _set(self, binding: Binding) -> None:
        """Make ``binding`` the current one; the caller has checked that it fits."""
        with self._lock:
            arguments = None if self._executor is None else self._executor.arguments(binding)
            self._binding, self._arguments, self._stale = binding, arguments, True

    def _slot_tensors(self) -> Mapping[str, Tensor]:
        return {} if self._binding is None else self._binding.values

    def _refresh(self) -> None:
        """Bring state dict and fake values in line with the current binding."""
        if not self._ready or not self._stale:
            return
        with self._lock:
            binding, self._stale = self._binding, False
            if binding is None:
                return
            graph, state = self._own_graph(), self._state_dict
            placeholders = {
                s.target: n
                for s, n in zip(self._graph_signature.input_specs, graph.find_nodes(op="placeholder"), strict=True)
                if s.target is not None
            }
            fake = fake_of(graph)
            a, traces = self._adaptation.attachments, self._traces
            respecialize(graph, a, self._ops, placeholders, binding.values, fake, traces)
            set_header(graph, self._adaptation.header(binding))
            state.update(binding.values)
            for fqn, tensor in self._originals.items():
                state[fqn] = tensor
            for fqn, tensor in binding.base.items():
                self._originals.setdefault(fqn, state[fqn])
                state[fqn] = tensor

    def _release(self, fqn: str) -> None:
        """Give up a base tensor, and what an adapter made of it (a merge that does not keep the base)."""
        self._given_up = True
        self._state_dict.pop(fqn, None)
        self._originals.pop(fqn, None)
        if self._binding is not None and fqn in self._binding.base:
            base = {k: v for k, v in self._binding.base.items() if k != fqn}
            self._binding = replace(self._binding, base=base)
        # What was remembered of merges at other sites holds base tensors too.
        self._executor = self._arguments = self._base_program = None
        self._merged = {}

    def _check_whole(self) -> None:
        if self._given_up:
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
        with self._lock:
            slots, state = self._slot_tensors(), {**self._state_dict, **self._originals}
        return {k: v for k, v in state.items() if k not in slots}

    def slate(self, trainable: bool = False) -> Slate:
        a = self._adaptation
        return Slate(a.attachments, self._ops, self.base_tensors, a.autocast, trainable, a.unread)

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


def check_limit(value: int | None, name: str = "hoist_limit") -> None:
    """Raises ConfigError for what is no limit."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ConfigError(f"{name}={value!r} is no number of bytes; give None for no limit, or 0 for no memory at all")


def _no_binding() -> Binding:
    return Binding({}, {}, AdapterConfig())


def _allow_modes(module: fx.GraphModule, captured_for_training: bool) -> None:
    """Give an exported module the ``train`` and ``eval`` it refuses: they rewrite the flags in its graph."""

    def train(self: fx.GraphModule, mode: bool = True) -> fx.GraphModule:
        if mode and not captured_for_training:
            raise AdaptcError(
                "the program was captured for inference, without its dropout; compile(model, config, training=True) to "
                "train with train() and eval(). Training without dropout needs no train() call."
            )
        set_mode(self, mode)
        for m in self.modules():
            m.training = mode
        return self

    def eval_(self: fx.GraphModule) -> fx.GraphModule:
        return train(self, False)

    module.train = types.MethodType(train, module)  # type: ignore[method-assign]
    module.eval = types.MethodType(eval_, module)  # type: ignore[method-assign]
    for m in module.modules():
        m.training = captured_for_training
