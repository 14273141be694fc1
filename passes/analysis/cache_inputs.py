"""The cache among a program's inputs: what a step of generation goes on from.

A program that was captured as a step takes the keys and values of each layer, (batch, heads, length, width), under the
names that :func:`cache_name` gives; or states, numbered through. A program that computes its last hidden state in a
pass of its own first (``passes.adapt.first_pass``) has keys and values of that pass, too, whose names begin with
:data:`FIRST`. Before: an opened program. After: it is unchanged.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import fx
from torch.export.graph_signature import InputKind

from adaptc.passes.ir.lifted import Lifted

KINDS = ("keys", "values")
STATE = "state"
#: before the names of the cache of a first pass
FIRST = "first_"


def cache_name(kind: str, layer: int, prefix: str = "") -> str:
    """What the input is called that has the ``kind`` ("keys", "values") of a layer, or the state of a number."""
    return f"{prefix}{kind}_{layer}"


def cache_inputs(lifted: Lifted) -> list[tuple[fx.Node, fx.Node]]:
    """The keys and the values of each layer; empty for a program that takes none."""
    return list(_pairs(lifted))


def first_of_cache(lifted: Lifted) -> fx.Node | None:
    """The first input of the cache; None for a program that takes none."""
    names = (cache_name(kind, 0) for kind in (KINDS[0], STATE))
    return next((lifted.nodes[n] for n in names if _is_input(lifted, n)), None)


def passes_of(inputs: Collection[str]) -> int:
    """How many passes a step takes the cache of, by the names of its inputs."""
    return 2 if cache_name(KINDS[0], 0, FIRST) in inputs else 1


def _is_input(lifted: Lifted, name: str) -> bool:
    return name in lifted.specs and lifted.specs[name].kind == InputKind.USER_INPUT


def _pairs(lifted: Lifted) -> Iterator[tuple[fx.Node, fx.Node]]:
    layer = 0
    while True:
        names = [cache_name(kind, layer) for kind in KINDS]
        if not all(_is_input(lifted, n) for n in names):
            return
        yield lifted.nodes[names[0]], lifted.nodes[names[1]]
        layer += 1
