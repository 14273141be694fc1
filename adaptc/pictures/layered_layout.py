"""Lay out a small graph in layers from top to bottom, so that lines run down and cross little (Sugiyama's method).

A line that passes a layer has a place of its own there, so that it does not run behind a box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean

import networkx as nx

#: how often the layers are put in order and moved
_SWEEPS = 24
#: the width of a line's place, in inches
_LINE_WIDTH = 0.12


@dataclass(frozen=True)
class Layout:
    """The places of a graph: the middle and the layer of each node, the points of each line, and the whole width."""

    middles: Mapping[str, float]
    layers: Mapping[str, int]
    lines: Mapping[tuple[str, str], Sequence[tuple[int, float]]]
    width: float
    depth: int


def lay_out(inputs: Mapping[str, Sequence[str]], widths: Mapping[str, float], gap: float) -> Layout:
    """Return the places of nodes, whose inputs ``inputs`` names, and whose boxes are ``widths`` wide."""
    graph = nx.DiGraph()
    graph.add_nodes_from(inputs)
    graph.add_edges_from((i, name) for name, read in inputs.items() for i in read)
    layers = {n: i for i, group in enumerate(nx.topological_generations(graph)) for n in group}
    for name in reversed(list(nx.topological_sort(graph))):  # what has no inputs moves down to its reader
        readers = [layers[r] for r in graph.successors(name)]
        if readers and not inputs[name] and name != next(iter(inputs)):
            layers[name] = min(readers) - 1
    depth = max(layers.values()) + 1
    rows: list[list[str]] = [[n for n in inputs if layers[n] == i] for i in range(depth)]
    sizes, above, below, chains = dict(widths), {}, {}, {}
    for start, end in graph.edges:
        places = [f"{start}>{end}:{i}" for i in range(layers[start] + 1, layers[end])]
        for i, place in zip(range(layers[start] + 1, layers[end]), places, strict=True):
            rows[i].append(place)
            sizes[place] = _LINE_WIDTH
        chains[start, end] = chain = [start, *places, end]
        for a, b in pairwise(chain):
            below.setdefault(a, []).append(b)
            above.setdefault(b, []).append(a)
    middles = _place(rows, sizes, above, below, gap)
    least = min(middles[n] - sizes[n] / 2 for n in middles)
    middles = {n: x - least for n, x in middles.items()}
    width = max(middles[n] + sizes[n] / 2 for n in middles)
    row_of = {n: i for i, row in enumerate(rows) for n in row}
    lines = {edge: [(row_of[n], middles[n]) for n in chain] for edge, chain in chains.items()}
    return Layout({n: middles[n] for n in inputs}, layers, lines, width, depth)


def _place(
    rows: list[list[str]],
    sizes: Mapping[str, float],
    above: Mapping[str, Sequence[str]],
    below: Mapping[str, Sequence[str]],
    gap: float,
) -> dict[str, float]:
    """Return the middles: each near the mean of its neighbours, in the order that these means give."""
    middles: dict[str, float] = {}
    for row in rows:
        x = 0.0
        for name in row:
            middles[name] = x + sizes[name] / 2
            x += sizes[name] + gap
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        near = above if down else below
        for row in rows if down else reversed(rows):
            wanted = {n: mean(middles[m] for m in near[n]) if near.get(n) else middles[n] for n in row}
            row.sort(key=wanted.__getitem__)
            middles |= _spread(row, wanted, sizes, gap)
    return middles


def _spread(
    row: Sequence[str], wanted: Mapping[str, float], sizes: Mapping[str, float], gap: float
) -> dict[str, float]:
    """Return places in the order of ``row``, as near to those that are wanted as the widths allow.

    Neighbours that would overlap form a group, which stands where its members want it on average.
    """
    groups: list[tuple[list[str], list[float], float]] = []  # members, what each wants the group's start to be, width
    for name in row:
        members, starts, width = [name], [wanted[name] - sizes[name] / 2], sizes[name]
        while groups and mean(groups[-1][1]) + groups[-1][2] + gap > mean(starts):
            before, their_starts, their_width = groups.pop()
            starts = [*their_starts, *(s - their_width - gap for s in starts)]
            members, width = [*before, *members], their_width + gap + width
        groups.append((members, starts, width))
    out: dict[str, float] = {}
    for members, starts, _ in groups:
        x = mean(starts)
        for name in members:
            out[name] = x + sizes[name] / 2
            x += sizes[name] + gap
    return out
