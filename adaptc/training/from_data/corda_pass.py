"""Make the first values of CorDA: run the base on batches, sum up covariances, and decompose weights one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from adaptc.errors import AdaptcError, errors_name
from adaptc.methods.lora_family.from_data.corda import CordaConfig, Covariance, corda_factors, corda_terms
from adaptc.progress import Stage
from adaptc.training.from_data.base_runs import BaseRuns, Look, counted, look_at_inputs
from adaptc.training.from_data.data_sites import DataSite, SiteValues, inputs_by_site
from adaptc.training.from_data.statistics_files import has_statistics, read_statistics, write_statistics

_TERMS = ("S_WC", "U_WC", "V_WC")


@torch.no_grad()
def corda_values(
    make_runs: Callable[[], BaseRuns],
    sites: Sequence[DataSite],
    batches: Iterable[Any],
    options: CordaConfig,
    running: Stage,
) -> dict[str, SiteValues]:
    """Return the values of each site by attachment id. Raises AdaptcError that names a site."""
    if has_statistics(options.cache_file):
        assert options.cache_file is not None
        shapes: dict[str, Sequence[int]] = {}
        for s in sites:
            (out, inner), r = s.weight.shape, s.method.r
            shapes |= dict(zip(_keys(s), ((r,), (out, r), (inner, r)), strict=True))
        cached = read_statistics(options.cache_file, shapes)
        return {s.attachment.id: _values(s, *(cached[k] for k in _keys(s)), rows=0) for s in sites}
    covariances, rows = _covariances(make_runs, sites, batches, options, running)
    terms: dict[str, Tensor] = {}
    made: dict[str, SiteValues] = {}
    for s in sites:
        with errors_name(s.name):
            found = corda_terms(s.weight, covariances[s.name].to(s.weight.device), s.method.r, options.corda_method)
        made[s.attachment.id] = _values(s, *found, rows=rows[s.name])
        terms |= dict(zip(_keys(s), found, strict=True)) if options.cache_file is not None else {}
    if options.cache_file is not None:
        write_statistics(options.cache_file, terms)
    return made


def _keys(s: DataSite) -> list[str]:
    return [f"{s.name}.eigens.{term}" for term in _TERMS]


def _values(s: DataSite, S: Tensor, U: Tensor, V: Tensor, rows: int) -> SiteValues:
    A, B = corda_factors(S, U, V, s.method.scale(s.op))
    if not bool(A.isfinite().all() and B.isfinite().all()):
        raise AdaptcError(f"{s.name!r}: the first values are not finite")
    return SiteValues(s.method, A, B, rows)


def _covariances(
    make_runs: Callable[[], BaseRuns],
    sites: Sequence[DataSite],
    batches: Iterable[Any],
    options: CordaConfig,
    running: Stage,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the covariance of the input of each site by name, and of how many rows it is; sites with one input share
    one tensor."""
    path = options.covariance_file
    if has_statistics(path):
        assert path is not None
        found = read_statistics(path, {s.name: (s.weight.shape[1],) * 2 for s in sites})
        return found, dict.fromkeys(found, 0)
    runs = make_runs()
    nodes = inputs_by_site(runs, sites)
    sums: dict[tuple[fx.Node, ...], Covariance] = {}
    looks: dict[fx.Node, list[Look]] = {}
    for name, read in nodes.items():
        if read not in sums:
            sums[read] = Covariance(options.use_float16_for_covariance)
            for node in read:
                looks.setdefault(node, []).append(partial(_add, sums[read], name))
    for batch in counted(batches, running):
        look_at_inputs(runs, batch, looks)
    for s in sites:
        rows = sums[nodes[s.name]].rows
        if rows < s.method.r:
            raise AdaptcError(
                f"{s.name!r}: only {rows} rows of input reached it, too few for its rank {s.method.r}; give more data, "
                "or a lower rank"
            )
    means = {read: covariance.mean() for read, covariance in sums.items()}
    found = {name: means[read] for name, read in nodes.items()}
    if path is not None:
        write_statistics(path, found)
    return found, {name: sums[read].rows for name, read in nodes.items()}


def _add(covariance: Covariance, name: str, x: Tensor) -> None:
    with errors_name(name):
        covariance.add(x)
