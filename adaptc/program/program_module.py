"""The ``nn.Module`` of a program: what trainers, optimizers and hooks are written for.

Before: a program, and the graph module that ``torch.export`` makes of it, rewritten for training. After: one module
with the program's own parameters under the program's own names, which

- takes what ``prog()`` takes, fills what it fills, and says which input is wrong;
- is saved as the adapter alone, in PEFT's keys, and loaded from them: ``state_dict(base=True)`` has everything;
- switches dropout and batch norm in its graph with ``train()`` and ``eval()``;
- is copied by ``copy.deepcopy`` (base and all, as modules are), and pickled as the program's file.

The graph module is no child of it: the two share their tables of parameters, buffers and children, so that whoever
replaces a parameter (``to``, FSDP) does it for both, and no name has a prefix.

Private torch use, with the public route that was tried: the tables of ``nn.Module`` (``_parameters`` and its like).
Public: ``register_parameter`` on both, which does not follow what replaces a parameter of one of them. And
``_fqn_modifiers``, where ``torch.distributed.checkpoint`` asks what a state's keys are called as attributes: there is
no public name for it, and without it ``get_model_state_dict`` fails on keys that are no attributes.
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

from adaptc.binding.bind import file_tensors
from adaptc.binding.binding import Binding
from adaptc.binding.source import as_binding
from adaptc.errors import AdaptcError, CheckpointError, did_you_mean, shown
from adaptc.passes.lower.choose_products import Products
from adaptc.passes.train.checkpoint import checkpoint, set_checkpointing
from adaptc.passes.train.set_mode import set_mode
from adaptc.peft_files.format import bare_key, file_key
from adaptc.program.constraints import Constraints
from adaptc.program.core import ProgramCore
from adaptc.program.describe import described_module
from adaptc.program.in_parts import as_held, whole
from adaptc.program.layer_tensors import AllDropout

#: where a graph to train has what was chosen for the products of its base
PRODUCTS = "adaptc_products"
_TABLES = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")


class Making(Protocol):
    """How modules are made of programs. ``logits``: see ``AdaptedProgram.module``."""

    @property
    def logits(self) -> str: ...

    def __call__(self, program: ProgramCore, owner: ProgramCore) -> ProgramModule: ...

    def graph(self, program: ProgramCore, head: str | None = None) -> fx.GraphModule:
        """What the module runs; with ``head``, only as far as the layer of that path. Raises AdaptcError where that is
        not possible."""
        ...


def tables_of(module: nn.Module) -> dict[str, Any]:
    """The tables of a module, for one that is to share them: whoever replaces a parameter does it for both."""
    return {name: vars(module)[name] for name in _TABLES}


class AnyKey:
    """Has itself under every name, for who only wants to know whether a key is there."""

    def __getattr__(self, name: str) -> AnyKey:
        if name.startswith("_"):
            raise AttributeError(name)
        return self


class ProgramModule(nn.Module):
    """Made by :meth:`AdaptedProgram.module`. ``program``: a snapshot, which nobody swaps, of ``owner``."""

    graph_module: fx.GraphModule
    #: of a module: a function and its arguments, by which ``pickle`` makes it again; set by who writes programs
    pickled: ClassVar[Callable[[ProgramModule], tuple[Any, ...]]]

    def __init__(self, program: ProgramCore, owner: ProgramCore, graph: fx.GraphModule, making: Making) -> None:
        nn.Module.__init__(self)
        # The graph is no attribute that torch sees, or it would be a child.
        vars(self).update(tables_of(graph), graph_module=graph)
        self.program, self.owner, self.making = program, owner, making
        self.made_on = self._device()
        owner.memory.modules.add(self)
        self.inputs = program.adaptation.inputs(program)
        self._whole = False
        #: how many repeated blocks are computed again at a time, None where all is kept
        self.checkpointed: int | Literal["auto"] | None = None
        #: how many its graphs were divided for, None where they were not
        self._divided: int | Literal["auto"] | None = None
        # No child: the tables are those of the graph.
        vars(self)["dropout"] = AllDropout(self.set_dropout) if program.adaptation.training else None
        self.drops = True
        self._set_flags(program.adaptation.training)
        self.constraints = Constraints(program)
        self.register_state_dict_post_hook(_keep_adapter)
        self.register_load_state_dict_pre_hook(_take_adapter)
        self.register_load_state_dict_post_hook(_miss_no_base)

    def __getattr__(self, name: str) -> Any:
        """What a module has, or else what a graph module has: ``graph``, ``code``, ``recompile``, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            graph = vars(self).get("graph_module")
            if graph is None or name not in {*vars(graph), *dir(type(graph))}:
                raise
            return getattr(graph, name)

    def __repr__(self) -> str:
        """Three lines. The modules in it hold tensors alone: ``named_modules()`` has them, ``graph`` what is done."""
        return described_module(self, self.program)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The inputs the program was captured with; those that it fills may be left out.

        Raises AdaptcError that names the input which is missing, too many, on another device or of another size.
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
        """What may be wrong with a call that a layer refused, as far as one can tell."""
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
        """Raises AdaptcError for a program that was captured for inference, when ``mode`` is true."""
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
        """Whether layers of dropout act in training; that of attention, which is no layer, does as it was captured."""
        self.drops = on
        for graph in self.graph_modules():
            set_mode(graph, self.training, on)

    def modules(self) -> Iterator[nn.Module]:
        """Those that hold tensors, and one for all dropout, for who looks for such layers (TRL's disable_dropout)."""
        yield from super().modules()
        if (dropout := vars(self).get("dropout")) is not None:
            yield dropout

    def _set_flags(self, mode: bool) -> None:
        self.training = mode
        for graph in self.graph_modules():
            for m in graph.modules():
                m.training = mode

    def checkpoint(self, every: int | Literal["auto"] = "auto") -> None:
        """Compute repeated blocks of the graph again in the backward, ``every`` so many at a time, "auto" one; or turn
        that on again. Raises ConfigError and AdaptcError as ``AdaptedProgram.module`` says, and AdaptcError for another
        number than that of the first time."""
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
        """Turn off what :meth:`checkpoint` turned on."""
        for graph in self.graph_modules():
            set_checkpointing(graph, False)
        self.checkpointed = None

    def graph_modules(self) -> Sequence[fx.GraphModule]:
        """All that calls may run."""
        return [self.graph_module]

    @property
    def products(self) -> tuple[Products, ...]:
        """What computes the products of frozen layers and the gradients of their inputs, for each type of numbers;
        nothing where that was left to torch."""
        return self.graph_module.meta.get(PRODUCTS, ())

    # -- state ---------------------------------------------------------------------------------------------------------

    def binding(self) -> Binding:
        """The program's, with the tensors that the module has now. Raises AdaptcError for one without an adapter.

        What is trained may be known better by now: AdaLoRA's ranks, as long as nobody swaps."""
        own, binding, now = self.tensors(), self.program.binding, self.owner.current
        if now is not None and all(now.values.get(k) is t for k, t in binding.values.items()):
            binding = now
        return replace(binding, values={k: own.get(k, t) for k, t in binding.values.items()})

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers by FQN, tied ones under each of their names."""
        parameters = self.named_parameters(remove_duplicate=False)
        return dict(parameters) | dict(self.named_buffers(remove_duplicate=False))

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers are trained, and how many parameters hold in all, tied ones once; as PEFT's models say."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """The same in a line, with the part that is trained in percent."""
        trained, count = self.get_nb_trainable_parameters()
        part = 100 * trained / max(count, 1)
        print(f"trainable params: {trained:,d} || all params: {count:,d} || trainable%: {part:.4f}")

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapter as it is now, in the keys of PEFT's files. Of adapters that act together, their slots by FQN."""
        program = self.program
        if program.current is None:
            return {}
        binding = self.binding()
        if binding.parts:
            return {k: t.detach() for k, t in binding.values.items()}
        return {file_key(k, binding.config.peft_type): t for k, t in file_tensors(program.spec(), binding).items()}

    def state_dict(self, *args: Any, base: bool = False, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapter in PEFT's keys, otherwise as torch has it; with ``base``, and of a program without an adapter,
        all tensors by FQN."""
        self._whole = base or self.program.current is None
        try:
            return super().state_dict(*args, **kwargs)
        finally:
            self._whole = False

    @property
    def whole(self) -> bool:
        """Whether the state that is being made has the base as well."""
        return self._whole

    def _fqn_modifiers(self) -> dict[str, str]:
        """First part of a key -> the attribute under which torch is to look for the rest."""
        return {"base_model": "adapter_keys"}

    @property
    def adapter_keys(self) -> AnyKey:
        """Has PEFT's keys as attributes."""
        return AnyKey()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's. Raises CheckpointError or SwapError for what does not fit; then nothing is loaded."""
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
        """``new``, a module of a copy of the program, in the mode of this one and with what trains here."""
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
    """``kind.forward`` that says what it takes, which trainers ask it."""

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
    """The class of modules of programs that take these inputs."""
    own = {"forward": forward_taking(ProgramModule, n_args, names, optional), "__module__": __name__}
    return type("ProgramModule", (ProgramModule,), own)


def _keep_adapter(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    if module.whole:
        return
    for name in module.tensors():
        state.pop(prefix + name, None)
    state.update({prefix + key: t for key, t in module.adapter_state().items()})


def _take_adapter(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Tensors under PEFT's keys become those of the slots they are for. Raises as ``adaptc.swap`` does."""
    program = module.program
    if program.current is None or program.binding.parts:
        return
    own, kind = module.tensors(), program.binding.config.peft_type
    theirs = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
    adapter = {k: t for k, t in theirs.items() if k not in own and bare_key(k, kind) is not None}
    if not adapter:
        return
    values = as_binding(program, {k: whole(t) for k, t in adapter.items()}, own=False).values
    for fqn, t in values.items():
        if t.shape != own[fqn].shape:
            raise CheckpointError(
                f"state dict: {fqn!r} would have shape {tuple(t.shape)}, and the module has it as "
                f"{tuple(own[fqn].shape)}: an adapter of another rank is for prog.swap(), and a module made after it"
            )
    for key in adapter:
        del state[prefix + key]
    state.update({prefix + fqn: as_held(t, own[fqn]) for fqn, t in values.items()})


def _miss_no_base(module: Any, found: Any) -> None:
    """The base stays what it is: nobody need bring it, where there is an adapter."""
    current = module.program.current
    if current is None:
        return
    slots = set(current.values)
    base = module.tensors().keys() - slots
    missing: list[str] = found.missing_keys
    missing[:] = [k for k in missing if not _one_of(k, base) or _one_of(k, slots)]


def _one_of(key: str, names: Any) -> bool:
    """Whether a key is one of the names, or one with a prefix."""
    parts = key.split(".")
    return any(".".join(parts[i:]) in names for i in range(len(parts)))
