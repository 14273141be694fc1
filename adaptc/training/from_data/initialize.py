"""Make first values of LoRA of data, in a program that was compiled for it: CorDA, EVA and LoRA-GA.

Everything is computed before the program changes, so an error changes nothing. The new values are a binding like any
other. Where the scheme takes a part out of base weights, the binding has the rest, and the program keeps the original.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.builder import BindingBuilder
from adaptc.errors import AdaptcError, ConfigError, short_repr
from adaptc.methods.lora_family.from_data.corda import CordaConfig
from adaptc.methods.lora_family.from_data.eva import EvaConfig
from adaptc.methods.lora_family.from_data.lora_ga import LoraGAConfig
from adaptc.methods.lora_family.lora_config import LoraConfig
from adaptc.patterns import pattern_value
from adaptc.progress import stage
from adaptc.state.core import ProgramCore
from adaptc.tables import Column, Report, Table
from adaptc.training.from_data.base_runs import BaseRuns
from adaptc.training.from_data.corda_pass import corda_values
from adaptc.training.from_data.data_sites import DataSite, SiteValues, data_config, find_data_sites
from adaptc.training.from_data.eva_pass import eva_values
from adaptc.training.from_data.lora_ga_pass import lora_ga_values


@dataclass(frozen=True)
class DataFit:
    """The values that a site got: its ``rank``, which the config gave as ``asked``, and its ``alpha``.

    ``rows``: how many rows of input it was made of, 0 where a file had the statistics or gradients were used.
    ``explained``: the part of the variance of its input that the rank explains; None where it is not known.
    """

    site: str
    rank: int
    asked: int
    alpha: float
    rows: int
    explained: float | None


@dataclass(frozen=True, repr=False)
class DataReport(Report):
    """A report of first values that were made of data, with one :class:`DataFit` for each site."""

    ROWS = ("sites",)

    scheme: str
    sites: Sequence[DataFit]

    def sections(self) -> list[str | Table]:
        ranks = sum(s.rank for s in self.sites)
        none = sum(not s.rank for s in self.sites)
        head = f"first values by {self.scheme!r} at {len(self.sites)} sites, ranks {ranks} in all"
        numbers = [Column(n, right=True, no_wrap=True) for n in ("rank", "asked for", "alpha", "rows", "explained")]
        rows = [
            (
                *(s.site, s.rank, s.asked, f"{s.alpha:g}", s.rows or "-"),
                "-" if s.explained is None else f"{100 * s.explained:.1f}%",
            )
            for s in self.sites
        ]
        return [head + (f"; {none} got none" if none else ""), Table(["site", *numbers], rows)]

    def values(self) -> dict[str, Any]:
        return {"scheme": self.scheme, "sites": [vars(s) for s in self.sites]}


def initialize_from_data(
    program: Any,
    batches: Iterable[Any] = (),
    *,
    loss: Callable[[Any], Tensor] | None = None,
    cache_file: str | os.PathLike[str] | None = None,
    generator: torch.Generator | None = None,
) -> DataReport:
    """Make the first values of a LoRA adapter of data, by the scheme that its config names, and return a report.

    The base runs on the batches, without the adapter. "corda" (arXiv 2406.05223) and "eva" (2410.07170) look at the
    inputs of the adapted linear layers, "lora_ga" (2407.05000) at the gradients of their weights. The values are
    PEFT's, from ``preprocess_corda``, ``initialize_lora_eva_weights`` and ``preprocess_loraga``. The program's current
    adapter is replaced. Call this before :meth:`AdaptedProgram.module`, whose earlier modules keep their values.

    CorDA and LoRA-GA take a part out of base weights. Unloading and swapping are exact still. A file of such an adapter
    has A and B alone, and reading it into another program is refused. ``adaptc.convert_to_lora(program, rank=2 * r)``
    makes an adapter for the base as it was. EVA gives each layer a rank of its own, and the config says so as PEFT's.

    Args:
        program: a program that was compiled with ``LoraConfig(init_lora_weights="corda")``, "eva" or "lora_ga".
        batches: dicts of the model's inputs, tuples of them, or single tensors. EVA reads them several times, leaves
            out the padding of an ``attention_mask``, and may leave out tokens by ``labels``. For CorDA each row of a
            batch is a sample, and padding counts, as in PEFT. Not needed where a file has the statistics.
        loss: for LoRA-GA, what returns a scalar for the outputs. None takes the ``loss`` of the outputs.
        cache_file: a file of PEFT's form, which is read where it exists and written otherwise. For CorDA it is that of
            ``corda_config.cache_file``, for EVA PEFT's ``eva_state_dict``, for LoRA-GA the gradients.
        generator: what LoRA-GA draws from; None for torch's global generator, as in PEFT.

    Returns:
        a report of the rank and alpha of each site; ``print`` shows it as a table.

    Raises:
        ConfigError: the config takes no data, or a site's weight cannot be changed.
        CheckpointError: a file of statistics is damaged or of another model.
        AdaptcError: there is no batch, or the data is not finite, too little, or does not reach a site, which is named.
            The program is unchanged.

    Example:
        >>> config = adaptc.LoraConfig(r=2, target_modules=["0"], init_lora_weights="corda")
        >>> adapted = adaptc.compile(model, config, example_inputs=x, training=True)
        >>> report = adaptc.methods.initialize_from_data(adapted, [x + 1, x - 1])
        >>> report.sites[0].rank
        2
    """
    inside = program.program if hasattr(program, "with_program") else program  # of a generator, its step
    if not isinstance(inside, ProgramCore):
        raise AdaptcError(
            f"initialize_from_data takes a program that adaptc.compile gave, not a {type(program).__name__}; make "
            "modules of it afterwards"
        )
    if not isinstance(batches, Iterable) or isinstance(batches, (Mapping, Tensor)):
        raise ConfigError(f"batches must be an iterable of batches, such as a list, got {short_repr(batches)}")
    binding, config, options = data_config(inside)
    spec = inside.spec(any(t.requires_grad for t in binding.values.values()))
    sites = find_data_sites(inside, spec, binding, config)
    path = None if cache_file is None else os.fspath(cache_file)
    verbose = isinstance(options, CordaConfig) and options.verbose
    if loss is not None and not isinstance(options, LoraGAConfig):
        raise ConfigError(f"loss= is for 'lora_ga': {options.scheme!r} looks at inputs of layers alone")

    title = f"making first values by {options.scheme!r} at {len(sites)} sites"
    # The values are kept, and training needs them: tensors of inference mode would be of no use.
    with torch.inference_mode(False), torch.no_grad(), stage(title, always=verbose) as running:
        if isinstance(options, CordaConfig):
            own = options if path is None else replace(options, cache_file=path)
            values = corda_values(lambda: BaseRuns(inside), sites, batches, own, running)
        elif isinstance(options, EvaConfig):
            values = eva_values(lambda: BaseRuns(inside), sites, batches, options, running, path)
            config = _with_ranks_and_alphas(config, sites, values)
        else:
            assert isinstance(options, LoraGAConfig)
            values = lora_ga_values(
                lambda: BaseRuns(inside, training=True), sites, batches, options, running, loss, path, generator
            )
        new = _bind_values(spec, binding, config, sites, values)
    inside.install(new)
    return DataReport(options.scheme, [_fit_of(s, values[s.attachment.id]) for s in sites])


def _fit_of(s: DataSite, values: SiteValues) -> DataFit:
    method = values.method
    rank, alpha = (0, 0.0) if method is None else (method.r, method.alpha)
    return DataFit(s.name, rank, s.method.r, alpha, values.rows, values.explained)


def _bind_values(
    spec: BindingSpec,
    binding: Binding,
    config: LoraConfig,
    sites: Sequence[DataSite],
    values: Mapping[str, SiteValues],
) -> Binding:
    """Return a binding with these values, and all else as in ``binding``."""
    by_id = {s.attachment.id: s for s in sites}
    methods = {
        i: new if i in by_id else m
        for i, m in binding.methods.items()
        if (new := values[i].method if i in by_id else m) is not None
    }
    builder = BindingBuilder(spec, config)
    builder.find_shared_slots(methods)
    for a in spec.attachments:
        if a.id not in methods:
            continue
        method = methods[a.id]
        if a.id not in by_id:
            slots = {
                n: binding.values[a.slots.get(n) or a.slot_fqn(n, s)] for n, s in a.method.slots(spec.ops[a.id]).items()
            }
            builder.add_site(a, method, slots, None)
            continue
        found, site = values[a.id], by_id[a.id]
        first = found.method.init_from(site.op, site.weight, found.A, found.B, spec.adapter_dtype(a))  # type: ignore[union-attr]
        builder.add_site(a, method, first.slots, first.base)
    builder.fill_absent_sites(methods)
    builder.extra_tensors = dict(binding.extra_tensors)
    return builder.build("first values from data")


def _with_ranks_and_alphas(
    config: LoraConfig, sites: Sequence[DataSite], values: Mapping[str, SiteValues]
) -> LoraConfig:
    """Return ``config`` with the ranks and alphas that sites got, as PEFT writes them: by the names of modules.

    Sites without a rank leave ``target_modules``.
    """
    kept = {s.name: m for s in sites if (m := values[s.attachment.id].method) is not None}
    if not kept:
        raise AdaptcError("no site got a rank: the inputs of all sites are constant")
    new = copy.copy(config)
    new.rank_pattern = _pattern({n: m.r for n, m in kept.items()}, config.r)
    new.alpha_pattern = _pattern({n: m.alpha for n, m in kept.items()}, config.lora_alpha)
    if len(kept) < len(sites):
        new.target_modules = sorted(kept)
    return new


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return name -> value for all values but the default.

    A name that ends in another one's comes first, and has an entry where that one would give it another value.
    """
    pattern = {n: v for n, v in sorted(values.items(), key=lambda item: -len(item[0])) if v != default}
    missing = {n: v for n, v in values.items() if n not in pattern and pattern_value(pattern, n, default) != v}
    return {**missing, **pattern}
