"""Let a model be traced that asks whether any token is masked, or all are.

Models leave work out where a mask is trivial: ``if not mask.any(): mask = None``. A trace does not know the answer. The
branch for masks of any kind gives the same for a trivial one, in models that mean to save work. So it is traced for all
masks.

The model is first run with both answers where a mask is trivial: in the example, or where one of its inputs has the
same integer everywhere. A line of the model where the outputs differ is left as it is. So is one whose mask never was
trivial, since nothing shows what its other branch computes.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adaptc.capture.model_state import can_run, patch_forward, preserve_state
from adaptc.capture.replacements.calling_line import calling_line
from adaptc.passes.graph.pytree import pytree

#: a question to a whole mask -> the answer for masks that are not trivial
_GENERAL = {torch.any: True, Tensor.any: True, torch.all: False, Tensor.all: False}


class _Answers(TorchFunctionMode):
    """A mode that gives the general answer in the lines ``general``, and notes where other answers were given.

    Attributes:
        trivial: the lines where an answer was not the general one.
    """

    def __init__(self, general: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.general, self.trivial = general, set[str]()
        # By identity, and held, so that no other tensor gets the same.
        self.asked: dict[int, tuple[Tensor, bool]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__bool__ and id(args[0]) in self.asked:
            line, answer = calling_line(), self.asked[id(args[0])][1]
            if line in self.general:
                return answer
            given = func(*args)
            if given != answer:
                self.trivial.add(line)
            return given
        out = func(*args, **(kwargs or {}))
        if func in _GENERAL and len(args) == 1 and not kwargs:
            self.asked[id(out)] = out, _GENERAL[func]
        return out


@dataclass(frozen=True)
class OutputComparison:
    """The way to compare what a model gives in two runs.

    Attributes:
        collect: returns copies of the float tensors of an output, by name.
        is_close: returns whether two of them are equal but for rounding.
    """

    collect: Callable[[Any], dict[str, Tensor]]
    is_close: Callable[[Tensor, Tensor], bool]


@contextlib.contextmanager
def general_branches(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], comparison: OutputComparison
) -> Iterator[frozenset[str]]:
    """Run the block, which traces ``model``, with the branches for masks of any kind, where these are found equal.

    ``args`` and ``kwargs`` are example inputs. The block is given the lines of the model where that comes up.
    """
    lines = _equal_lines(model, args, kwargs, comparison)
    original, parameters = model.forward, inspect.signature(model.forward).parameters.values()

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Answers(lines):
            return original(*args, **kwargs)

    with patch_forward(model, forward, list(parameters)) if lines else contextlib.nullcontext():
        yield lines


def _equal_lines(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], comparison: OutputComparison
) -> frozenset[str]:
    """Return the lines whose general branch leaves the outputs as they are, wherever their mask was trivial."""
    if not can_run(model, args, kwargs):
        return frozenset()

    def run(answers: _Answers, inputs: tuple[Any, Any]) -> dict[str, Tensor]:
        copies = pytree.tree_map_only(Tensor, Tensor.clone, inputs)
        try:
            with answers:
                return comparison.collect(model(*copies[0], **copies[1]))
        finally:
            restore()

    equal, unequal = set[str](), set[str]()
    # Restoring the model restores the random state, so that dropout is the same in all runs.
    with preserve_state(model) as restore, torch.no_grad():
        for inputs in _with_trivial_masks(args, kwargs):
            asked = _Answers()
            try:
                wanted = run(asked, inputs)
            except Exception:  # the model does not take these inputs
                continue
            lines = frozenset(asked.trivial)
            with contextlib.suppress(Exception):  # a branch that is not meant for these inputs may raise anything
                found = run(_Answers(lines), inputs) if lines else {}
                if wanted.keys() == found.keys() and all(comparison.is_close(v, found[n]) for n, v in wanted.items()):
                    equal |= lines
                    continue
            unequal |= lines
    return frozenset(equal - unequal)


def _with_trivial_masks(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the inputs, and copies in which all entries of one integer tensor are its least or its largest."""
    yield args, dict(kwargs)
    flat, tree = pytree.tree_flatten((args, dict(kwargs)))
    for i, value in enumerate(flat):
        if isinstance(value, Tensor) and value.numel() and not (value.is_floating_point() or value.is_complex()):
            for entry in (value.min(), value.max()):
                changed = torch.full_like(value, entry.item())
                yield pytree.tree_unflatten([*flat[:i], changed, *flat[i + 1 :]], tree)
