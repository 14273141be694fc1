"""Tell whether an engine takes an adapter as it is meant (``check_adapter``), with a report that says why not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

from adaptc.adapter_files.format import MODEL_CONFIG_NAME
from adaptc.adapter_files.stable_read import OpenedFile, read_json_object, retry_while_changing
from adaptc.engines.engine_table import ENGINES
from adaptc.engines.facts import AdapterFacts, read_facts
from adaptc.engines.gguf_families import FAMILIES
from adaptc.engines.limits import ANOTHER_MEANING, AS_MEANT, REFUSED, EngineLimits, Limit, check_engine_name
from adaptc.engines.traits import find_traits
from adaptc.errors import CheckpointError, ConfigError, listing
from adaptc.patterns import limit_pattern_time
from adaptc.tables import Column, Report, Table, shorten_paths

#: the trait of a scale that the engine does not give to B A
STRENGTH = "strength"


@dataclass(frozen=True)
class Finding:
    """A trait of an adapter that an engine does not take as it is meant, with the engine's limit for it."""

    trait: str
    found: str
    limit: Limit


@dataclass(frozen=True, repr=False)
class EngineReport(Report):
    """A report on how ``engine`` takes the adapter ``source``."""

    ROWS = ("findings",)

    source: str
    engine: EngineLimits
    findings: Sequence[Finding]

    @property
    def verdict(self) -> str:
        """Return "as meant", "another meaning" or "refused"."""
        verdicts = [f.limit.verdict for f in self.findings]
        return next((v for v in (REFUSED, ANOTHER_MEANING) if v in verdicts), AS_MEANT)

    @property
    def is_as_meant(self) -> bool:
        return not self.findings

    def sections(self) -> list[str | Table]:
        outcome = {
            AS_MEANT: "takes it as it is meant",
            ANOTHER_MEANING: "takes it with another meaning",
            REFUSED: "refuses it",
        }[self.verdict]
        head = f"{self.source}: {self.engine.name} {self.engine.version} {outcome}"
        rows = [(f.limit.verdict, f.trait, f.found, f.limit.why, f.limit.source) for f in self.findings]
        way_out = (
            f"adaptc convert {self.source} OUT --for {self.engine.name} writes one that it takes, or says what to do"
        )
        columns = [Column("verdict", no_wrap=True), "what", "found", "why", "by the engine's source"]
        return [head, Table(columns, rows), way_out if self.findings and self.engine.name != "peft" else ""]

    def values(self) -> dict[str, Any]:
        """Return a dict of ``source``, ``engine``, ``version``, ``verdict``, and ``findings``, a list of dicts."""
        return {
            "source": self.source,
            "engine": self.engine.name,
            "version": self.engine.version,
            "verdict": self.verdict,
            "findings": [{"what": f.trait, "found": f.found, **vars(f.limit)} for f in self.findings],
        }


def check_adapter(
    path: str | os.PathLike[str], engine: str, *, model: str | os.PathLike[str] | None = None
) -> EngineReport:
    """Tell whether a serving engine takes an adapter as it is meant.

    The config and the header of the tensors are read, and no values. Limits are those of the version of the engine that
    the report names.

    Args:
        path: a PEFT directory with safetensors.
        engine: "vllm", "sglang", "llama.cpp", "openvino", "onnxruntime-genai", "diffusers" or "peft".
        model: the directory of the model, for "llama.cpp" alone: whether adapters of its family can be written.

    Returns:
        a report. Its ``verdict`` is "as meant", "another meaning" or "refused", and its ``findings`` say why.

    Raises:
        CheckpointError: there is no adapter, or it is damaged.
        ConfigError: the engine is not known, or ``model`` goes with another one.

    Example:
        >>> path = adaptc.save_adapter(prog, "my-adapter")
        >>> adaptc.engines.check_adapter(path, "vllm").verdict
        'as meant'
    """
    found = check_engine_name(engine, ENGINES)
    if model is not None and found.name != "llama.cpp":
        raise ConfigError(f"model= goes with llama.cpp, whose names of tensors depend on it, not with {found.name}")
    findings = find_problems(read_facts(path), found)
    if model is not None and (kind := read_model_type(model)) not in FAMILIES:
        why = f"adapters are written for {', '.join(FAMILIES)}"
        findings.append(Finding("model", f"model_type={kind!r}", Limit(REFUSED, why, "adaptc")))
    return EngineReport(os.fspath(path), found, findings)


def find_problems(facts: AdapterFacts, engine: EngineLimits) -> list[Finding]:
    """Return what an engine does not take as it is meant, the worst first."""
    with limit_pattern_time():
        traits = find_traits(facts, engine)
        found = [Finding(t, where, engine.limits[t]) for t, where in traits.items() if t in engine.limits]
        if facts.method == "LORA" and (text := _other_strengths(facts, engine)):
            found.append(Finding(STRENGTH, text, Limit(ANOTHER_MEANING, _why(engine), engine.strength_source)))
    return sorted(found, key=lambda f: f.limit.verdict != REFUSED)


def read_model_type(model: str | os.PathLike[str]) -> str:
    """Return ``model_type`` of a model directory's config. Raises CheckpointError where it has none."""
    return str(read_model_config(model)["model_type"])


def read_model_config(model: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the config of a model directory, which names its type. Raises CheckpointError where it has none."""
    file = Path(model) / MODEL_CONFIG_NAME

    def read() -> dict[str, Any]:
        with OpenedFile(file) as opened:
            return read_json_object(opened)

    config = retry_while_changing(read)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{file} names no model_type; expected the config of a transformers model")
    return config


def _why(engine: EngineLimits) -> str:
    return {
        "alpha / r": "the scale is lora_alpha / r of the config for every module",
        "alpha / rank": "the scale is lora_alpha by the rank of the tensors for every module",
        "1": "B A is added as it is",
    }[engine.strength]


def _other_strengths(facts: AdapterFacts, engine: EngineLimits) -> str:
    """Return in words the modules whose B A gets another scale than it was trained with; '' for none."""
    if engine.strength == "PEFT" or facts.config.get("arrow_config"):
        return ""
    alpha = facts.alpha()
    modules: dict[tuple[float, float], list[str]] = {}
    for module, pair in facts.pairs().items():
        meant = facts.scale_of(module)
        if engine.strength == "alpha / r":
            given = facts.default_scale()
        else:
            # llama.cpp takes a zero for a file without alpha.
            given = alpha / pair.rank if engine.strength == "alpha / rank" and alpha else 1.0
        if not isclose(meant, given, rel_tol=1e-6):
            modules.setdefault((meant, given), []).append(module)
    texts = [f"{m:.4g} is meant and {g:.4g} given at {shorten_paths(names, 2)}" for (m, g), names in modules.items()]
    return listing(texts, 3)
