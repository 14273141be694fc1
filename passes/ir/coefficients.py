"""Coefficients: values that regions read beside their slots, made once in a call for all sites of an adapter.

What an adapter adds at a site is often weighed token by token, by something that is the same at every site: whether the
tokens that invoke it have come. Such a value is a *coefficient*. A method names the ones it reads
(:meth:`~adaptc.passes.ir.method_hooks.Hooks.coefficients`) and finds them among its slots, under these names; the
program makes each of them once, in front of all layers (``passes.adapt.make_coefficients``).

Some coefficients follow from what the model itself makes of a call. Such a one has a :class:`FirstPass`: the program
then computes its last hidden state in a pass of its own, in front of the one whose results it gives
(``passes.adapt.first_pass``), and the coefficient is made of that.

Other values are no program's to make, and a caller gives them with each call: which task each row is of. A method
names these inputs, too (:meth:`~adaptc.passes.ir.method_hooks.Hooks.extras`), and one at a layer finds them in the same
way; the program takes them as keywords.

A function that makes one is pure, plain PyTorch and traced for all sizes at once: a size read off a slot's free axis is
read in every call, so that swaps change it. Where there is no program, as where a method is tried at one layer, there
are no coefficients among the slots, and the method stands for itself with a coefficient of one everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Given = Mapping[str, Tensor]


@dataclass(frozen=True)
class FirstPass:
    """A pass of the base in front of the program's own: ``width`` is that of its last hidden state, (batch, length,
    width), which comes without a gradient. ``make``: None for the base as it is, or how a coefficient is made for this
    pass, of token ids and the same slots; the adapter then acts in it, weighed by that."""

    width: int
    make: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Coefficient:
    """``make(ids, *slots)`` of the token ids (batch, length) that a call gives, and of slots that all sites share, by
    name: a tensor (batch, length), or (batch, length, any). With ``first`` it is ``make(hidden, *slots)``, of the last
    hidden state of that pass; ``shown`` of the same gives what a caller may ask to see of it."""

    make: Callable[..., Tensor]
    slots: tuple[str, ...] = ()
    first: FirstPass | None = None
    shown: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Extra:
    """An input that a method adds to a program: its dtype, and of what its axes are as long ("batch", "length"; at a
    layer the batch alone). ``place``: only programs that have this one get it. ``fill``: what it is everywhere where a
    caller leaves it out."""

    dtype: torch.dtype
    axes: tuple[str, ...] = ("batch",)
    place: str | None = None
    fill: int | None = None


def along_tokens(c: Tensor, value: Tensor) -> Tensor:
    """``c`` (batch, length) in a form that broadcasts with ``value``, whose tokens lie along its first two axes, or
    along its first one, row after row."""
    if value.ndim <= c.ndim:
        c = c.flatten()
    for _ in range(value.ndim - c.ndim):
        c = c.unsqueeze(-1)
    return c
