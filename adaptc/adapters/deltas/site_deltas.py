"""Measure the changes that adapters make to weights: inner products and singular values, from factors where they tell.

A change of low rank is never multiplied out. Of any other method the program computes the change, one weight at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptc.adapters.combining.adapter_sites import exact_changes
from adaptc.adapters.deltas.weight_deltas import AdapterDeltas
from adaptc.adapters.from_program import adapter_of_program, as_adapter_object, program_and_binding
from adaptc.binding.binding import Binding
from adaptc.errors import ConfigError
from adaptc.passes.protocol.parts.low_rank import LowRank
from adaptc.program.wrapper import unwrap
from adaptc.state.core import ProgramCore
from adaptc.state.graph_engine import graph_runner

#: a change as its factors, or as matrices (blocks, rows, columns)
Change = LowRank | Tensor


@dataclass(frozen=True, eq=False)
class SiteDelta:
    """The change of one weight: ``rank`` by the adapter's config, None without one, and ``read``, which returns it."""

    rank: int | None
    read: Callable[[], Change]


def site_deltas(adapter: Any) -> dict[str, SiteDelta]:
    """Return the changes of an adapter, with the scale that it was made with, by the prefix of the site's keys.

    ``adapter`` is a directory, an :class:`adaptc.Adapter`, a program or generator, or a result of ``bind``. Raises
    ConfigError where its tensors alone do not tell the changes and no program has it, and for methods that change no
    weights by matrices.
    """
    adapter = unwrap(adapter)
    if isinstance(adapter, ProgramCore) or graph_runner(adapter) is not None:
        return program_deltas(*program_and_binding(adapter))
    found = as_adapter_object(adapter)
    exact = exact_changes(found)
    if exact is None:
        raise ConfigError(
            f"{found.source}: what an adapter of {found.config.peft_type} changes does not follow from its tensors "
            "alone: give a program that has it, adaptc.compile(model, adapter)"
        )
    sites, changes, _ = exact
    return {key: SiteDelta(sites[key].method.sizes.rank(), lambda c=change: c) for key, change in changes.items()}


def program_deltas(program: ProgramCore, binding: Binding) -> dict[str, SiteDelta]:
    """Return the changes of one adapter of a program, as :func:`site_deltas` does."""
    adapter = adapter_of_program(program, binding)
    if (exact := exact_changes(adapter)) is not None:
        sites, changes, _ = exact
        return {key: SiteDelta(sites[key].method.sizes.rank(), lambda c=change: c) for key, change in changes.items()}
    deltas = AdapterDeltas(program.spec(), binding)
    found: dict[str, SiteDelta] = {}
    for fqn, attachments in deltas.sites.items():
        ranks = [r for a in attachments if (r := binding.methods[a.id].sizes.rank()) is not None]
        found[attachments[0].key] = SiteDelta(max(ranks, default=None), lambda f=fqn: deltas.delta_of(f).matrix)
    return found


@torch.no_grad()
def inner_product(one: Change, other: Change) -> float:
    """Return the sum of the products of the elements of two changes of one shape, in float64."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        ups = one.up.double().mT @ other.up.double()
        downs = one.down.double() @ other.down.double().mT
        return one.scale * other.scale * float((ups * downs).sum())
    if isinstance(one, LowRank):
        assert isinstance(other, Tensor)
        return one.scale * float(((one.up.double().mT @ other.double()) * one.down.double()).sum())
    if isinstance(other, LowRank):
        return inner_product(other, one)
    return sum(float(torch.dot(a.double(), b.double())) for a, b in zip(one.flatten(1), other.flatten(1), strict=True))


def shape_of(change: Change) -> tuple[int, ...]:
    """Return (blocks, rows, columns) of a change."""
    return change.shape if isinstance(change, LowRank) else tuple(change.shape)


@torch.no_grad()
def singular_values(change: Change) -> Tensor:
    """Return the singular values of all blocks of a change in float64, the largest first; of factors as many as their
    rank."""
    if isinstance(change, LowRank):
        upper = torch.linalg.qr(change.up.double(), mode="r").R
        lower = torch.linalg.qr(change.down.double().mT, mode="r").R
        found = torch.linalg.svdvals(upper @ lower.mT) * abs(change.scale)
    else:
        found = torch.linalg.svdvals(change.double())
    return found.flatten().sort(descending=True).values


def effective_rank(values: Tensor) -> float:
    """Return the effective rank of a matrix with these singular values: e to the entropy of their shares (Roy and
    Vetterli, 2007). It is the rank where all are equal, and 0 for a zero matrix."""
    positive = values[values > 0]
    shares = positive / positive.sum()
    return float((-(shares * shares.log()).sum()).exp()) if len(positive) else 0.0


def check_same_shape(site: str, changes: Mapping[str, Change]) -> None:
    """Raise ConfigError where the changes of a site, by the adapter's name, have different shapes."""
    shapes = {name: shape_of(c) for name, c in changes.items()}
    if len(set(shapes.values())) > 1:
        raise ConfigError(
            f"{site!r}: the adapters are for weights of different shapes (blocks, rows, columns): "
            + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        )
