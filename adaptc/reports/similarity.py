"""Report how alike the changes are that several adapters make to a model's weights: the cosines between them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from adaptc.adapters.deltas.site_deltas import SiteDelta, check_same_shape, inner_product, program_deltas, site_deltas
from adaptc.errors import ConfigError, short_repr
from adaptc.program.wrapper import unwrap
from adaptc.progress import stage
from adaptc.state.core import ProgramCore
from adaptc.tables import Column, Report, Table


@dataclass(frozen=True)
class SiteSimilarity:
    """The inner products of the adapters' changes at one site: (adapter, adapter) -> number, each pair once, in order.

    Adapters that do not have the site are left out.
    """

    site: str
    products: Mapping[tuple[str, str], float]

    def cosine(self, one: str, other: str) -> float | None:
        """Return the cosine of two changes; None where one of them is missing or zero."""
        return _cosine(self.products, one, other)


@dataclass(frozen=True, repr=False)
class SimilarityReport(Report):
    """A report of the cosines between the changes of ``adapters``, at each site and of all sites together.

    An adapter counts as zero at a site that it does not have.
    """

    ROWS = ("sites",)

    adapters: Sequence[str]
    sites: Sequence[SiteSimilarity]

    def cosine(self, one: str, other: str) -> float | None:
        """Return the cosine of the changes of all weights together; None where an adapter changes nothing."""
        names = [pair for s in self.sites for pair in s.products]
        totals = {pair: sum(s.products.get(pair, 0.0) for s in self.sites) for pair in dict.fromkeys(names)}
        return _cosine(totals, one, other)

    def matrix(self) -> list[list[float | None]]:
        """Return the cosine of each adapter with each."""
        return [[self.cosine(a, b) for b in self.adapters] for a in self.adapters]

    def sections(self) -> list[str | Table]:
        columns = [Column(name, right=True, no_wrap=True) for name in self.adapters]
        rows = [[a, *map(_format_cosine, row)] for a, row in zip(self.adapters, self.matrix(), strict=True)]
        head = f"cosines between the changes of {len(self.adapters)} adapters at {len(self.sites)} sites"
        return [head, Table(["", *columns], rows)]

    def values(self) -> dict[str, Any]:
        """Return ``adapters`` (names), ``cosine`` (a row for each) and ``sites``: ``site``, ``a``, ``b`` and ``cosine``
        for each pair at each site."""
        pairs = list(combinations(self.adapters, 2))
        sites = [{"site": s.site, "a": a, "b": b, "cosine": s.cosine(a, b)} for s in self.sites for a, b in pairs]
        return {"adapters": self.adapters, "cosine": self.matrix(), "sites": sites}


def _cosine(products: Mapping[tuple[str, str], float], one: str, other: str) -> float | None:
    product = products.get((one, other), products.get((other, one), 0.0))
    squares = [products.get((n, n), 0.0) for n in (one, other)]
    if not all(s > 0 for s in squares):
        return None
    return 1.0 if one == other else max(-1.0, min(1.0, product / (squares[0] * squares[1]) ** 0.5))


def _format_cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def compare_adapters(adapters: Any) -> SimilarityReport:
    """Return the cosines between the changes that several adapters make to the weights.

    1 means that two adapters change the weights in the same direction, 0 that their changes have nothing in common. It
    does not depend on their scales. LoRA's factors are not multiplied out, and other changes are computed one weight
    at a time.

    Args:
        adapters: name -> adapter, a sequence of adapters, which are called by their directories, or a program in which
            several adapters act together. An adapter is a PEFT directory, an :class:`adaptc.Adapter`, a program, or a
            result of ``bind``. Methods other than LoRA need one of the last two.

    Returns:
        a report with the cosine of each pair, of all weights together and of each; ``print`` shows it as a table.

    Raises:
        ConfigError: there are fewer than two adapters, two have one name, they are for weights of different shapes, or
            only a program tells what one changes.
        CheckpointError: an adapter is damaged.

    Example:
        >>> one, other = (adaptc.Adapter(*lora_weights(seed)) for seed in (0, 1))
        >>> report = adaptc.debug.compare_adapters({"one": one, "other": other, "both": one + other})
        >>> report.cosine("one", "one")
        1.0
    """
    deltas = {name: _deltas_of(adapter) for name, adapter in _by_name(adapters).items()}
    names = dict.fromkeys(site for found in deltas.values() for site in found)
    with stage(f"comparing {len(deltas)} adapters at {len(names)} weights") as running:
        sites = [_compare_site(s, {n: d[s] for n, d in deltas.items() if s in d}) for s in running.track(list(names))]
    return SimilarityReport(tuple(deltas), tuple(sites))


def _compare_site(site: str, deltas: Mapping[str, SiteDelta]) -> SiteSimilarity:
    """Return the products at one site, with two changes in memory at most that are no factors."""
    products: dict[tuple[str, str], float] = {}
    order = list(deltas)
    for i, a in enumerate(order):
        one = deltas[a].read()
        for b in order[i:]:
            other = one if a == b else deltas[b].read()
            check_same_shape(site, {a: one, b: other})
            products[a, b] = inner_product(one, other)
            del other
    return SiteSimilarity(site, products)


def _deltas_of(adapter: Any) -> dict[str, SiteDelta]:
    return program_deltas(*adapter) if isinstance(adapter, tuple) else site_deltas(adapter)


def _by_name(adapters: Any) -> dict[str, Any]:
    """Return the adapters by name; those of a program as (program, binding)."""
    program = unwrap(adapters)
    if isinstance(program, ProgramCore):
        found = {name: (program, part) for name, part in program.binding.adapters_by_name.items()}
    elif isinstance(adapters, Mapping):
        found = {str(name): adapter for name, adapter in adapters.items()}
    elif isinstance(adapters, Sequence) and not isinstance(adapters, str):
        named = [(_name_of(a, i), a) for i, a in enumerate(adapters)]
        found = dict(named)
        if len(found) < len(named):
            found = {str(a): a for a in adapters}
            if len(found) < len(named):
                raise ConfigError("two adapters have the same name: give a dict of names and adapters")
    else:
        raise ConfigError(
            f"adapters to compare are a dict of names and adapters, a list, or a program with several; got "
            f"{short_repr(adapters)}"
        )
    if len(found) < 2:
        raise ConfigError(f"there is nothing to compare {[*found]} with: give two adapters at least")
    return found


def _name_of(adapter: Any, number: int) -> str:
    if isinstance(adapter, (str, os.PathLike)):
        return Path(adapter).name
    return str(getattr(adapter, "source", "") or f"adapter {number}")
