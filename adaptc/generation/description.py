"""Write the spec of a step program as JSON, which is saved beside the program, and read them again."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from adaptc.archives.json_schema import Nullable, OptionalField, Size, check_json
from adaptc.archives.names import parse_json
from adaptc.archives.refusal import UnsafeFile, describe_error, short_repr
from adaptc.capture.model_files import tokenizer_failure
from adaptc.errors import CheckpointError, ConfigError
from adaptc.errors import short_repr as shown_user_value
from adaptc.generation.cache.cache_layout import (
    STATE_KINDS,
    CacheLayout,
    HybridLayout,
    LayerLayout,
    State,
    StateLayout,
)
from adaptc.generation.modes.all_modes import mode_from_json, mode_to_json
from adaptc.generation.modes.prefill_part import prompt_input_names
from adaptc.generation.multimodal.multimodal_spec import MultimodalSpec
from adaptc.generation.seq2seq.seq2seq_spec import CROSS_PREFIX, Seq2SeqSpec
from adaptc.generation.spec import GenerationSpec
from adaptc.packages.manifest import Contents, is_package_file_name
from adaptc.passes.analysis.cache_inputs import count_passes
from adaptc.torch_typing import attributes_of, is_dict, is_list_or_tuple, is_path

SPEC_FILE = "adaptc.generation.json"
SPEC_FORMAT = 1

_LAYERS_SCHEMA = [{"heads": Size, "key_dim": Size, "value_dim": Size, "sliding": Nullable(Size)}]
#: the form of what is stored of a model with an encoder
_SEQ2SEQ_SCHEMA: dict[str, Any] = {
    "main": str,
    "features": Nullable([Size]),
    "source": Nullable(Size),
    "layers": _LAYERS_SCHEMA,
    "dtype": str,
    "hidden": Size,
    "strides": [Size],
}
_SCHEMA: dict[str, Any] = {
    "format": Size,
    "config": dict,
    "generation_config": dict,
    "layers": _LAYERS_SCHEMA,
    "across": OptionalField(_SEQ2SEQ_SCHEMA),
    "prompts": OptionalField({"inputs": [str], "tokens": [str], "axes": Size, "deepstack": Size, "ahead": bool}),
    "dtype": str,
    "max_batch": Size,
    "max_length": Size,
    "positions": bool,
    "embeds": bool,
    "vocabulary": Size,
    "width": Size,
    "embeds_dtype": str,
    "keeps": OptionalField(str),
    "why": OptionalField(str),
    "acts": OptionalField([str]),
    "counts_padding": OptionalField(bool),
    "first_position": OptionalField(Size),
    "prefill": OptionalField(bool),
    "why_no_prefill": OptionalField(str),
    "hybrid": OptionalField({"layers": [Size], "count": Size}),
    "states": OptionalField([{"layer": Size, "kind": str, "index": Size, "sizes": [Size], "dtype": str}]),
}
#: key in the file -> field of the spec
_PLAIN_FIELDS = {
    "max_batch": "max_batch",
    "max_length": "max_length",
    "positions": "takes_position_ids",
    "embeds": "takes_inputs_embeds",
    "vocabulary": "vocab_size",
    "width": "hidden_size",
}
#: the same of a model with an encoder
_SEQ2SEQ_FIELDS = {
    "main": "main_input_name",
    "features": "feature_shape",
    "source": "max_source_length",
    "hidden": "encoder_hidden_size",
    "strides": "conv_strides",
}
#: the same of a model that reads images or audio
_PROMPT_FIELDS = {
    "inputs": "prompt_inputs",
    "tokens": "token_inputs",
    "axes": "position_axes",
    "deepstack": "deepstack_layers",
    "ahead": "looks_ahead",
}


def spec_to_json(spec: GenerationSpec) -> dict[str, str]:
    """Return the spec as JSON, by the name of the file beside the program.

    Raises ConfigError where a config has an attribute that JSON cannot hold.
    """
    stored = {
        "format": SPEC_FORMAT,
        "config": config_to_json(spec.config, "config"),
        "generation_config": config_to_json(spec.generation_config, "generation_config"),
        "layers": [vars(layer) for layer in spec.layout.layers],
        "dtype": dtype_name(spec.layout.dtype),
        **{key: getattr(spec, field) for key, field in _PLAIN_FIELDS.items()},
        "embeds_dtype": dtype_name(spec.embeds_dtype),
    }
    stored |= mode_to_json(spec.cache_mode, spec)
    if spec.counts_padding:
        stored["counts_padding"] = True
    if spec.first_position:
        stored["first_position"] = spec.first_position
    if spec.has_prefill:
        stored["prefill"] = True
    if spec.prefill_reason:
        stored["why_no_prefill"] = spec.prefill_reason
    if spec.token_gate_inputs:
        stored["acts"] = list(spec.token_gate_inputs)
    if isinstance(spec.layout, StateLayout):
        stored["states"] = [{**vars(s), "dtype": dtype_name(s.dtype)} for s in spec.layout.states]
    if isinstance(spec.layout, HybridLayout):
        stored["hybrid"] = {"layers": list(spec.layout.attention_layers), "count": spec.layout.layer_count}
    if isinstance(spec, Seq2SeqSpec):
        stored["across"] = {
            **{key: getattr(spec, field) for key, field in _SEQ2SEQ_FIELDS.items()},
            "layers": [vars(layer) for layer in spec.cross_layout.layers],
            "dtype": dtype_name(spec.cross_layout.dtype),
        }
    if isinstance(spec, MultimodalSpec):
        stored["prompts"] = {key: getattr(spec, field) for key, field in _PROMPT_FIELDS.items()}
    return {SPEC_FILE: json.dumps(stored)}


def facts_of(
    stored: Any, inputs: Collection[str], tokenizer: Callable[[], Any] | None = None, outputs: Collection[str] = ()
) -> GenerationSpec:
    """Return the spec that :func:`spec_to_json` has stored, for the program that was saved with them.

    ``inputs`` are the names of the program's inputs, ``outputs`` those of its outputs that have names. ``tokenizer``
    returns the tokenizer that came with the program. Raises UnsafeFile where the spec cannot be read or does not fit
    the program.
    """
    if not is_dict(stored) or stored.get("format") != SPEC_FORMAT:
        found = stored.get("format") if is_dict(stored) else stored
        raise UnsafeFile(f"its format is {found!r}, and this adaptc reads {SPEC_FORMAT}")
    check_json(stored, _SCHEMA)
    layout, seq2seq = _layout_from_json(stored).with_passes(count_passes(inputs)), stored.get("across")
    fields: dict[str, Any] = {
        "config": read_config(stored["config"]),
        "generation_config": read_generation_config(stored["generation_config"]),
        "layout": layout,
        **{field: stored[key] for key, field in _PLAIN_FIELDS.items()},
        "embeds_dtype": dtype_from_name(stored["embeds_dtype"]),
        "tokenizer": tokenizer,
        "cache_mode": mode_from_json(stored, layout, inputs),
        "mode_reason": stored.get("why", ""),
        "token_gate_inputs": tuple(stored.get("acts", ())),
        "counts_padding": stored.get("counts_padding", False),
        "first_position": stored.get("first_position", 0),
        "has_prefill": stored.get("prefill", False),
        "prefill_reason": stored.get("why_no_prefill", ""),
    }
    if seq2seq is None:
        if not {*layout.names, *fields["token_gate_inputs"]} <= set(inputs):
            raise UnsafeFile("its program has no such cache")
        if (prompts := stored.get("prompts")) is None:
            spec = GenerationSpec(**fields)
            if spec.has_prefill and not isinstance(layout, StateLayout):
                raise UnsafeFile("its program has no such parts")
            _check_parts(spec, prompt_input_names(spec) if spec.has_prefill else (), inputs, outputs)
            return spec
        for key, field in _PROMPT_FIELDS.items():
            fields[field] = tuple(prompts[key]) if isinstance(prompts[key], list) else prompts[key]
        multimodal = MultimodalSpec(**fields)
        # The names of a prompt's inputs are those of its part.
        takes = {*multimodal.part_inputs(dict.fromkeys(multimodal.prompt_inputs)), *multimodal.image_inputs}
        _check_parts(multimodal, takes, inputs, outputs)
        return multimodal
    cross_layout, features = _layout_from_json(seq2seq, CROSS_PREFIX), seq2seq["features"]
    spec = Seq2SeqSpec(
        **fields,
        main_input_name=seq2seq["main"],
        feature_shape=None if features is None else tuple(features),
        max_source_length=seq2seq["source"],
        cross_layout=cross_layout,
        encoder_hidden_size=seq2seq["hidden"],
        conv_strides=_conv_strides(seq2seq["strides"]),
    )
    _check_parts(spec, {*layout.names, *cross_layout.names, spec.main_input_name}, inputs, outputs)
    return spec


def _check_parts(
    spec: GenerationSpec, takes: Collection[str], inputs: Collection[str], outputs: Collection[str]
) -> None:
    """Raise UnsafeFile for a program that lacks an output of a part, or one of the inputs ``takes``."""
    wanted = {n for names in (spec.part_outputs or {}).values() for n in names}
    if not wanted <= set(outputs) or not set(takes) <= set(inputs):
        raise UnsafeFile("its program has no such parts")


def config_to_json(config: Any, config_name: str) -> Any:
    """Return a config as JSON values. Raises ConfigError for an attribute that JSON cannot hold."""
    try:
        return json.loads(config.to_json_string(use_diff=False))
    except (TypeError, ValueError) as error:
        for key, value in attributes_of(config).items():
            try:
                json.dumps(value)
            except (TypeError, ValueError):
                raise ConfigError(
                    f"gen.{config_name}.{key} is {shown_user_value(value)}, which no file of a program can hold: give "
                    f"numbers, texts, lists and dicts, or take it away with del gen.{config_name}.{key}"
                ) from error
        raise ConfigError(f"gen.{config_name} cannot be written: {error}") from error


def read_config(stored: dict[str, Any]) -> Any:
    """Return a model's config. Raises UnsafeFile where this release of transformers does not have its model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind: Any = stored.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UnsafeFile(f"this release of transformers has no model_type {kind!r}")
    config_class: Any = CONFIG_MAPPING[kind]  # transformers gives from_dict no types
    return config_class.from_dict(_with_special_floats(stored))


def _with_special_floats(stored: Any) -> Any:
    """Return the values of a config with the numbers in it that JSON has not, such as Infinity.

    transformers writes each as ``{"__float__": "Infinity"}``.
    """
    if is_list_or_tuple(stored):
        return [_with_special_floats(v) for v in stored]
    if not is_dict(stored):
        return stored
    if stored.keys() == {"__float__"} and stored["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(stored["__float__"])
    return {k: _with_special_floats(v) for k, v in stored.items()}


def read_generation_config(stored: dict[str, Any]) -> Any:
    """Return the generation config, including attributes that users added.

    transformers drops these from a generation config that was made from a model's config.
    """
    from transformers import GenerationConfig

    config_class: Any = GenerationConfig  # transformers gives from_dict no types
    config = config_class.from_dict(stored)
    for name, value in stored.items():
        if not hasattr(config, name):
            setattr(config, name, value)
    return config


def _layout_from_json(stored: Any, name_prefix: str = "") -> CacheLayout:
    layers = tuple(LayerLayout(**layer) for layer in stored["layers"])
    if "states" in stored:
        if strange := [s["kind"] for s in stored["states"] if s["kind"] not in STATE_KINDS]:
            raise UnsafeFile(f"a state is one of {short_repr(strange[0])}")
        states = tuple(
            State(**s | {"sizes": tuple(s["sizes"]), "dtype": dtype_from_name(s["dtype"])}) for s in stored["states"]
        )
        if (hybrid := stored.get("hybrid")) is None:
            return StateLayout((), dtype_from_name(stored["dtype"]), name_prefix, states=states)
        numbers, count = tuple(hybrid["layers"]), hybrid["count"]
        if len(numbers) != len(layers) or not all(i < count for i in (*numbers, *(s.layer for s in states))):
            raise UnsafeFile("its layers with keys and values are not those that it numbers")
        return HybridLayout(
            layers,
            dtype_from_name(stored["dtype"]),
            name_prefix,
            states=states,
            attention_layers=numbers,
            layer_count=count,
        )
    return CacheLayout(layers, dtype_from_name(stored["dtype"]), name_prefix)


def _conv_strides(numbers: list[int]) -> tuple[int, int]:
    if len(numbers) != 2:
        raise UnsafeFile(f"its strides are {short_repr(numbers)}, which should be two")
    return numbers[0], numbers[1]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise UnsafeFile(f"{name!r} is no dtype")
    return found


_TOKENIZER_FOLDER = "tokenizer/"


def files_for_package(spec: GenerationSpec, tokenizer: Any = None) -> dict[str, bytes]:
    """Return the files of a package by path. Raises ConfigError for anything but a tokenizer that fits the program."""
    files = {name: text.encode() for name, text in spec_to_json(spec).items()}
    return files | tokenizer_files(tokenizer, spec.vocab_size)


def spec_from_package(contents: Contents) -> GenerationSpec | None:
    """Return the spec from the files that :func:`files_for_package` made; None for a package of a program alone.

    Raises UnsafeFile where it cannot be read or does not fit the program.
    """
    files = contents.package_files
    if SPEC_FILE not in files:
        if files:
            raise UnsafeFile(f"it carries {min(files)!r}, which is of no program")
        return None
    tokenizer = tokenizer_of_package(files, SPEC_FILE)
    inputs = {i.name for i in contents.manifest.inputs}
    outputs = [name for part in contents.manifest.parts.values() for name in part.outputs]
    try:
        return facts_of(
            parse_json(files[SPEC_FILE], allow_nan=True),
            inputs,
            tokenizer,
            outputs,
        )
    except UnsafeFile as error:
        raise error.prepend_location(f"what it says of generation, {SPEC_FILE!r}: ") from None


def tokenizer_of_package(files: Mapping[str, bytes], spec_file: str) -> Callable[[], Any] | None:
    """Return a function that returns the tokenizer in the files of a package; None where there is none.

    Raises UnsafeFile for a file that is neither ``spec_file`` nor of a tokenizer.
    """
    tokenizer = {
        n.removeprefix(_TOKENIZER_FOLDER): data for n, data in files.items() if n.startswith(_TOKENIZER_FOLDER)
    }
    if strange := sorted(n for n in files if n != spec_file and not n.startswith(_TOKENIZER_FOLDER)):
        raise UnsafeFile(f"it carries {strange[0]!r}, which is none of what generates")
    return _tokenizer_reader(tokenizer) if tokenizer else None


def _load_tokenizer(source: Any) -> Any:
    """Return the tokenizer that ``source`` is, or that its directory holds. Raises ConfigError for anything else."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    if isinstance(source, PreTrainedTokenizerBase):
        return source
    if not is_path(source):
        raise ConfigError(
            f"tokenizer must be a tokenizer of transformers or the directory of one, not a {type(source).__name__}"
        )
    path = Path(source)
    if not path.is_dir():
        raise ConfigError(f"tokenizer: there is no directory {path}")
    try:
        tokenizers: Any = AutoTokenizer  # transformers gives from_pretrained no types
        return tokenizers.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for broken files
        raise ConfigError(f"{path} has no tokenizer that can be read: {tokenizer_failure(path, error)}") from error


def tokenizer_files(source: Any, vocab_size: int) -> dict[str, bytes]:
    """Return the files of a package that hold the tokenizer ``source``, or that of its directory; {} for None.

    Raises ConfigError for anything but a tokenizer that fits a program of ``vocab_size`` tokens.
    """
    if source is None:
        return {}
    tokenizer = _load_tokenizer(source)
    if len(tokenizer) > vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, and the program was compiled for {vocab_size}: give the "
            "model's own, or resize the model's embeddings before it is compiled"
        )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    for name in files:
        if name.endswith(".py"):
            raise ConfigError(f"{type(tokenizer).__name__} has code of its own, {name!r}, which no package carries")
        if not is_package_file_name(_TOKENIZER_FOLDER + name):
            raise ConfigError(f"the tokenizer has a file {name!r}, a name that no package has")
    return {_TOKENIZER_FOLDER + name: data for name, data in files.items()}


def _tokenizer_reader(files: Mapping[str, bytes]) -> Callable[[], Any]:
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
                tokenizers: Any = AutoTokenizer  # transformers gives from_pretrained no types
                return tokenizers.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            except Exception as error:
                raise CheckpointError(
                    f"the tokenizer in the package cannot be read here: {describe_error(error)}. Package the program "
                    "again"
                ) from error

    return read
