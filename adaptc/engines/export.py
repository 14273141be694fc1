"""Rewrite an adapter so that an engine takes it as it is meant (``export_adapter``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adaptc.adapter_files.formats.detect import WRITERS
from adaptc.adapter_files.formats.writing import AdaptedModule, write_format_file
from adaptc.adapter_files.safetensors_reader import DTYPES
from adaptc.adapters.adapter import Adapter
from adaptc.adapters.combining.adapter_sites import AdapterSite
from adaptc.adapters.fit_report import FitReport
from adaptc.adapters.from_program import as_adapter_object
from adaptc.capture.model_files import read_model
from adaptc.engines.check import find_problems
from adaptc.engines.engine_table import ENGINES
from adaptc.engines.facts import AdapterFacts, TensorFacts
from adaptc.engines.fused_layers import Changes, with_layers_of, with_siblings
from adaptc.engines.limits import EngineLimits, check_engine_name
from adaptc.engines.model_layers import read_layer_sizes
from adaptc.engines.plain_lora import MERGE_HINT, as_plain_lora
from adaptc.engines.write_gguf import write_gguf
from adaptc.errors import ConfigError, short_repr
from adaptc.methods.lora_family.lora_config import LoraConfig
from adaptc.passes.protocol.parts.low_rank import LowRank
from adaptc.tables import Report, Table
from adaptc.value_types import validates_options

#: the way out of what an engine does not take
_WAY_OUT = f"Leave it out of the adapter, {MERGE_HINT}"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, repr=False)
class ExportReport(Report):
    """A report of an adapter that was written for an engine.

    ``path`` is what the engine loads. ``rank`` is that of all its modules, None where the adapter was written as it
    was. ``fit`` has the error of each weight.
    """

    ROWS = ("fit", "weights")

    engine: EngineLimits
    path: Path
    rank: int | None
    fit: FitReport | None

    def sections(self) -> list[str | Table]:
        head = f"for {self.engine.name} {self.engine.version}: " + (
            "as it is" if self.rank is None else f"LoRA of rank {self.rank} and scale 1"
        )
        return [head, *(self.fit.sections() if self.fit else [])]

    def values(self) -> dict[str, Any]:
        """Return a dict of ``engine``, ``version``, ``path``, ``rank``, and ``fit`` as :class:`FitReport` has it."""
        fit = None if self.fit is None else self.fit.values()
        named = {"engine": self.engine.name, "version": self.engine.version, "path": str(self.path)}
        return {**named, "rank": self.rank, "fit": fit}


@validates_options("rank", "component")
def export_adapter(
    adapter: Any,
    path: str | os.PathLike[str],
    *,
    engine: str,
    rank: int | None = None,
    max_error: float = 1e-3,
    model: Any = None,
    component: str | None = None,
) -> ExportReport:
    """Write an adapter so that a serving engine takes it as it is meant.

    The adapter becomes plain LoRA with one rank and a scale of 1, so that no engine can mistake it. LoRA's own options
    (rsLoRA, ``rank_pattern``, ``alpha_pattern``, BD-LoRA) are written out exactly: scales are folded into B, and ranks
    are filled up with zeros. With a model, other methods are cut to LoRA by singular values. PEFT takes every
    adapter, so for "peft" it is written as it is, unless ``rank`` is given.

    Args:
        adapter: a PEFT directory, an :class:`adaptc.Adapter`, a program, or a result of ``bind``.
        path: what to write: a directory, for "llama.cpp" a GGUF file, for "diffusers" either.
        engine: one of the names of :func:`check_adapter`.
        rank: the rank of all modules; None for the least that holds the adapter within ``max_error``.
        max_error: the largest relative error of a weight's change (Frobenius norm) that is written.
        model: the model's directory, or the model. Methods other than LoRA need it, and so do DoRA, QA-LoRA and PiSSA.
            "llama.cpp" needs the directory. An adapter of ``q_proj`` and the like for a model with ``qkv_proj``, or the
            reverse, gets the model's layers, exactly.
        component: for "diffusers", what is put in front of the keys, as for :func:`adaptc.save_adapter`.

    Returns:
        a report with the ``path``, the ``rank`` and the error of each weight.

    Raises:
        ConfigError: the engine is not known, no file that it takes can hold the adapter, or an error is too large. The
            message says which option or tensor it is, and the way out.
        CheckpointError: the adapter is damaged, or the path cannot be written.

    Example:
        >>> report = adaptc.engines.export_adapter(prog, "for-sglang", engine="sglang")
        >>> adaptc.engines.check_adapter(report.path, "sglang").verdict
        'as meant'
    """
    target = check_engine_name(engine, ENGINES)
    _check_options(target, rank, max_error, model, component)
    given = as_adapter_object(adapter)
    if target.name == "peft" and rank is None:
        return ExportReport(target, given.write(path), None, None)
    _check_tokens(given, target)
    regroup = _regrouper(given.source, target, model)
    plain, fit = as_plain_lora(_without_tokens(given), rank, target.max_rank, max_error, _model_reader(model), regroup)
    plain = _to_known_dtypes(_with_tokens_of(given, plain), target)
    _check_taken(plain, target, regroup is not None)
    assert isinstance(plain.config, LoraConfig)
    if target.name == "llama.cpp":
        written = write_gguf(plain, Path(path), model)
    elif target.name == "diffusers":
        written = _write_diffusers(plain, Path(path), component)
    else:
        written = plain.write(path)
    return ExportReport(target, written, plain.config.r, fit)


def _check_options(engine: EngineLimits, rank: int | None, max_error: float, model: Any, component: str | None) -> None:
    if rank is not None and rank < 1:
        raise ConfigError(f"rank={rank} must be at least 1")
    if isinstance(max_error, bool) or not isinstance(max_error, (int, float)) or not 0 <= max_error < 1:
        raise ConfigError(f"max_error={short_repr(max_error)} must be a number from 0 up to 1: a relative error")
    if rank is not None and engine.max_rank is not None and rank > engine.max_rank:
        raise ConfigError(f"rank={rank} is above {engine.max_rank}, the most that {engine.name} takes")
    if component is not None and engine.name != "diffusers":
        raise ConfigError(f"component={component!r} goes with diffusers, not with {engine.name}: leave it out")
    if engine.name == "llama.cpp" and not isinstance(model, (str, os.PathLike)):
        raise ConfigError(
            "llama.cpp's names of tensors depend on the model: give its directory with model= (--model), of which the "
            "config is read"
        )


def _model_reader(model: Any) -> Callable[[], Any] | None:
    if model is None:
        return None
    return partial(read_model, Path(model)) if isinstance(model, (str, os.PathLike)) else lambda: model


def _regrouper(
    source: str, engine: EngineLimits, model: Any
) -> Callable[[Mapping[str, AdapterSite], Mapping[str, LowRank]], Changes] | None:
    """Return what gives an adapter's changes the layers that the engine looks for; None where the model is not known,
    and where layers have other names."""
    layers = None if engine.name == "diffusers" else read_layer_sizes(model)
    if layers is None:
        return None

    def regroup(sites: Mapping[str, AdapterSite], changes: Mapping[str, LowRank]) -> Changes:
        found = (dict(sites), dict(changes)) if engine.takes_fused else with_layers_of(source, sites, changes, layers)
        return with_siblings(*found, engine.wanted_siblings, layers)

    return regroup


def _check_tokens(adapter: Adapter, engine: EngineLimits) -> None:
    """Raise ConfigError for aLoRA where the engine has none: it is no change of a weight, so that no merge helps."""
    if getattr(adapter.config, "alora_invocation_tokens", None) and "alora_invocation_tokens" in engine.limits:
        raise ConfigError(
            f"{adapter.source}: alora_invocation_tokens is set (aLoRA), which acts from a token on, and {engine.name} "
            f"{engine.version} has no such adapters: serve it with llama.cpp, or with adaptc serve"
        )


def _without_tokens(adapter: Adapter) -> Adapter:
    if getattr(adapter.config, "alora_invocation_tokens", None) is None:
        return adapter
    assert isinstance(adapter.config, LoraConfig)
    return Adapter(adapter.config.replace(alora_invocation_tokens=None), adapter.tensors, adapter.source)


def _with_tokens_of(given: Adapter, plain: Adapter) -> Adapter:
    tokens = getattr(given.config, "alora_invocation_tokens", None)
    if tokens is None:
        return plain
    assert isinstance(plain.config, LoraConfig)
    return Adapter(plain.config.replace(alora_invocation_tokens=tokens), plain.tensors, plain.source)


def _to_known_dtypes(adapter: Adapter, engine: EngineLimits) -> Adapter:
    """Return the adapter in float32 where the engine does not read its dtypes."""
    known = [t.dtype for t in adapter.tensors.values() if _DTYPE_NAMES[t.dtype] in engine.dtypes]
    if not engine.dtypes or len(known) == len(adapter.tensors):
        return adapter
    return Adapter(adapter.config, {k: t.to(torch.float32) for k, t in adapter.tensors.items()}, adapter.source)


def _check_taken(adapter: Adapter, engine: EngineLimits, knows_layers: bool) -> None:
    """Raise ConfigError for what is left of the adapter that the engine does not take as it is meant.

    ``knows_layers``: the sizes of the model's layers were known.
    """
    tensors: Mapping[str, TensorFacts] = {
        k: TensorFacts(tuple(t.shape), _DTYPE_NAMES[t.dtype]) for k, t in adapter.tensors.items()
    }
    facts = AdapterFacts(adapter.source, adapter.config.to_dict() | {"peft_type": "LORA"}, tensors, is_directory=False)
    if problems := find_problems(facts, engine):
        first = problems[0]
        can_fill = not knows_layers and " without " in first.trait
        way_out = "Give the model with model= (--model), of which the sizes are read" if can_fill else _WAY_OUT
        more = f" (and {len(problems) - 1} more: {', '.join(p.trait for p in problems[1:])})" if problems[1:] else ""
        raise ConfigError(
            f"{adapter.source} has {first.trait}, {first.found}, which no file for {engine.name} {engine.version} can "
            f"hold: {first.limit.why} ({first.limit.source}){more}. {way_out}"
        )


def _write_diffusers(adapter: Adapter, path: Path, component: str | None) -> Path:
    modules: dict[str, dict[str, Any]] = {}
    for key, value in adapter.tensors.items():
        module, _, name = key.partition(".lora_")
        modules.setdefault(module, {})[f"lora_{name}"] = value
    assert isinstance(adapter.config, LoraConfig)
    adapted = [AdaptedModule(m, tensors, 1.0, adapter.config.r) for m, tensors in modules.items()]
    writer = WRITERS["diffusers"]
    content = writer.file_content(adapted, component, adapter.config.non_default_fields(), [*modules])
    return write_format_file(writer.resolve_path(path), content)
