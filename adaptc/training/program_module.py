"""Make a program an ``nn.Module``, which trainers, optimizers and hooks work with.

The module has the program's own parameters under the program's own names. It runs the graph module that
``torch.export`` makes of the program, rewritten for training. It

- takes what ``prog()`` takes, fills what it fills, and says which input is wrong;
- is saved as the adapter alone, in PEFT's keys, and loaded from them: ``state_dict(base=True)`` has everything;
- switches dropout and batch norm in its graph with ``train()`` and ``eval()``;
- is copied by ``copy.deepcopy`` (base and all, as modules are), and pickled as the program's file.

The graph module is not a child of it. The two share their tables of parameters, buffers and children. Code that
replaces a parameter (``to``, FSDP) thus replaces it for both, and no name has a prefix.

Private torch use, with the public route that was tried: the tables of ``nn.Module`` (``_parameters`` and its like).
Public: ``register_parameter`` on both, which does not follow code that replaces a parameter of one of them.
``_fqn_modifiers``, too: ``torch.distributed.checkpoint`` asks it for the attributes that a state's keys stand for.
There is no public name for it. Without it, ``get_model_state_dict`` fails on keys that are not attributes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor, fx, nn

from adaptc.adapter_files.format import bare_key, file_key
from adaptc.binding.bind import file_tensors
from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError, CheckpointError, did_you_mean, shown
from adaptc.passes.lower.choose_products import Products
from adaptc.passes.train.checkpoint import checkpoint, set_checkpointing
from adaptc.passes.train.set_mode import set_mode
from adaptc.state.core import ProgramCore
from adaptc.state.program_repr import described_module
from adaptc.training.constraints import Constraints
from adaptc.training.layer_tensors import AllDropout
from adaptc.training.state_dict_hooks import AnyKey, keep_adapter, miss_no_base, take_adapter

#: the entry of a training graph's ``meta`` that holds the kernels chosen for matmuls with base weights
PRODUCTS = "adaptc_products"
_TABLES = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")


class Making(Protocol):
    """A maker of modules for programs. ``logits``: see ``AdaptedProgram.module``."""

    @property
    def logits(self) -> str: ...

    def __call__(self, program: ProgramCore, owner: ProgramCore) -> ProgramModule: ...

    def graph(self, program: ProgramCore, head: str | None = None) -> fx.GraphModule:
        """Return the graph that the module of ``program`` runs. With ``head``, the path of the last layer, the graph
        ends in what that layer reads. Raises AdaptcError where the program does not end in that layer."""
        ...


def tables_of(module: nn.Module) -> dict[str, Any]:
    """Return the tables of parameters, buffers and children of ``module``, for a module that is to share them.
    Replacing a parameter in one of the two then replaces it in both."""
    return {name: vars(module)[name] for name in _TABLES}


class ProgramModule(nn.Module):
    """The module of a program, made by :meth:`AdaptedProgram.module`. ``program``: a snapshot of ``owner``, which
    nobody swaps."""

    graph_module: fx.GraphModule
    #: a function that returns how ``pickle`` makes a module again: a callable and its arguments; ``files`` sets it
    pickled: ClassVar[Callable[[ProgramModule], tuple[Any, ...]]]

    def __init__(self, program: ProgramCore, owner: ProgramCore, graph: fx.GraphModule, making: Making) -> None:
        nn.Module.__init__(self)
        # Past ``__setattr__``, by which torch would make the graph module a child.
        vars(self).update(tables_of(graph), graph_module=graph)
        self.program, self.owner, self.making = program, owner, making
        self.made_on = self._device()
        owner.memory.modules.add(self)
        self.inputs = program.adaptation.inputs(program)
        self._whole = False
        #: the number of repeated blocks that are computed again at a time; None where all activations are kept
        self.checkpointed: int | Literal["auto"] | None = None
        #: the number of blocks that its graphs were divided for, or None before the first time
        self._divided: int | Literal["auto"] | None = None
        # Not a child either: the graph module shares the table of children, and would have one more.
        vars(self)["dropout"] = AllDropout(self.set_dropout) if program.adaptation.training else None
        self.drops = True
        self._set_flags(program.adaptation.training)
        self.constraints = Constraints(program)
        self.register_state_dict_post_hook(keep_adapter)
        self.register_load_state_dict_pre_hook(take_adapter)
        self.register_load_state_dict_post_hook(miss_no_base)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the module, or else of its graph module: ``graph``, ``code``, ``recompile``, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            graph = vars(self).get("graph_module")
            if graph is None or name not in {*vars(graph), *dir(type(graph))}:
                raise
            return getattr(graph, name)

    def __repr__(self) -> str:
        """Return a description in three lines. Submodules hold tensors alone: ``named_modules()`` lists them, and
        ``graph`` shows the computation."""
        return described_module(self, self.program)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program on the inputs it was captured with; those that it fills may be left out.

        Raises AdaptcError that names an input which is missing, too many, on another device or of another size.
        """
        asked = args, kwargs
        args, kwargs = self.inputs.complete(args, kwargs)
        if torch.compiler.is_compiling():
            self.constraints.hold(self)
            return self.inputs.calls.as_asked(self.graph_module(*args, **kwargs), *asked)
        self._check(self.inputs(args, kwargs))
        self.constraints.hold(self)
        try:
            return self.inputs.calls.as_asked(self.graph_module(*args, **kwargs), *asked)
        except ZeroDivisionError as error:
            why = self.inputs.why_zero(self.inputs(args, kwargs), error)
            raise AdaptcError(why or "the model divides by a number that is zero for these inputs") from error
        except (IndexError, RuntimeError) as error:
            if why := self.inputs.why_zero(self.inputs(args, kwargs), error):
                raise AdaptcError(why) from error
            if wrong := self.why_wrong(args, kwargs):
                raise AdaptcError(wrong) from error
            raise

    def _device(self) -> torch.device | None:
        return next((t.device for t in self.parameters()), None)

    def why_wrong(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """Return the likely fault of a call that a layer refused; '' where none is found. It looks for tensors that
        were converted to another dtype, and for extra inputs that a method does not take."""
        meant = {fqn: dtype for fqn, (_, dtype, _) in self.program.meant.items()}
        for fqn, t in self.tensors().items():
            if t.dtype != meant.get(fqn, t.dtype):
                return (
                    f"{fqn!r} was converted from {meant[fqn]} to {t.dtype}, which does not fit dtypes that the "
                    "program's graph has written into it. Convert the model and compile it again, or run it under "
                    "torch.autocast (of trainers fp16=True or bf16=True, not fp16_full_eval or bf16_full_eval)"
                )
        own = self.tensors()
        for a in self.program.adaptation.attachments:
            given = {n: kwargs[m] for n in a.method.extras() if (m := a.reads.get(n, n)) in kwargs}
            if given and (why := a.method.why_wrong({n: own[f] for n, f in a.slots.items()}, given)):
                return why
        return ""

    def _check(self, flat: Sequence[Any]) -> None:
        here = self._device()
        if here != self.made_on:
            raise AdaptcError(
                f"the module was moved from {self.made_on} to {here}, and what it learns there could not be written, "
                f"for its program was made for {self.made_on}: move that, program.to({str(here)!r}).module()"
            )
        for (name, _), value in zip(self.inputs.expected, flat, strict=True):
            if isinstance(value, Tensor) and here is not None and value.device != here:
                raise AdaptcError(f"input {name!r} is on {value.device}, and the module on {here}; move one of the two")

    # -- modes ---------------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Switch the graph to training mode, or to inference mode. Raises AdaptcError where ``mode`` is True and the
        program was captured for inference."""
        if mode and not self.program.adaptation.training:
            raise AdaptcError(
                "the program was captured for inference, without its dropout; compile(model, config, training=True) to "
                "train with train() and eval(). Training without dropout needs no train() call."
            )
        if mode != self.training:
            for graph in self.graph_modules():
                set_mode(graph, mode, self.drops)
        self._set_flags(mode)
        return self

    def set_dropout(self, on: bool) -> None:
        """Turn dropout layers on or off for training mode. The dropout inside attention, which is no layer, stays as it
        was captured."""
        self.drops = on
        for graph in self.graph_modules():
            set_mode(graph, self.training, on)

    def modules(self) -> Iterator[nn.Module]:
        """Yield the modules that hold tensors, and an :class:`AllDropout` for code that looks for dropout layers (TRL's
        disable_dropout)."""
        yield from super().modules()
        if (dropout := vars(self).get("dropout")) is not None:
            yield dropout

    def _set_flags(self, mode: bool) -> None:
        self.training = mode
        for graph in self.graph_modules():
            for m in graph.modules():
                m.training = mode

    def checkpoint(self, every: int | Literal["auto"] = "auto") -> None:
        """Compute repeated blocks of the graph again in the backward, ``every`` blocks at a time; "auto" is one.

        A graph that was set up before is only turned on again, with its own number of blocks. Raises ConfigError and
        AdaptcError as ``AdaptedProgram.module`` says, and AdaptcError for another number than the first time.
        """
        if not self.program.adaptation.training:
            raise AdaptcError(
                "gradient_checkpointing works in training mode, and the program was captured for inference: "
                "compile(model, config, training=True)"
            )
        if self._divided is not None and every not in ("auto", self._divided):
            raise AdaptcError(
                f"the graph of this module computes {self._divided!r} blocks at a time again, and cannot change to "
                f"{shown(every)}: make another module, program.module(gradient_checkpointing={shown(every)})"
            )
        every = every if self._divided is None else self._divided
        for graph in self.graph_modules():
            if not set_checkpointing(graph, True):
                checkpoint(graph, every)
        self._set_flags(self.training)
        self.checkpointed = self._divided = every

    def keep_activations(self) -> None:
        """Keep all activations for the backward again: turn off what :meth:`checkpoint` turned on."""
        for graph in self.graph_modules():
            set_checkpointing(graph, False)
        self.checkpointed = None

    def graph_modules(self) -> Sequence[fx.GraphModule]:
        """Return all graph modules that calls may run."""
        return [self.graph_module]

    @property
    def products(self) -> tuple[Products, ...]:
        """Return the kernels chosen for the matmuls of frozen layers, and for the gradients of their inputs, by dtype.
        Empty where all are left to torch."""
        return self.graph_module.meta.get(PRODUCTS, ())

    # -- state ---------------------------------------------------------------------------------------------------------

    def binding(self) -> Binding:
        """Return the program's binding, with the tensors that the module has now. Raises AdaptcError for a program
        without an adapter.

        The owner's binding is taken while it has the same tensors. It may know more: AdaLoRA's ranks, which training
        cuts.
        """
        own, binding, now = self.tensors(), self.program.binding, self.owner.current
        if now is not None and all(now.values.get(k) is t for k, t in binding.values.items()):
            binding = now
        return replace(binding, values={k: own.get(k, t) for k, t in binding.values.items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters and buffers by FQN, tied ones under each of their names."""
        parameters = self.named_parameters(remove_duplicate=False)
        return dict(parameters) | dict(self.named_buffers(remove_duplicate=False))

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers of trainable and of all parameter elements, tied ones counted once, as PEFT's models
        do."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print both numbers of :meth:`get_nb_trainable_parameters` and the trainable share in percent, in PEFT's
        line."""
        trained, count = self.get_nb_trainable_parameters()
        part = 100 * trained / max(count, 1)
        print(f"trainable params: {trained:,d} || all params: {count:,d} || trainable%: {part:.4f}")

    def adapter_state(self) -> dict[str, Tensor]:
        """Return the adapter's current tensors in the keys of PEFT's files; empty without an adapter. Several adapters
        that act together have their slots by FQN instead."""
        program = self.program
        if program.current is None:
            return {}
        binding = self.binding()
        if binding.parts:
            return {k: t.detach() for k, t in binding.values.items()}
        return {file_key(k, binding.config.peft_type): t for k, t in file_tensors(program.spec(), binding).items()}

    def state_dict(self, *args: Any, base: bool = False, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the adapter's tensors in PEFT's keys; the arguments are torch's. With ``base``, and for a program
        without an adapter, return all tensors by FQN."""
        self._whole = base or self.program.current is None
        try:
            return super().state_dict(*args, **kwargs)
        finally:
            self._whole = False

    @property
    def whole(self) -> bool:
        """Return whether the state dict that is being made includes the base."""
        return self._whole

    def _fqn_modifiers(self) -> dict[str, str]:
        """Return a map from the first part of a key to the attribute under which torch looks for the rest."""
        return {"base_model": "adapter_keys"}

    @property
    def adapter_keys(self) -> AnyKey:
        """Return an object that has all of PEFT's keys as attributes."""
        return AnyKey()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict of the adapter or of all tensors, as torch's method does. Raises CheckpointError or
        SwapError for one that does not fit, and then loads nothing."""
        own, current = self.tensors(), self.program.current
        kind = "" if current is None else current.config.peft_type
        if strict and current is not None and not any(bare_key(k, kind) is not None for k in state_dict.keys() - own):
            missing = [k for k in self.state_dict(base=True) if k in current.values and k not in state_dict]
            if missing:
                raise CheckpointError(
                    f"state dict: {missing[0]!r} is missing, and the keys of the adapter as PEFT has them are, too"
                )
        for key, value in state_dict.items():
            if key not in own and strict and (current is None or bare_key(key, kind) is None):
                near = did_you_mean(key, [*own, *self.adapter_state()])
                raise CheckpointError(
                    f"state dict: {key!r} is no tensor of the module{near}; drop it, or load with strict=False"
                )
            if isinstance(value, Tensor) and key in own and value.shape != own[key].shape:
                raise CheckpointError(
                    f"state dict: {key!r} has shape {tuple(value.shape)}, and the module has it as "
                    f"{tuple(own[key].shape)}: the state is of another model, or of an adapter of another rank"
                )
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            raise CheckpointError(f"the module does not take this state dict: {error}") from error

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramModule:
        program = copy.deepcopy(self.program, memo)
        return self.like_this(self.making(program, program))

    def like_this(self, new: ProgramModule) -> ProgramModule:
        """Return ``new``, a module of a copy of the program, in this module's mode, and with the same parameters
        trainable."""
        for p, own in zip(new.parameters(), self.parameters(), strict=True):
            p.requires_grad_(own.requires_grad)
        if self.checkpointed is not None:
            new.checkpoint(self.checkpointed)
        if not self.drops:
            new.set_dropout(False)
        return new.train(self.training)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return type(self).pickled(self)


def forward_taking(kind: type, n_args: int, names: Sequence[str], optional: Collection[str]) -> Callable[..., Any]:
    """Return ``kind.forward`` with a signature that names the program's inputs, since trainers inspect it. The
    arguments are those of :func:`plain`."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **kwargs)

    own = inspect.Parameter
    parameters = [own("self", own.POSITIONAL_ONLY)]
    parameters += [own(f"input_{i}", own.POSITIONAL_ONLY) for i in range(n_args)]
    parameters += [own(n, own.KEYWORD_ONLY, **({"default": None} if n in optional else {})) for n in names]
    vars(forward)["__signature__"] = inspect.Signature(parameters)
    forward.__doc__ = kind.forward.__doc__
    return forward


@cache
def plain(n_args: int, names: tuple[str, ...], optional: frozenset[str]) -> type[ProgramModule]:
    """Return the class of modules for programs that take these inputs.

    ``n_args``: the number of positional inputs. ``names``: the keyword inputs, of which those in ``optional`` may be
    left out.
    """
    own = {"forward": forward_taking(ProgramModule, n_args, names, optional), "__module__": __name__}
    return type("ProgramModule", (ProgramModule,), own)
