"""Coefficients: values that regions read beside their slots, made once in a call for all sites of an adapter.

What an adapter adds at a site is often weighed token by token, by a value that is the same at every site. An example is
whether the invocation tokens have occurred. Such a value is a *coefficient*. A method names the coefficients it reads
(:meth:`~adaptc.passes.protocol.parts.extra_inputs.ExtraInputs.coefficients`) and finds them among its slots, under
these names. The program makes each of them once, in front of all layers (``passes.adapt.make_coefficients``).

Some coefficients follow from what the model itself computes in a call. Such a coefficient has a
:class:`DuplicatedPass`. The program then first runs a duplicated base pass to compute its last hidden state
(``passes.adapt.duplicate_base_pass``). The coefficient is made of that state.

Other values cannot be computed by a program, and a caller gives them with each call, such as the task of each row. A
method names these inputs, too (:meth:`~adaptc.passes.protocol.parts.extra_inputs.ExtraInputs.extras`). A method at a
layer finds them among its slots. The program takes them as keywords.

A function that makes a coefficient is pure, plain PyTorch and traced for all sizes at once. A size read from a slot's
free axis is read in every call, so that swaps change it. When a method is tried at one layer there is no program, and
the slots hold no coefficients. The method then acts as if its coefficient were one everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ExtraValues = Mapping[str, Tensor]


@dataclass(frozen=True)
class DuplicatedPass:
    """A duplicated base pass that runs before the program's own pass.

    ``hidden_size`` is the size of its last hidden state, (batch, length, width), which has no gradient. ``make`` None
    runs the base as it is. Otherwise ``make`` computes a coefficient for this pass from token ids and the same slots.
    The adapter then acts in the pass, weighed by it.
    """

    hidden_size: int
    make: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Coefficient:
    """A function that makes a coefficient: ``make(ids, *slots)`` is a tensor (batch, length) or (batch, length, any).

    ``ids`` are the token ids (batch, length) of a call. ``slots`` names slots that all sites share. With ``base_pass``
    the call is ``make(hidden, *slots)``, where ``hidden`` is the last hidden state of that pass. ``make_visible``,
    called with the same arguments, gives what a caller may ask to see.
    """

    make: Callable[..., Tensor]
    slots: tuple[str, ...] = ()
    base_pass: DuplicatedPass | None = None
    make_visible: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class ExtraInput:
    """An input that a method adds to a program: its dtype and its axes.

    Attributes:
        dtype: the dtype.
        axes: whether each axis is as long as the "batch" or the "length". At a layer it can only be the batch.
        place: the program value that a program must have to get the input; None for all programs.
        fill: the value where a caller leaves it out; with None the caller must give it.

    Example:
        >>> task_ids = adaptc.methods.ExtraInput(torch.int64)
    """

    dtype: torch.dtype
    axes: tuple[str, ...] = ("batch",)
    place: str | None = None
    fill: int | None = None


def along_tokens(c: Tensor, value: Tensor) -> Tensor:
    """Return ``c`` (batch, length) shaped to broadcast with ``value``.

    The first two axes of ``value`` are (batch, length), or its first axis is the two flattened.
    """
    if value.ndim <= c.ndim:
        c = c.flatten()
    for _ in range(value.ndim - c.ndim):
        c = c.unsqueeze(-1)
    return c
