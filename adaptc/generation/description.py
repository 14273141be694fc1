"""Write the facts of a step program as JSON, which is saved beside the program, and read them again."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from adaptc.capture.model_files import why_no_tokenizer
from adaptc.errors import CheckpointError, ConfigError
from adaptc.errors import shown as shown_value
from adaptc.generation.cache.cache_layout import KINDS, CacheLayout, LayerLayout, State, StateLayout
from adaptc.generation.seq2seq.seq2seq_spec import CROSS, Seq2SeqSpec
from adaptc.generation.spec import KEEPS, NOTHING, ROOM, STATE, WINDOW, GenerationSpec
from adaptc.packages.manifest import Contents, can_carry
from adaptc.passes.analysis.cache_inputs import passes_of
from adaptc.safe_pt2.json_schema import Length, Maybe, Option, check
from adaptc.safe_pt2.names import loads
from adaptc.safe_pt2.refusal import UnsafeFile, reason, shown

NAME = "adaptc.generation.json"
FORMAT = 1

_LAYERS = [{"heads": Length, "key_dim": Length, "value_dim": Length, "sliding": Maybe(Length)}]
#: the form of what is stored of a model with an encoder
_ACROSS: dict[str, Any] = {
    "main": str,
    "features": Maybe([Length]),
    "source": Maybe(Length),
    "layers": _LAYERS,
    "dtype": str,
    "hidden": Length,
    "strides": [Length],
}
_FORM: dict[str, Any] = {
    "format": Length,
    "config": dict,
    "generation_config": dict,
    "layers": _LAYERS,
    "across": Option(_ACROSS),
    "dtype": str,
    "max_batch": Length,
    "max_length": Length,
    "positions": bool,
    "embeds": bool,
    "vocabulary": Length,
    "width": Length,
    "embeds_dtype": str,
    "keeps": Option(str),
    "why": Option(str),
    "acts": Option([str]),
    "states": Option([{"layer": Length, "kind": str, "index": Length, "sizes": [Length], "dtype": str}]),
}
_PLAIN = ("max_batch", "max_length", "positions", "embeds", "vocabulary", "width")


def described(facts: GenerationSpec) -> dict[str, str]:
    """Return the facts as JSON, by the name of the file beside the program.

    Raises ConfigError where a config has an attribute that JSON cannot hold.
    """
    stored = {
        "format": FORMAT,
        "config": _written(facts.config, "config"),
        "generation_config": _written(facts.generation_config, "generation_config"),
        "layers": [vars(layer) for layer in facts.layout.layers],
        "dtype": _name(facts.layout.dtype),
        **{name: getattr(facts, name) for name in _PLAIN},
        "embeds_dtype": _name(facts.embeds_dtype),
    }
    if facts.keeps != ROOM:
        stored |= {"keeps": facts.keeps, "why": facts.why}
    if facts.acts:
        stored["acts"] = list(facts.acts)
    if isinstance(facts.layout, StateLayout):
        stored["states"] = [{**vars(s), "dtype": _name(s.dtype)} for s in facts.layout.states]
    if isinstance(facts, Seq2SeqSpec):
        stored["across"] = {
            **{name: getattr(facts, name) for name in ("main", "features", "source", "hidden", "strides")},
            "layers": [vars(layer) for layer in facts.cross.layers],
            "dtype": _name(facts.cross.dtype),
        }
    return {NAME: json.dumps(stored)}


def facts_of(
    stored: Any, inputs: Collection[str], tokenizer: Callable[[], Any] | None = None, outputs: Collection[str] = ()
) -> GenerationSpec:
    """Return the facts that :func:`described` has stored, for the program that was saved with them.

    ``inputs`` are the names of the program's inputs, ``outputs`` those of its outputs that have names. ``tokenizer``
    returns the tokenizer that came with the program. Raises UnsafeFile where the facts cannot be read or do not fit the
    program.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        found = stored.get("format") if isinstance(stored, dict) else stored
        raise UnsafeFile(f"its format is {found!r}, and this adaptc reads {FORMAT}")
    check(stored, _FORM)
    kind = stored["config"].get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UnsafeFile(f"this release of transformers has no model_type {kind!r}")
    layout, across = _layout(stored).of_passes(passes_of(inputs)), stored.get("across")
    known = {
        "config": CONFIG_MAPPING[kind].from_dict(stored["config"]),
        "generation_config": _generation_config(stored["generation_config"]),
        "layout": layout,
        **{name: stored[name] for name in _PLAIN},
        "embeds_dtype": _dtype(stored["embeds_dtype"]),
        "tokenizer": tokenizer,
        "keeps": stored.get("keeps", ROOM),
        "why": stored.get("why", ""),
        "acts": tuple(stored.get("acts", ())),
    }
    if known["keeps"] == WINDOW and layout.window is None:
        raise UnsafeFile("its layers keep a window, and it has none")
    if known["keeps"] not in KEEPS or (known["keeps"] == NOTHING) != (not layout.names):
        raise UnsafeFile(f"what it keeps is {shown(known['keeps'])}, of {len(layout.layers)} layers")
    if across is None:
        if not {*layout.names, *known["acts"]} <= set(inputs) or (known["keeps"] in (NOTHING, STATE)) == (
            "slots" in inputs
        ):
            raise UnsafeFile("its program has no such cache")
        return GenerationSpec(**known)
    cross, features = _layout(across, CROSS), across["features"]
    facts = Seq2SeqSpec(
        **known,
        main=across["main"],
        features=None if features is None else tuple(features),
        source=across["source"],
        cross=cross,
        hidden=across["hidden"],
        strides=_pair(across["strides"]),
    )
    lost = {n for names in facts.parts.values() for n in names} - set(outputs)
    if lost or not {*layout.names, *cross.names, facts.main} <= set(inputs):
        raise UnsafeFile("its program has no such parts")
    return facts


def _written(config: Any, name: str) -> Any:
    """Return a config as JSON values. Raises ConfigError for an attribute that JSON cannot hold."""
    try:
        return json.loads(config.to_json_string(use_diff=False))
    except (TypeError, ValueError) as error:
        for key, value in vars(config).items():
            try:
                json.dumps(value)
            except (TypeError, ValueError):
                raise ConfigError(
                    f"gen.{name}.{key} is {shown_value(value)}, which no file of a program can hold: give numbers, "
                    f"texts, lists and dicts, or take it away with del gen.{name}.{key}"
                ) from error
        raise ConfigError(f"gen.{name} cannot be written: {error}") from error


def _generation_config(stored: dict[str, Any]) -> Any:
    """Return the generation config, including attributes that users added.

    transformers drops these from a generation config that was made from a model's config.
    """
    from transformers import GenerationConfig

    config = GenerationConfig.from_dict(stored)
    for name, value in stored.items():
        if not hasattr(config, name):
            setattr(config, name, value)
    return config


def _layout(stored: Any, prefix: str = "") -> CacheLayout:
    if "states" in stored:
        if strange := [s["kind"] for s in stored["states"] if s["kind"] not in KINDS]:
            raise UnsafeFile(f"a state is one of {shown(strange[0])}")
        states = tuple(State(**s | {"sizes": tuple(s["sizes"]), "dtype": _dtype(s["dtype"])}) for s in stored["states"])
        return StateLayout((), _dtype(stored["dtype"]), prefix, states=states)
    return CacheLayout(tuple(LayerLayout(**layer) for layer in stored["layers"]), _dtype(stored["dtype"]), prefix)


def _pair(numbers: list[int]) -> tuple[int, int]:
    if len(numbers) != 2:
        raise UnsafeFile(f"its strides are {shown(numbers)}, which should be two")
    return numbers[0], numbers[1]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise UnsafeFile(f"{name!r} is no dtype")
    return found


_TOKENIZER = "tokenizer/"


def carried(facts: GenerationSpec, tokenizer: Any = None) -> dict[str, bytes]:
    """Return the files of a package by path. Raises ConfigError for anything but a tokenizer that fits the program."""
    files = {name: text.encode() for name, text in described(facts).items()}
    return files if tokenizer is None else files | _files_of(_tokenizer(tokenizer), facts)


def understood(contents: Contents) -> GenerationSpec | None:
    """Return the facts from the files that :func:`carried` made; None for a package of a program alone.

    Raises UnsafeFile where they cannot be read or do not fit the program.
    """
    files = contents.carried
    if NAME not in files:
        if files:
            raise UnsafeFile(f"it carries {min(files)!r}, which is of no program")
        return None
    tokenizer = {n.removeprefix(_TOKENIZER): data for n, data in files.items() if n.startswith(_TOKENIZER)}
    if strange := sorted(n for n in files if n != NAME and not n.startswith(_TOKENIZER)):
        raise UnsafeFile(f"it carries {strange[0]!r}, which is none of what generates")
    inputs = {i.name for i in contents.manifest.inputs}
    outputs = [name for part in contents.manifest.parts.values() for name in part.outputs]
    try:
        return facts_of(loads(files[NAME], infinite=True), inputs, _reader(tokenizer) if tokenizer else None, outputs)
    except UnsafeFile as error:
        raise error.inside(f"what it says of generation, {NAME!r}: ") from None


def _tokenizer(given: Any) -> Any:
    """Return the tokenizer that ``given`` is, or that its directory holds. Raises ConfigError for anything else."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    if isinstance(given, PreTrainedTokenizerBase):
        return given
    if not isinstance(given, (str, os.PathLike)):
        raise ConfigError(
            f"tokenizer must be a tokenizer of transformers or the directory of one, not a {type(given).__name__}"
        )
    path = Path(given)
    if not path.is_dir():
        raise ConfigError(f"tokenizer: there is no directory {path}")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for broken files
        raise ConfigError(f"{path} has no tokenizer that can be read: {why_no_tokenizer(path, error)}") from error


def _files_of(tokenizer: Any, facts: GenerationSpec) -> dict[str, bytes]:
    if len(tokenizer) > facts.vocabulary:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, and the program was compiled for {facts.vocabulary}: give the "
            "model's own, or resize the model's embeddings before it is compiled"
        )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    for name in files:
        if name.endswith(".py"):
            raise ConfigError(f"{type(tokenizer).__name__} has code of its own, {name!r}, which no package carries")
        if not can_carry(_TOKENIZER + name):
            raise ConfigError(f"the tokenizer has a file {name!r}, a name that no package has")
    return {_TOKENIZER + name: data for name, data in files.items()}


def _reader(files: Mapping[str, bytes]) -> Callable[[], Any]:
    """Return a function that reads the tokenizer when it is first needed, because that takes longer than loading a
    package."""

    @cache
    def read() -> Any:
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            try:
                return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            except Exception as error:
                raise CheckpointError(
                    f"the tokenizer in the package cannot be read here: {reason(error)}. Package the program again"
                ) from error

    return read
