"""Make a program an ``nn.Module``, which trainers, optimizers and hooks work with.

The module has the program's own parameters under the program's own names. It runs the graph module that
``torch.export`` makes of the program, rewritten for training. It

- takes what ``prog()`` takes, fills what it fills, and says which input is wrong;
- is saved as the adapter alone, in PEFT's keys, and loaded from them: ``state_dict(base=True)`` has everything;
- switches dropout and batch norm in its graph with ``train()`` and ``eval()``;
- is copied by ``copy.deepcopy`` (base and all, as modules are), and pickled as the program's file.

The graph module is not a child of it. The two share their tables of parameters, buffers and children. Code that
replaces a parameter (``to``, FSDP) thus replaces it for both, and no name has a prefix.

Private torch use, with the public route that was tried:
- the tables of ``nn.Module`` (``_parameters`` and its like). Public: ``register_parameter`` on both, which does not
  follow code that replaces a parameter of one of them.
- ``_ddp_params_and_buffers_to_ignore``, which DistributedDataParallel reads. Public: none.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, fx, nn

from adaptc.errors import AdaptcError, short_repr
from adaptc.passes.lower.choose_products import MatmulChoices
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.passes.train.checkpoint import checkpoint, set_checkpointing
from adaptc.passes.train.set_mode import set_mode
from adaptc.runtime.dynamo_boundary import not_traced
from adaptc.state.core import ProgramCore
from adaptc.state.program_repr import describe_module
from adaptc.state.values import Constraints
from adaptc.torch_modes import enters_autocast, leaving_autocast
from adaptc.training.layer_tensors import DropoutStandIn
from adaptc.training.sharded_tensors import check_not_sharded
from adaptc.training.state_dict_hooks import AdapterStateDict

#: the entry of a training graph's ``meta`` that holds the kernels chosen for matmuls with base weights
MATMULS_META = "adaptc_products"
_TABLES = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")


class ModuleFactory(Protocol):
    """A maker of modules for programs, and of what a module needs that only rooms above this one can make. ``logits``:
    see ``AdaptedProgram.module``."""

    @property
    def logits(self) -> str: ...

    def __call__(self, program: ProgramCore, owner: ProgramCore) -> ProgramModule: ...

    def make_graph(self, program: ProgramCore, head_path: str | None = None) -> fx.GraphModule:
        """Return the graph that the module of ``program`` runs. With ``head_path``, the path of the last layer, the
        graph ends in what that layer reads. Raises AdaptcError where the program does not end in that layer."""
        ...

    def pickle(self, module: Any) -> tuple[Any, ...]:
        """Return how ``pickle`` makes ``module`` again: a callable and its arguments."""
        ...

    def make_packed_module(self, module: Any, has_mask: bool) -> Any:
        """Return a ``PretrainedModule`` of the same model and parameters as ``module``, another one, that takes
        ``position_ids``, and an ``attention_mask`` where ``has_mask``."""
        ...

    def find_bounds_read(self, module: Any) -> Collection[str]:
        """Return which of ``SEQUENCE_BOUNDS`` the model of ``module``, a ``PretrainedModule``, reads."""
        ...


def shared_tables(module: nn.Module) -> dict[str, Any]:
    """Return the tables of parameters, buffers and children of ``module``, for a module that is to share them.
    Replacing a parameter in one of the two then replaces it in both."""
    return {name: vars(module)[name] for name in _TABLES}


class GraphCaller(Protocol):
    """A callable that runs a graph whose parameters are sharded by tensor parallelism."""

    def __call__(self, graph: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any: ...

    def refuse(self, what: str) -> None:
        """Raise AdaptcError for ``what``, which does not work on sharded parameters."""
        ...


class ProgramModule(AdapterStateDict):
    """The module of a program, made by :meth:`AdaptedProgram.module`. ``program``: a snapshot of ``owner``, which
    nobody swaps."""

    graph_module: fx.GraphModule

    def __init__(self, program: ProgramCore, owner: ProgramCore, graph: fx.GraphModule, factory: ModuleFactory) -> None:
        nn.Module.__init__(self)
        # Past ``__setattr__``, by which torch would make the graph module a child.
        vars(self).update(shared_tables(graph), graph_module=graph)
        self.program, self.owner, self.factory = program, owner, factory
        self.original_device = self._device()
        owner.run_state.modules.add(self)
        self.inputs = program.adaptation.inputs(program)
        self.enters_autocast = enters_autocast(graph.graph)
        #: what runs graphs where tensor parallelism shards their parameters; None where they run by themselves
        self.sharded_call: GraphCaller | None = None
        #: the number of repeated blocks that are computed again at a time; None where all activations are kept
        self.checkpoint_every: int | Literal["auto"] | None = None
        #: the number of blocks that its graphs were divided for, or None before the first time
        self._checkpoint_divided: int | Literal["auto"] | None = None
        # Not a child either: the graph module shares the table of children, and would have one more.
        vars(self)["dropout"] = DropoutStandIn(self.set_dropout) if program.adaptation.training else None
        self.is_dropout_on = True
        self._set_training_flags(program.adaptation.training)
        #: the names of quantised weights; DistributedDataParallel would write the first process's values to each
        self.quantized_names = [n for n, t in self.tensors().items() if isinstance(t, QuantizedTensor)]
        self._ddp_params_and_buffers_to_ignore = list(self.quantized_names)
        self.constraints = Constraints(program.adaptation.attachments, program.ops, program.current)
        self._register_state_hooks()

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
        return describe_module(self, self.program)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program on the inputs it was captured with; those that it fills may be left out.

        Raises AdaptcError that names an input which is missing, too many, on another device or of another size.
        """
        asked = args, kwargs
        args, kwargs = self.inputs.fill_missing(args, kwargs)
        if torch.compiler.is_compiling():
            if self.sharded_call is not None:  # an error of traced code would only end the tracing
                not_traced(self.sharded_call.refuse)("torch.compile")
            self.constraints.enforce(self.tensor_at)
            return self.inputs.call_names.convert_output(self.run_graph(self.graph_module, args, kwargs), *asked)
        self._check_devices(self.inputs(args, kwargs))
        check_not_sharded(self, self.quantized_names)
        self.constraints.enforce(self.tensor_at)
        try:
            with leaving_autocast() if self.enters_autocast else nullcontext():
                return self.inputs.call_names.convert_output(self.run_graph(self.graph_module, args, kwargs), *asked)
        except ZeroDivisionError as error:
            why = self.inputs.explain_zero_size(self.inputs(args, kwargs), error)
            raise AdaptcError(why or "the model divides by a number that is zero for these inputs") from error
        except (IndexError, RuntimeError) as error:
            if why := self.inputs.explain_zero_size(self.inputs(args, kwargs), error):
                raise AdaptcError(why) from error
            if wrong := self.explain_failure(args, kwargs):
                raise AdaptcError(wrong) from error
            raise

    def run_graph(self, graph: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what ``graph``, one of :meth:`graph_modules`, gives for the program's inputs."""
        return graph(*args, **kwargs) if self.sharded_call is None else self.sharded_call(graph, args, kwargs)

    def tensor_at(self, fqn: str) -> Tensor:
        """Return the parameter or buffer ``fqn`` as the module has it now."""
        path, _, name = fqn.rpartition(".")
        return getattr(self.get_submodule(path), name)

    def _device(self) -> torch.device | None:
        return next((t.device for t in self.parameters()), None)

    def explain_failure(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """Return the likely fault of a call that a layer refused; '' where none is found. It looks for tensors that
        were converted to another dtype, and for extra inputs that a method does not take."""
        meant = {fqn: dtype for fqn, (_, dtype, _) in self.program.expected_meta.items()}
        for fqn, t in self.tensors().items():
            if t.dtype != meant.get(fqn, t.dtype):
                return (
                    f"{fqn!r} was converted from {meant[fqn]} to {t.dtype}, which does not fit dtypes that the "
                    "program's graph has written into it. Convert the model and compile it again, or run it under "
                    "torch.autocast (of trainers fp16=True or bf16=True, not fp16_full_eval or bf16_full_eval)"
                )
        own = self.tensors()
        for a in self.program.adaptation.attachments:
            given = {n: kwargs[m] for n in a.method.extra_inputs.extras() if (m := a.reads.get(n, n)) in kwargs}
            if given and (why := a.method.extra_inputs.check_inputs({n: own[f] for n, f in a.slots.items()}, given)):
                return why
        return ""

    def _check_devices(self, flat: Sequence[Any]) -> None:
        here = self._device()
        if here != self.original_device:
            raise AdaptcError(
                f"the module was moved from {self.original_device} to {here}, and what it learns there could not be "
                f"written, for its program was made for {self.original_device}: move that, "
                f"program.to({str(here)!r}).module()"
            )
        for (name, _), value in zip(self.inputs.expected, flat, strict=True):
            if isinstance(value, Tensor) and here is not None and value.device != here:
                way = "move one of the two"
                if here.type == "meta":
                    way = "adaptc.distributed.load_base(module, path) gives its base the values that it lacks"
                raise AdaptcError(f"input {name!r} is on {value.device}, and the module on {here}; {way}")

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
                set_mode(graph, mode, self.is_dropout_on)
        self._set_training_flags(mode)
        return self

    def set_dropout(self, is_on: bool) -> None:
        """Turn dropout layers on or off for training mode. The dropout inside attention, which is no layer, stays as it
        was captured."""
        self.is_dropout_on = is_on
        for graph in self.graph_modules():
            set_mode(graph, self.training, is_on)

    def modules(self) -> Iterator[nn.Module]:
        """Yield the modules that hold tensors, and an :class:`DropoutStandIn` for code that looks for dropout layers
        (TRL's disable_dropout)."""
        yield from super().modules()
        if (dropout := vars(self).get("dropout")) is not None:
            yield dropout

    def _set_training_flags(self, mode: bool) -> None:
        self.training = mode
        for graph in self.graph_modules():
            for m in graph.modules():
                m.training = mode

    def checkpoint(self, blocks: int | Literal["auto"] = "auto") -> None:
        """Compute repeated blocks of the graph again in the backward, ``blocks`` blocks at a time; "auto" is one.

        A graph that was set up before is only turned on again, with its own number of blocks. Raises ConfigError and
        AdaptcError as ``AdaptedProgram.module`` says, and AdaptcError for another number than the first time.
        """
        self._refuse_if_sharded("gradient checkpointing")
        if not self.program.adaptation.training:
            raise AdaptcError(
                "gradient_checkpointing works in training mode, and the program was captured for inference: "
                "compile(model, config, training=True)"
            )
        if self._checkpoint_divided is not None and blocks not in ("auto", self._checkpoint_divided):
            raise AdaptcError(
                f"the graph of this module computes {self._checkpoint_divided!r} blocks at a time again, and cannot "
                f"change to {short_repr(blocks)}: make another module, "
                f"program.module(gradient_checkpointing={short_repr(blocks)})"
            )
        blocks = blocks if self._checkpoint_divided is None else self._checkpoint_divided
        for graph in self.graph_modules():
            if not set_checkpointing(graph, True):
                checkpoint(graph, blocks)
        self._set_training_flags(self.training)
        self.checkpoint_every = self._checkpoint_divided = blocks

    def keep_activations(self) -> None:
        """Keep all activations for the backward again: turn off what :meth:`checkpoint` turned on."""
        for graph in self.graph_modules():
            set_checkpointing(graph, False)
        self.checkpoint_every = None

    def graph_modules(self) -> Sequence[fx.GraphModule]:
        """Return all graph modules that calls may run."""
        return [self.graph_module]

    @property
    def products(self) -> tuple[MatmulChoices, ...]:
        """Return the kernels chosen for the matmuls of frozen layers, and for the gradients of their inputs, by dtype.
        Empty where all are left to torch."""
        return self.graph_module.meta.get(MATMULS_META, ())

    # -- parameters and copies -----------------------------------------------------------------------------------------

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

    def _refuse_if_sharded(self, what: str) -> None:
        if self.sharded_call is not None:
            self.sharded_call.refuse(what)

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramModule:
        self._refuse_if_sharded("copy.deepcopy")
        program = copy.deepcopy(self.program, memo)
        return self.copy_modes_to(self.factory(program, program))

    def copy_modes_to(self, new: ProgramModule) -> ProgramModule:
        """Return ``new``, a module of a copy of the program, in this module's mode, and with the same parameters
        trainable."""
        for p, own in zip(new.parameters(), self.parameters(), strict=True):
            p.requires_grad_(own.requires_grad)
        if self.checkpoint_every is not None:
            new.checkpoint(self.checkpoint_every)
        if not self.is_dropout_on:
            new.set_dropout(False)
        return new.train(self.training)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        self._refuse_if_sharded("pickle")
        return self.factory.pickle(self)


def make_forward(
    module_class: type, n_args: int, names: Sequence[str], optional: Collection[str]
) -> Callable[..., Any]:
    """Return ``kind.forward`` with a signature that names the program's inputs, since trainers inspect it. The
    arguments are those of :func:`plain_class`."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return module_class.forward(self, *args, **kwargs)

    own = inspect.Parameter
    parameters = [own("self", own.POSITIONAL_ONLY)]
    parameters += [own(f"input_{i}", own.POSITIONAL_ONLY) for i in range(n_args)]
    parameters += [own(n, own.KEYWORD_ONLY, **({"default": None} if n in optional else {})) for n in names]
    vars(forward)["__signature__"] = inspect.Signature(parameters)
    forward.__doc__ = module_class.forward.__doc__
    return forward


@cache
def plain_class(n_args: int, names: tuple[str, ...], optional: frozenset[str]) -> type[ProgramModule]:
    """Return the class of modules for programs that take these inputs.

    ``n_args``: the number of positional inputs. ``names``: the keyword inputs, of which those in ``optional`` may be
    left out.
    """
    own = {"forward": make_forward(ProgramModule, n_args, names, optional), "__module__": __name__}
    return type("ProgramModule", (ProgramModule,), own)
