"""Find the cache among a program's inputs, from which a step of generation continues.

A program captured as a step takes the keys and values of each layer, (batch, heads, length, width), under the names
that :func:`cache_input_name` gives. Recurrent models take states, numbered through, and hybrid ones take both.

A program may contain duplicated base passes (``passes.adapt.duplicate_base_pass``). It then takes a cache for each of
them, too, under names that begin with :func:`pass_prefix`. The functions here take an opened program and do not change
it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import count, takewhile

from torch import fx
from torch.export.graph_signature import InputKind

from adaptc.passes.graph.lifted import LiftedProgram

KV_KINDS = ("keys", "values")
STATE = "state"


def cache_input_name(kind: str, layer: int, prefix: str = "") -> str:
    """Return the name of a cache input: ``kind`` is "keys", "values" or "state", ``layer`` its number."""
    return f"{prefix}{kind}_{layer}"


def find_kv_inputs(lifted: LiftedProgram) -> list[tuple[fx.Node, fx.Node]]:
    """Return the keys and the values of each layer; empty for a program that takes none, or states besides."""
    return [] if _state_inputs(lifted) else list(_kv_pairs(lifted))


def all_cache_inputs(lifted: LiftedProgram) -> list[fx.Node]:
    """Return all cache inputs of the program's own pass: keys and values by turns, and then states."""
    return [node for pair in _kv_pairs(lifted) for node in pair] + _state_inputs(lifted)


def _state_inputs(lifted: LiftedProgram) -> list[fx.Node]:
    names = takewhile(lambda name: _is_input(lifted, name), (cache_input_name(STATE, i) for i in count()))
    return [lifted.nodes[name] for name in names]


def first_cache_input(lifted: LiftedProgram) -> fx.Node | None:
    """Return the first input of the cache; None for a program that takes none."""
    names = (cache_input_name(kind, 0) for kind in (KV_KINDS[0], STATE))
    return next((lifted.nodes[n] for n in names if _is_input(lifted, n)), None)


def pass_prefix(number: int) -> str:
    """Return what the names of a pass's cache inputs begin with.

    The program's own pass is number 0. Duplicated base passes follow in the order in which they were added.
    """
    return "" if number == 0 else "first_" if number == 1 else f"first{number}_"


def count_passes(inputs: Collection[str]) -> int:
    """Return the number of passes whose caches are among ``inputs``, the program's own included; 1 without a cache."""
    firsts = ([cache_input_name(kind, 0, pass_prefix(i)) for kind in (KV_KINDS[0], STATE)] for i in count(1))
    return 1 + sum(1 for _ in takewhile(lambda names: any(n in inputs for n in names), firsts))


def _is_input(lifted: LiftedProgram, name: str) -> bool:
    return name in lifted.input_specs and lifted.input_specs[name].kind == InputKind.USER_INPUT


def _kv_pairs(lifted: LiftedProgram) -> Iterator[tuple[fx.Node, fx.Node]]:
    layer = 0
    while True:
        names = [cache_input_name(kind, layer) for kind in KV_KINDS]
        if not all(_is_input(lifted, n) for n in names):
            return
        yield lifted.nodes[names[0]], lifted.nodes[names[1]]
        layer += 1
