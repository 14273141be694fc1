"""Save and restore the state of a user's model, which no run and no capture of it may change.

Restored are parameters, buffers and other tensors, gradients, attributes, and the contents of containers and of the
model's other objects. So are hooks, modes and generators, and the random state of torch, Python and NumPy. State that
did not change is not written to, so other threads may use the model meanwhile.

Private torch use, with the public route that was tried: ``TorchDispatchMode``. It sees every write, so only parameters
that are written to are copied. Public: ``TorchFunctionMode``, which does not see what torch's own functions do inside
(``embedding`` shortens rows of its weight). ``Tensor._version`` tells too late, and is as private.

``patch_forward`` replaces a module's ``forward`` for a while, for example by one that names the inputs of a capture.
``own_attribute`` replaces any attribute of any object so.

:class:`ModelSkeleton` copies a model's modules without its tensors, so that the same model can be captured again for
other inputs. Later changes to the model do not reach it.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from adaptc.passes.graph.pytree import pytree
from adaptc.passes.graph.storage import memory_address

_PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
_IMMUTABLE_TYPES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
#: the bytes of tensors beyond which a model is not run to find out
MAX_BYTES = 4 << 30
#: packages whose objects belong to the model that holds them, besides the packages of the model's own classes
_HELPER_PACKAGES = {"transformers", "types"}
#: this package, whose modules of programs protect their own state and serve many threads
_OWN_PACKAGE = __name__.partition(".")[0]


def can_run(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Return whether the model and its inputs have values, and take at most :data:`MAX_BYTES` bytes."""
    tensors = [*model.parameters(), *model.buffers(), *pytree.tree_leaves((args, dict(kwargs)))]
    tensors = [t for t in tensors if isinstance(t, Tensor)]
    return all(t.device.type != "meta" for t in tensors) and sum(t.nbytes for t in tensors) <= MAX_BYTES


@contextlib.contextmanager
def preserve_state(
    model: Any, training: bool | None = None, *, only_traced: bool = False
) -> Iterator[Callable[[], None]]:
    """Run the block, which runs or captures ``model``, and restore the model afterwards, even where the block fails.

    The block is given a function that restores the model at once, for blocks that run the model several times.
    ``training`` is the model's mode inside the block, None for its own. ``only_traced`` says that nothing in the block
    writes to the model's parameters: it is only traced, or run in inner blocks. Results that may be part of a buffer
    must be copied inside the block. A ``model`` that is not a module is left alone.
    """
    if not isinstance(model, nn.Module):
        yield lambda: None
        return
    state = _SavedState(model)
    writes = contextlib.nullcontext() if only_traced else _CopyBeforeWrite(state.parameters)
    # Otherwise Dynamo would never again compile a function that it met under a mode, such as a branch of torch.cond.
    eager = contextlib.nullcontext() if only_traced else torch.compiler.set_stance("force_eager")

    def restore() -> None:
        state.restore(writes.copies if isinstance(writes, _CopyBeforeWrite) else ())

    try:
        if training is not None and any(mode != training for _, _, mode in state.modules):
            model.train(training)
        with eager, writes:
            yield restore
    finally:
        restore()


class _SavedState:
    """A record of the state that a model's code may change, as it was when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [(m, type(m), m.training) for m in model.modules()]
        self.packages = {_top_package(kind) for _, kind, _ in self.modules} - {
            "torch",
            "builtins",
            _OWN_PACKAGE,
        } | _HELPER_PACKAGES
        #: containers, each with its saved contents
        self.containers: list[tuple[Any, list[Any]]] = []
        self.tensors: list[_SavedTensor] = []
        self.restorers: list[Callable[[], object]] = list(_random_state_restorers(model))
        self._seen: dict[int, Any] = {}
        found: list[Any] = [model]
        while found:
            found += self._save(found.pop())
        self.parameters = [t.tensor for t in self.tensors if isinstance(t.tensor, nn.Parameter)]

    def _save(self, value: Any) -> Iterable[Any]:
        """Save the state of ``value``, and return the values that it holds."""
        if isinstance(value, _IMMUTABLE_TYPES) or id(value) in self._seen:
            return ()
        self._seen[id(value)] = value  # keeps the object alive, so that no other gets its id
        if isinstance(value, Tensor):
            self.tensors.append(_SavedTensor(value))
            return ()
        if isinstance(value, dict):
            items = list(value.items())
            self.containers.append((value, items))
            return [v for _, v in items]
        if isinstance(value, (list, set, deque)):
            self.containers.append((value, list(value)))
            return list(value)
        if isinstance(value, (tuple, frozenset)):
            return value
        if (put_back := _special_restorer(value)) is not None:
            self.restorers.append(put_back)
            return ()
        if isinstance(value, nn.Module):  # a scripted one has its tensors elsewhere
            own = [] if _top_package(type(value)) == _OWN_PACKAGE else [vars(value)]
            return [*own, *value.parameters(recurse=False), *value.buffers(recurse=False)]
        own = getattr(value, "__dict__", None)
        known = isinstance(own, dict) and any(_top_package(c) in self.packages for c in type(value).__mro__)
        return [own] if known else ()

    def restore(self, copies: Iterable[tuple[Tensor, Tensor]]) -> None:
        for held, before in self.containers:
            _restore_container(held, before)
        for module, kind, training in self.modules:
            if type(module) is not kind:
                module.__class__ = kind
            if module.training != training:
                module.training = training
        with torch.no_grad():
            for tensor in self.tensors:
                tensor.restore()
            for alias, before in copies:
                alias.copy_(before)
        for put_back in self.restorers:
            put_back()


class _SavedTensor:
    """A tensor with its saved memory and flags. Tensors that are not parameters also have their values saved.

    Much code writes to buffers in ways that a dispatch mode does not see.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.alias, self.copy = tensor, None, None
        if type(tensor) not in _PLAIN_TENSORS or tensor.layout != torch.strided or tensor.is_meta:
            return  # its class says what may be done with it
        self.alias = tensor.data
        self.flags = tensor.requires_grad, tensor.grad if tensor.is_leaf else None
        if not isinstance(tensor, nn.Parameter):
            self.copy = self.alias.clone()

    def restore(self) -> None:
        tensor, alias = self.tensor, self.alias
        if alias is None:
            return
        if _memory_layout(tensor) != _memory_layout(alias):
            tensor.data = alias
        if tensor.is_leaf:
            requires_grad, grad = self.flags
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
            if tensor.grad is not grad:
                tensor.grad = grad
        # Writing to the alias leaves the tensor's version counter alone, so autograd graphs that saved the tensor stay
        # valid.
        if self.copy is not None and not torch.equal(alias, self.copy):
            alias.copy_(self.copy)


class _CopyBeforeWrite(TorchDispatchMode):
    """A dispatch mode that copies each of the given tensors before its first write."""

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.uncopied: dict[int, list[Tensor]] = {}
        for t in tensors:
            if type(t) in _PLAIN_TENSORS and t.layout == torch.strided and not t.is_meta and t.numel():
                self.uncopied.setdefault(memory_address(t), []).append(t.data)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)  # blocks of control flow have none
        if schema is not None and schema.is_mutable:
            for i, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._copy_tensors(args[i] if i < len(args) else kwargs.get(argument.name))
        return func(*args, **kwargs)

    def _copy_tensors(self, written: Any) -> None:
        for t in pytree.tree_leaves(written):
            if type(t) in _PLAIN_TENSORS and t.layout == torch.strided and not t.is_meta and t.numel():
                self.copies += [(alias, alias.clone()) for alias in self.uncopied.pop(memory_address(t), [])]


def _memory_layout(t: Tensor) -> tuple[Any, ...]:
    return t.data_ptr(), tuple(t.shape), t.stride(), t.dtype, t.device


def _top_package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _restore_container(container: Any, saved: list[Any]) -> None:
    """Restore a container's saved contents where they differ.

    It calls the methods of the built-in base class, since a subclass may forbid changes.
    """
    if isinstance(container, dict):
        now = list(container.items())
        if len(now) == len(saved) and all(a[0] is b[0] and a[1] is b[1] for a, b in zip(now, saved, strict=True)):
            return
        base: Any = OrderedDict if isinstance(container, OrderedDict) else dict
        wanted = dict(saved)
        same_order = [k for k, _ in now if k in wanted] == [k for k, _ in saved]
        for key, _ in now:
            if not same_order or key not in wanted:
                base.__delitem__(container, key)
        for key, value in saved:
            base.__setitem__(container, key, value)
    elif isinstance(container, set):
        if len(container) != len(saved) or any(v not in container for v in saved):
            set.clear(container)
            set.update(container, saved)
    else:
        now = list(container)
        if len(now) != len(saved) or any(a is not b for a, b in zip(now, saved, strict=True)):
            base: Any = deque if isinstance(container, deque) else list
            base.clear(container)
            base.extend(container, saved)


def _random_state_restorers(model: nn.Module) -> Iterator[Callable[[], object]]:
    """Yield functions that restore the global random states of torch, its CUDA devices, Python and NumPy."""
    state = torch.get_rng_state()
    yield lambda: torch.set_rng_state(state)
    for device in sorted({t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"}):
        on_gpu = torch.cuda.get_rng_state(device)
        yield lambda device=device, on_gpu=on_gpu: torch.cuda.set_rng_state(on_gpu, device)
    of_python = random.getstate()
    yield lambda: random.setstate(of_python)
    if (numpy := sys.modules.get("numpy.random")) is not None:
        of_numpy = numpy.get_state()
        yield lambda: numpy.set_state(of_numpy)


def _special_restorer(value: Any) -> Callable[[], object] | None:
    """Return a function that restores a random generator or a NumPy array, or None for any other value."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, random.Random):
        of_python = value.getstate()
        return lambda: value.setstate(of_python)
    if _top_package(type(value)) != "numpy":
        return None
    bits, fill = getattr(value, "bit_generator", None), getattr(value, "__setitem__", None)
    if bits is not None:
        of_numpy = bits.state
        return lambda: setattr(bits, "state", of_numpy)
    if fill is None:
        return None
    array = value.copy()
    return lambda: fill(..., array) if value.flags.writeable else None


@contextlib.contextmanager
def patch_forward(
    model: nn.Module, forward: Callable[..., Any], parameters: Sequence[inspect.Parameter]
) -> Iterator[None]:
    """Run the block with ``forward`` as the model's forward, whose signature has these parameters.

    Afterwards the model has its former forward, whether that is its class's or an attribute of its own.
    """
    vars(forward)["__signature__"] = inspect.Signature(list(parameters))
    with own_attribute(model, "forward", forward):
        yield


@contextlib.contextmanager
def own_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Run the block with an attribute of ``owner`` itself, which hides that of its class."""
    own = {k: v for k, v in vars(owner).items() if k == name}
    try:
        vars(owner)[name] = value
        yield
    finally:
        vars(owner).pop(name, None)
        vars(owner).update(own)


def keyword_only_parameter(name: str) -> inspect.Parameter:
    """Return a keyword-only parameter called ``name``."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True, eq=False)
class ModelSkeleton:
    """A copy of a model's modules, in which meta tensors stand for the tensors that are kept elsewhere.

    ``modules`` is the copy. ``meta_tensors`` maps a tensor's name to its meta tensor; tied tensors share one. Tensors
    that nobody else keeps are in ``modules`` themselves.
    """

    modules: nn.Module
    meta_tensors: Mapping[str, Tensor] = field(repr=False)

    @classmethod
    def from_model(cls, model: nn.Module, names: Collection[str]) -> ModelSkeleton | None:
        """Return a skeleton of ``model``, or None for a model that cannot be copied.

        ``names`` are the names of the tensors that are kept elsewhere.
        """
        tensors = dict(model.named_parameters(remove_duplicate=False))
        tensors |= dict(model.named_buffers(remove_duplicate=False))
        memo = {id(t): t for t in tensors.values()}
        memo |= {id(t): torch.empty_like(t, device="meta") for n, t in tensors.items() if n in names}
        places = {n: memo[id(t)] for n, t in tensors.items() if n in names}
        try:
            return cls(copy.deepcopy(model, memo), places)
        except Exception:  # any error that a foreign object in the model may raise when it is copied
            return None

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Return a model on these tensors themselves, not on copies. Raises KeyError for a missing name."""
        memo = {id(place): tensors[name] for name, place in self.meta_tensors.items()}
        memo |= {id(t): t for t in (*self.modules.parameters(), *self.modules.buffers()) if id(t) not in memo}
        return copy.deepcopy(self.modules, memo)
