"""Let a model be traced that computes with numbers which it reads from inputs, such as the sizes of images.

A trace does not know such numbers. Where the model branches on them, or counts in a loop, no program for all of them
can be traced. So the numbers are those of the example inputs, and the program checks that its inputs have them, too.

The model runs once on the example inputs, and each number that it reads off a known tensor is kept. A tensor is known
if it is an input of integers, or computed of known tensors and constants alone. While the model is traced, it gets the
same numbers in the same order. Numbers of other tensors, of which hidden values are made, are left to the trace.

Inputs with numbers of images are checked as a whole. Of other inputs, such as masks, the program checks each number
that the model reads: whether any token is masked, say. Their lists are left to the trace, since they would fix a text.
A quotient of sizes stays a size, where ``torch.div`` would make a tensor of it.

Private torch use, with the public route that was tried: ``torch._check_tensor_all``, which makes an assertion on values
in the graph. Public: ``torch.ops.aten._assert_async``, which has no place in programs for other runtimes. ``_base`` of
a tensor tells what it is a view of. Public: none.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from adaptc.capture.model_state import patch_forward, preserve_state
from adaptc.capture.replacements.calling_line import NOT_A_MODEL, calling_line
from adaptc.capture.replacements.general_branches import OutputComparison, general_branches
from adaptc.capture.vision.tower_facts import GRIDS_ARE_FIXED, numbers_of_images
from adaptc.errors import AdaptcWarning, CaptureError, listing
from adaptc.passes.graph.pytree import pytree
from adaptc.progress import stage

#: names of torch's errors where a trace needs to know a number
_UNKNOWN_NUMBERS = ("GuardOnDataDependentSymNode", "UserError", "Unsupported", "RuntimeError")
#: functions that give Python numbers, or a tree of them, of a tensor
_READS = (
    *(Tensor.item, Tensor.tolist, Tensor.__int__, Tensor.__index__, Tensor.__bool__, Tensor.__float__),
    *(Tensor.__contains__, torch.is_nonzero, Tensor.is_nonzero),
)
#: functions whose arguments may be tensors in the place of numbers
_TAKES_NUMBERS = (
    *(torch.arange, torch.linspace, torch.zeros, torch.ones, torch.full, torch.empty, Tensor.__getitem__),
    *(torch.split, Tensor.split, torch.split_with_sizes, Tensor.split_with_sizes, torch.narrow, Tensor.narrow),
    *(Tensor.view, Tensor.reshape, torch.reshape, Tensor.expand, Tensor.repeat, Tensor.unflatten, Tensor.new_zeros),
    *(F.interpolate, F.pad, F.unfold, F.fold),
)
#: functions whose results have as many elements as their arguments' values say
_SIZED_BY_VALUES = (
    *(torch.repeat_interleave, Tensor.repeat_interleave, torch.nonzero, Tensor.nonzero, torch.unique, Tensor.unique),
    *(torch.unique_consecutive, Tensor.unique_consecutive, torch.masked_select, Tensor.masked_select),
)


#: functions whose results are known, though they take no tensor
_CONSTANTS = (
    *(torch.tensor, torch.as_tensor, torch.arange, torch.linspace, torch.zeros, torch.ones, torch.full, torch.eye),
    torch.scalar_tensor,
)
#: parts of the names of functions that draw random numbers
_RANDOM = ("rand", "bernoulli", "dropout", "multinomial", "normal", "exponential", "uniform")


def _writes(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a function may write to one of its arguments."""
    name = func.__name__
    in_place = name.endswith("_") and not name.endswith("__")
    is_augmented = name.startswith("__i") and name not in ("__invert__", "__int__", "__index__")
    return in_place or "out" in kwargs or name in ("__setitem__", "__set__") or is_augmented


def _is_quotient_of_sizes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether ``torch.div`` is asked for a whole number, of numbers that are not negative."""
    are_sizes = all(isinstance(n, (int, torch.SymInt)) and statically_known_true(n >= 0) for n in args)
    return are_sizes and len(args) == 2 and kwargs.get("rounding_mode") in ("floor", "trunc")


def _is_checked_by_torch() -> bool:
    """Return whether torch itself reads the number, for an assertion that it makes of a tensor."""
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001
    while frame is not None and frame.f_code.co_filename.startswith(NOT_A_MODEL):
        if frame.f_code.co_name == torch._check_tensor_all.__name__:  # noqa: SLF001
            return True
        frame = frame.f_back
    return False


class _KnownNumbers(TorchFunctionMode):
    """A mode that keeps the numbers which are read off known tensors, or gives those that were kept.

    Attributes:
        checked: the lines of the model whose numbers the traced program checks, one by one.
    """

    def __init__(self, kept: list[tuple[str, Any]] | None = None) -> None:
        super().__init__()
        self.is_replay = kept is not None
        self.numbers: list[tuple[str, Any]] = [] if kept is None else list(kept)
        # By identity, and held, so that no other tensor gets the same. The flag says that the values are fixed.
        self.known: dict[int, tuple[Tensor, bool]] = {}
        self.roots: frozenset[int] = frozenset()
        self.checked: list[str] = []

    def begin(self, fixed: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Take inputs for known: ``fixed`` ones, whose values the program checks, and ``others``."""
        self.add(list(others), False)
        self.add(list(fixed), True)
        self.roots = frozenset(self.known)

    def add(self, value: Any, is_fixed: bool) -> None:
        for t in pytree.tree_leaves(value):
            if isinstance(t, Tensor):
                self.known[id(t)] = (t, is_fixed)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given: dict[str, Any] = dict(kwargs or {})
        if self.is_replay and func is torch.div and _is_quotient_of_sizes(args, given):
            return args[0] // args[1]
        if func in _READS:
            is_left = id(args[0]) not in self.known or (func is Tensor.tolist and not self._is_fixed(args[0]))
            is_left = is_left or _is_checked_by_torch()
            return func(*args, **given) if is_left else self._read(func, args)
        if func in _TAKES_NUMBERS:
            args, given = self._with_numbers(args), self._with_numbers(given)
        leaves = pytree.tree_leaves((args, given))
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        is_known = (
            (bool(tensors) or func in _CONSTANTS)
            and all(id(t) in self.known for t in tensors)
            and not any(word in func.__name__ for word in _RANDOM)
        )
        is_fixed = all(map(self._is_fixed, tensors)) and not any(isinstance(n, torch.SymInt) for n in leaves)
        is_sized = func in _SIZED_BY_VALUES or (
            func is Tensor.__getitem__ and any(t.dtype == torch.bool for t in tensors[1:])
        )
        if is_sized and is_known:
            out = (self._constant if is_fixed else self._with_known_size)(func, args, given)
        else:
            out = func(*args, **given)
        if is_known:
            self.add(out, is_fixed)
        elif _writes(func, given) and any(map(self._shares_memory, (args[:1], given.get("out")))):
            self.known = {k: t for k, t in self.known.items() if k in self.roots}
        return out

    def _shares_memory(self, written: Any) -> bool:
        """Return whether a known tensor may share the memory of a tensor that is written to.

        A view of a known tensor need not be known, as where another one tells its shape.
        """
        tensors = [t for t in pytree.tree_leaves(written) if isinstance(t, Tensor)]
        return any(id(t) in self.known or (t._base is not None and id(t._base) in self.known) for t in tensors)  # noqa: SLF001

    def _is_fixed(self, value: Tensor) -> bool:
        return id(value) in self.known and self.known[id(value)][1]

    def _constant(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return a result of known tensors, whose size a trace would not know."""
        place = calling_line()
        if not self.is_replay:
            made = func(*args, **kwargs)
            self.numbers.append((place, pytree.tree_map_only(Tensor, lambda t: (t.tolist(), t.dtype), made)))
            return made
        kept, device = self._next_number(place), args[0].device
        if isinstance(kept[1], torch.dtype):
            return torch.tensor(kept[0], dtype=kept[1], device=device)
        return tuple(torch.tensor(values, dtype=dtype, device=device) for values, dtype in kept)

    def _with_known_size(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the function's result, and let the program check that it has as many elements as in the example."""
        place, out = calling_line(), func(*args, **kwargs)
        for made in pytree.tree_leaves(out):
            if isinstance(made, Tensor) and self.is_replay:
                torch._check(made.shape[0] == self._next_number(place))  # noqa: SLF001
                self.checked.append(place)
            elif isinstance(made, Tensor):
                self.numbers.append((place, made.shape[0]))
        return out

    def _read(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        # Number by number, since a trace reads a list so.
        place = calling_line()
        if not self.is_replay:
            value = func(*args)
            self.numbers += [(place, n) for n in pytree.tree_leaves(value)]
            return value
        if func is Tensor.tolist:
            return self._next_list(place, args[0].shape)
        number = self._next_number(place)
        return number if self._is_fixed(args[0]) else self._check(func, args, number, place)

    def _check(self, func: Callable[..., Any], args: tuple[Any, ...], number: Any, place: str) -> Any:
        """Return ``number``, and let the program check that it is the one which is read."""
        read = (args[0] == args[1]).any() if func is Tensor.__contains__ else args[0]
        seen: Any = read.item()
        if isinstance(number, bool):
            seen = seen if isinstance(seen, (bool, torch.SymBool)) else seen != 0
            torch._check(seen if number else torch.sym_not(seen))  # noqa: SLF001
        else:
            torch._check(seen == number)  # noqa: SLF001
        self.checked.append(place)
        return number

    def _next_list(self, place: str, shape: Sequence[int]) -> Any:
        return [self._next_list(place, shape[1:]) for _ in range(shape[0])] if shape else self._next_number(place)

    def _next_number(self, place: str) -> Any:
        # Where sizes are free in a trace, what is made of them is not known there, and its numbers are not read.
        while self.numbers:
            found, number = self.numbers.pop(0)
            if found == place:
                return number
        raise CaptureError(f"the number that is read in {place} is not known from a call, so it cannot be kept")

    def _with_numbers(self, arguments: Any) -> Any:
        """Return arguments with a number for each known tensor of one integer that is no index by itself."""

        def number(value: Any) -> Any:
            if isinstance(value, slice):
                return slice(*map(number, (value.start, value.stop, value.step)))
            is_one = isinstance(value, Tensor) and id(value) in self.known and not value.ndim
            is_integer = is_one and not value.is_floating_point() and value.dtype != torch.bool
            return self._read(Tensor.item, (value,)) if is_integer else value

        if isinstance(arguments, dict):
            return {n: number(v) for n, v in arguments.items()}
        if isinstance(arguments, (tuple, list)):
            return type(arguments)(
                self._with_numbers(v) if isinstance(v, (tuple, list)) else number(v) for v in arguments
            )
        return number(arguments)


def export_or_fix_values(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    export_once: Callable[[bool], ExportedProgram],
    comparison: OutputComparison,
) -> ExportedProgram:
    """Return what ``export_once`` makes, which is told whether the numbers in inputs are fixed.

    They are where torch cannot trace the model for unknown numbers, with its branches for masks of any kind either:
    those in inputs of images, or also those that the model reads of other inputs. A warning says which.
    """
    try:
        return export_once(False)
    except CaptureError as error:
        if type(error.__cause__).__name__ not in _UNKNOWN_NUMBERS:
            raise
        with contextlib.suppress(CaptureError), general_branches(model, args, kwargs, comparison) as lines:
            if lines:
                return export_once(True)
        names, others = numbers_of_images(kwargs), _integers(args, kwargs)
        for is_read_only in [False] * bool(names) + [True] * (len(others) > len(names)):
            read = others if is_read_only else []
            with (
                contextlib.suppress(CaptureError),
                stage(f"exporting {type(model).__name__} for the numbers in {listing(read or names)}"),
                fixed_values(model, args, kwargs, names, read) as lines,
            ):
                program = export_once(True)
                _warn(model, names, lines)
                return program
        raise error from error.__cause__


def _integers(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str | int]:
    """Return the names or positions of the inputs that are tensors of integers."""
    given = {**dict(enumerate(args)), **kwargs}
    return [n for n, t in given.items() if isinstance(t, Tensor) and not t.is_floating_point() and not t.is_complex()]


def _warn(model: nn.Module, names: list[str], lines: Sequence[str]) -> None:
    read = [f"the numbers in {listing(names)}"] if names else []
    read += [f"what it reads in {listing(sorted(set(lines)))}"] if lines else []
    warnings.warn(
        f"{type(model).__name__} computes with {' and '.join(read)}, and is captured for those of the "
        "example inputs alone. Calls with others fail: capture it once more for them",
        AdaptcWarning,
        stacklevel=5,
    )


@contextlib.contextmanager
def fixed_values(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    names: list[str],
    others: Sequence[str | int] = (),
) -> Iterator[list[str]]:
    """Run the block, which traces ``model``, with the numbers in its inputs ``names`` as in ``kwargs``.

    The traced program fails in calls where these inputs have other values, or where the model would read other numbers
    of ``others``. Gives a list that has, after a trace, the lines of the model that read these. Raises CaptureError
    where the model does not run on the example inputs.
    """
    values = {n: kwargs[n].clone() for n in names}
    original, parameters = model.forward, inspect.signature(model.forward).parameters.values()
    recording = _KnownNumbers()
    copies = pytree.tree_map_only(Tensor, Tensor.clone, (args, dict(kwargs)))
    recording.begin([copies[1][n] for n in names], _pick(others, *copies))
    lines: list[str] = []
    try:
        with preserve_state(model), torch.no_grad(), recording:
            model(*copies[0], **copies[1])
    except Exception as error:  # a model may raise anything
        raise CaptureError(f"the model fails on the example inputs: {error}") from error

    def forward(*args: Any, **kwargs: Any) -> Any:
        for name, value in values.items():
            torch._check_tensor_all(kwargs[name] == value)  # noqa: SLF001
        replay = _KnownNumbers(recording.numbers)
        replay.begin([kwargs[n] for n in values], _pick(others, args, kwargs))
        with replay:
            out = original(*args, **kwargs)
        lines[:] = replay.checked
        return out

    was_fixed = GRIDS_ARE_FIXED.set(bool(names))
    try:
        with patch_forward(model, forward, list(parameters)):
            yield lines
    finally:
        GRIDS_ARE_FIXED.reset(was_fixed)


def _pick(names: Sequence[str | int], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    return [args[n] if isinstance(n, int) else kwargs[n] for n in names]
