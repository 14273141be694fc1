"""Make the first values of EVA: run the base on batches until components are found, and distribute the ranks.

As in PEFT, batches are gone through again and again, and an input that is found is not looked at until ranks change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from adaptc.errors import AdaptcError, ConfigError, errors_name
from adaptc.methods.lora_family.from_data.eva import EvaConfig, InputComponents, distribute_ranks
from adaptc.progress import Stage
from adaptc.training.from_data.base_runs import BaseRuns, counted, look_at_inputs, mask_of, rows_of
from adaptc.training.from_data.data_sites import DataSite, SiteValues, inputs_by_site
from adaptc.training.from_data.statistics_files import PEFT_PREFIX, has_statistics, read_statistics, write_statistics

#: how often the batches are gone through at most
MAX_PASSES = 100


@torch.no_grad()
def eva_values(
    make_runs: Callable[[], BaseRuns],
    sites: Sequence[DataSite],
    batches: Iterable[Any],
    options: EvaConfig,
    running: Stage,
    cache_file: str | None = None,
) -> dict[str, SiteValues]:
    """Return the values of each site by attachment id. Raises AdaptcError that names a site."""
    if cache_file is not None and has_statistics(cache_file):
        rows = read_statistics(cache_file, {s.name: (None, s.weight.shape[1]) for s in sites})
        return {s.attachment.id: _values(s, rows[s.name], options) for s in sites}
    search = _Search(make_runs(), sites, options)
    search.run(batches, running)
    made: dict[str, SiteValues] = {}
    found: dict[str, Tensor] = {}
    for s in sites:
        rank, inputs = search.ranks[s.name], search.components[search.first[s.name]]
        found[f"{PEFT_PREFIX}{s.name}"] = rows_of_a = inputs.first_rows(rank, options.whiten)
        made[s.attachment.id] = dataclasses.replace(
            _values(s, rows_of_a, options), rows=inputs.rows, explained=float(inputs.ratios[:rank].sum())
        )
    if cache_file is not None:
        write_statistics(cache_file, found)
    return made


def _values(s: DataSite, A: Tensor, options: EvaConfig) -> SiteValues:
    rank, method = A.shape[0], s.method
    alpha = method.alpha
    if options.adjust_scaling_factors and rank != method.r:
        alpha = alpha * (rank / method.r)
    new = dataclasses.replace(method, r=rank, alpha=alpha) if rank else None
    return SiteValues(new, A, A.new_zeros(s.weight.shape[0], rank))


class _Search:
    """The search for the components of all inputs.

    ``first``: site -> the first site that reads the same input, whose name stands for the input in ``components``.
    ``ranks``: site -> its rank by now.
    """

    def __init__(self, runs: BaseRuns, sites: Sequence[DataSite], options: EvaConfig) -> None:
        self._runs, self._options = runs, options
        self._nodes = inputs_by_site(runs, sites)
        firsts: dict[tuple[fx.Node, ...], str] = {}
        self.first = {name: firsts.setdefault(read, name) for name, read in self._nodes.items()}
        self._budget = sum(s.method.r for s in sites)
        own = {s.name: round(s.method.r * options.rho) for s in sites}
        most: dict[str, int] = {}
        for name, n in own.items():
            most[self.first[name]] = max(n, most.get(self.first[name], 0))
        self._most = {name: most[self.first[name]] for name in own}
        for s in sites:
            if self._most[s.name] > s.weight.shape[1]:
                raise ConfigError(
                    f"{s.name!r}: rho={options.rho:g} allows it a rank of {self._most[s.name]}, and its input has only "
                    f"{s.weight.shape[1]} features; choose a lower rho or r"
                )
        self.components = {name: InputComponents(n, options.tau) for name, n in most.items()}
        self.ranks = dict(self._most)

    def run(self, batches: Iterable[Any], running: Stage) -> None:
        """Go through the batches until all components that ranks need are found."""
        found = dict.fromkeys(self.components, False)
        for batch in self._cycle(batches, running):
            for name, inputs in self.components.items():
                found[name] = bool(inputs.found[: self.ranks[name]].all()) and inputs.components is not None
            if all(found.values()):
                return
            mask = mask_of(batch, self._options.label_mask_value if self._options.use_label_mask else None)
            looks: dict[fx.Node, list[Callable[[Tensor], None]]] = {}
            for name in (n for n, is_found in found.items() if not is_found):
                for node in self._nodes[name]:
                    looks.setdefault(node, []).append(partial(self._add, name, mask))
            look_at_inputs(self._runs, batch, looks)
            if all(c.components is not None for c in self.components.values()):
                self._distribute()

    def _cycle(self, batches: Iterable[Any], running: Stage) -> Iterator[Any]:
        for _ in range(MAX_PASSES):
            yield from counted(batches, running)
            self._check_enough_rows()
            if iter(batches) is batches:
                raise self._unfound_error("batches can be read only once: give a list or a DataLoader")
        raise self._unfound_error("give more data, or a lower tau or rho")

    def _check_enough_rows(self) -> None:
        for name, inputs in self.components.items():
            if inputs.components is None:
                raise AdaptcError(
                    f"{name!r}: no batch gave it more than {inputs.most_rows} rows of input, too few for "
                    f"{inputs.count} components; give larger batches, or a lower rank or rho"
                )

    def _unfound_error(self, remedy: str) -> AdaptcError:
        name = next(n for n, c in self.components.items() if not bool(c.found[: self.ranks[n]].all()))
        return AdaptcError(f"{name!r}: its components still change by more than tau={self._options.tau:g}; {remedy}")

    def _add(self, name: str, mask: Tensor | None, x: Tensor) -> None:
        with errors_name(name):
            rows = rows_of(x, mask)
            if not bool(rows.isfinite().all()):
                raise AdaptcError("its input has NaN or infinite values")
            self.components[name].add(rows)

    def _distribute(self) -> None:
        readers: Mapping[str, list[str]] = {
            name: [n for n, first in self.first.items() if first == name and n != name] for name in self.components
        }
        ratios = {name: inputs.ratios for name, inputs in self.components.items()}
        self.ranks = distribute_ranks(ratios, readers, self._most, self._budget)
