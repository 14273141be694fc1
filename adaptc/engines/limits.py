"""State what an engine takes, as data: the limits of one engine, with the sources that say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from adaptc.errors import ConfigError, did_you_mean, short_repr

#: what becomes of an adapter in an engine, from good to bad
AS_MEANT, ANOTHER_MEANING, REFUSED = "as meant", "another meaning", "refused"


@dataclass(frozen=True)
class Limit:
    """An engine's ``verdict`` on a trait of adapters, ``why``, and the file of the engine that says so."""

    verdict: str
    why: str
    source: str


@dataclass(frozen=True)
class EngineLimits:
    """The limits of one engine.

    Attributes:
        name: the name that users give.
        version: the version whose sources were read.
        strength: the scale that the engine gives to B A: "PEFT", "alpha / r" by the config alone, "alpha / rank" by
            the tensors, or "1".
        strength_source: the file that says so.
        limits: trait -> limit. Traits that are not in the table are taken as they are meant.
        max_rank: the largest rank, None for any.
        saved_modules: the names of modules that the engine takes whole; of all others ``limits`` tells.
        dtypes: the dtypes of tensors, as safetensors calls them; none for any.
        takes_fused: whether it takes an adapter of the parts of a fused layer, and of a fused layer whose parts the
            model has. Others look for the names of the model's own layers.
        wanted_siblings: layer -> the one that must have an adapter beside it.
        takes_pointwise: whether convolutions with a kernel of one are within the limit for convolutions.
    """

    name: str
    version: str
    strength: str
    strength_source: str
    limits: Mapping[str, Limit]
    max_rank: int | None = None
    saved_modules: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    takes_pointwise: bool = False
    takes_fused: bool = False
    wanted_siblings: Mapping[str, str] = field(default_factory=dict[str, str])


def refused(why: str, source: str) -> Limit:
    return Limit(REFUSED, why, source)


def changed(why: str, source: str) -> Limit:
    return Limit(ANOTHER_MEANING, why, source)


def check_engine_name(name: object, engines: Mapping[str, EngineLimits]) -> EngineLimits:
    """Return the engine called ``name``. Raises ConfigError for any other name."""
    if not isinstance(name, str) or name not in engines:
        hint = did_you_mean(name, engines) if isinstance(name, str) else ""
        raise ConfigError(f"{short_repr(name)} is no engine whose limits are known: {', '.join(engines)}{hint}")
    return engines[name]
