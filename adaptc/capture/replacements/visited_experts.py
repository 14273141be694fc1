"""Let a loop over the experts that tokens chose be traced.

transformers runs most mixtures by one grouped matmul. Some loop over the experts that any token chose, and compute each
on its own tokens. Which experts these are only values tell, so no graph has that loop. Here every expert is visited. An
expert that no token chose computes on no rows, and adds nothing.

The number of an expert's tokens stays unknown in the graph, so an expert still computes its own tokens only. A loop is
known by what it calls: it finds the experts by ``nonzero``, their tokens by ``torch.where``, and adds what they give by
``index_add_``. It is first run on what the example inputs give it, with each expert visited once more without tokens.
A loop that gives something else then stays as it is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adaptc.capture.model_state import can_run, own_attribute, preserve_state
from adaptc.passes.graph.pytree import pytree

#: what a loop over experts calls
_LOOP_CALLS = {"nonzero", "where", "index_add_"}


class _Expert:
    """The row of ``nonzero`` with one expert's index, as an index of tensors and as a number."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __getitem__(self, place: int) -> int:
        return [self.index][place]

    def item(self) -> int:
        return self.index

    def squeeze(self) -> int:
        return self.index


class _AllExperts:
    """The experts that a loop visits: all of them."""

    def __init__(self, count: int, mode: _VisitAll) -> None:
        self.count, self.mode = count, mode

    def __iter__(self) -> Iterator[_Expert]:
        for index in range(self.count):
            for has_none in (False, True) if self.mode.tries_none else (False,):
                self.mode.has_none = has_none
                yield _Expert(index)
        self.mode.has_none = False


class _SomeTokens:
    """The number of an expert's tokens, of which a model may only ask whether it is 0."""

    def __eq__(self, other: object) -> bool:
        if other != 0 or not isinstance(other, int):
            raise TypeError("the number of an expert's tokens is known to the graph only")
        return False

    __hash__ = None  # type: ignore[assignment]  # as of all that compare by value and may change


class _VisitAll(TorchFunctionMode):
    """Answer what a loop over ``count`` experts asks, so that it visits each.

    With ``tries_none`` it visits each once more, as if no token had chosen the expert.
    """

    def __init__(self, count: int | None, tries_none: bool) -> None:
        super().__init__()
        self.count, self.tries_none, self.has_none = count, tries_none, False
        self.tokens: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.nonzero, torch.nonzero) and self._is_of_experts(args, kwargs):
            rows = args[0].shape[0]
            return _AllExperts(rows if self.count is None else min(rows, self.count), self)
        if func is Tensor.__getitem__ and isinstance(args[1], _Expert):
            at = args[1].index
            return args[0][at : at + 1]
        if func is Tensor.numel and any(args[0] is found for found in self.tokens):
            return _SomeTokens()
        if func is torch.where and len(args) == 1 and not kwargs:
            found = func(torch.zeros_like(args[0]) if self.has_none else args[0])
            self.tokens += found
            return found
        return func(*args, **kwargs)

    @staticmethod
    def _is_of_experts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether ``nonzero`` is asked which experts are chosen, of one boolean for each."""
        is_row = isinstance(args[0], Tensor) and args[0].ndim == 1 and args[0].dtype == torch.bool
        return is_row and isinstance(args[0].shape[0], int) and len(args) == 1 and not kwargs.get("as_tuple")


@contextlib.contextmanager
def visited_experts(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Run the block, which traces ``model``, with loops over experts that visit all of them.

    ``args`` and ``kwargs`` are example inputs. A loop that gives something else on what they give it stays as it is.
    """
    loops = [m for m in model.modules() if _loops_over_experts(type(m))]
    with contextlib.ExitStack() as stack:
        for module in _equal_loops(model, loops, args, kwargs) if loops else ():
            stack.enter_context(own_attribute(module, "forward", _visiting_forward(module)))
        yield


def _loops_over_experts(kind: type[nn.Module]) -> bool:
    code = getattr(kind.forward, "__code__", None)
    return code is not None and set(code.co_names) >= _LOOP_CALLS


def _visiting_forward(module: nn.Module, tries_none: bool = False) -> Callable[..., Any]:
    original = module.forward
    count = getattr(module, "num_experts", None)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _VisitAll(count if isinstance(count, int) else None, tries_none):
            return original(*args, **kwargs)

    return forward


def _equal_loops(
    model: nn.Module, loops: list[nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[nn.Module]:
    """Return the modules whose forward gives the same as their own, for all calls that ``model`` makes of them.

    It also does where each expert is visited without tokens. A model without values, or a very large one, is not run.
    Then all are taken.
    """
    if not can_run(model, args, kwargs):
        return loops
    forwards = {m: _visiting_forward(m, tries_none=True) for m in loops}
    unequal = set[nn.Module]()

    def compare(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        with contextlib.suppress(Exception):  # a loop of another kind may raise anything
            if torch.equal(forwards[module](*given, **named), out):
                return
        unequal.add(module)

    copies = pytree.tree_map_only(Tensor, Tensor.clone, (args, dict(kwargs)))
    with contextlib.ExitStack() as stack:
        # In train mode, dropout would make any two calls differ.
        stack.enter_context(preserve_state(model, training=False))
        stack.enter_context(torch.no_grad())
        for module in loops:
            stack.callback(module.register_forward_hook(compare, with_kwargs=True).remove)
        with contextlib.suppress(Exception):  # torch.export tells what the model raises
            model(*copies[0], **copies[1])
    return [m for m in loops if m not in unequal]
