"""Hold what is known of a paged step besides its graph, and write it as JSON beside the program."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from adaptc.archives.json_schema import Nullable, OptionalField, Size, check_json
from adaptc.archives.refusal import UnsafeFile
from adaptc.generation.description import (
    config_to_json,
    dtype_from_name,
    dtype_name,
    read_config,
    read_generation_config,
    tokenizer_files,
)
from adaptc.passes.analysis.cache_inputs import KV_KINDS, cache_input_name
from adaptc.serving.paged_layout import LayerGroup, PagedLayout
from adaptc.torch_typing import is_dict

SPEC_FILE = "adaptc.serving.json"
SPEC_FORMAT = 1

_SIZES = ("vocab_size", "max_batch_tokens", "num_blocks", "page_size")
_SCHEMA: dict[str, Any] = {
    "format": Size,
    "config": dict,
    "generation_config": dict,
    "groups": [{"name": str, "layers": [Size], "window": Nullable(Size)}],
    "heads": Size,
    "dim": Size,
    # Files of before have keys and values alone.
    "latents": OptionalField(Nullable([Size])),
    "dtype": str,
    "position_count": Nullable(Size),
    **dict.fromkeys(_SIZES, Size),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class ServingSpec:
    """Hold what is known of a paged step besides its graph.

    ``config`` and ``generation_config`` are copies of the model's. ``position_count``: the positions that the model is
    for; None for any number. ``max_batch_tokens``, ``num_blocks``, ``page_size``: the sizes of a batch and of the pool.
    ``tokenizer`` returns the tokenizer that came with a package; None for none.
    """

    layout: PagedLayout
    config: Any
    generation_config: Any
    vocab_size: int
    position_count: int | None
    max_batch_tokens: int
    num_blocks: int
    page_size: int
    tokenizer: Callable[[], Any] | None = None

    def notes(self) -> list[str]:
        """Return the lines of a report about the cache."""
        kinds = ", ".join(f"{len(g.layers)} layers of {g.name.replace('_', ' ')}" for g in self.layout.groups)
        room = self.num_blocks * self.page_size
        return [f"serves batches of up to {self.max_batch_tokens} tokens from a pool for {room} positions ({kinds})"]


def spec_to_json(spec: ServingSpec) -> dict[str, str]:
    """Return the spec as JSON, by the name of the file beside the program.

    Raises ConfigError where a config has an attribute that JSON cannot hold.
    """
    layout = spec.layout
    stored = {
        "format": SPEC_FORMAT,
        "config": config_to_json(spec.config, "config"),
        "generation_config": config_to_json(spec.generation_config, "generation_config"),
        "groups": [{"name": g.name, "layers": list(g.layers), "window": g.window} for g in layout.groups],
        "heads": layout.heads,
        "dim": layout.dim,
        "latents": layout.latents and list(layout.latents),
        "dtype": dtype_name(layout.dtype),
        "position_count": spec.position_count,
        **{name: getattr(spec, name) for name in _SIZES},
    }
    return {SPEC_FILE: json.dumps(stored)}


def files_for_package(spec: ServingSpec, tokenizer: Any = None) -> dict[str, bytes]:
    """Return the files of a package by path. Raises ConfigError for anything but a tokenizer that fits the program."""
    files = {name: text.encode() for name, text in spec_to_json(spec).items()}
    return files | tokenizer_files(tokenizer, spec.vocab_size)


def spec_from_json(stored: Any, inputs: Collection[str], tokenizer: Callable[[], Any] | None = None) -> ServingSpec:
    """Return the spec that :func:`spec_to_json` has stored, for the program with these ``inputs``.

    Raises UnsafeFile where it cannot be read or does not fit the program.
    """
    if not is_dict(stored) or stored.get("format") != SPEC_FORMAT:
        found = stored.get("format") if is_dict(stored) else stored
        raise UnsafeFile(f"its format is {found!r}, and this adaptc reads {SPEC_FORMAT}")
    check_json(stored, _SCHEMA)
    groups = tuple(LayerGroup(g["name"], tuple(g["layers"]), g["window"]) for g in stored["groups"])
    latents = stored.get("latents")
    if latents is not None and (len(latents) != 2 or (stored["heads"], stored["dim"]) != (1, sum(latents))):
        raise UnsafeFile(f"its latents are {latents}, and its rows {stored['heads']} heads of {stored['dim']}")
    layout = PagedLayout(
        groups, stored["heads"], stored["dim"], dtype_from_name(stored["dtype"]), latents and (latents[0], latents[1])
    )
    layers = sorted(i for group in groups for i in group.layers)
    wanted = {*layout.names, *(name for g in groups for name in (g.read_name, g.write_name, g.mask_name))}
    wanted |= {g.reader_name for g in groups if layout.latents is not None}
    more = cache_input_name(KV_KINDS[0], len(layers))
    if layers != list(range(len(layers))) or not wanted <= {*inputs} or more in inputs:
        raise UnsafeFile("its program has no such cache")
    config = read_config(stored["config"])
    # With it transformers makes the masks that the step takes.
    config._attn_implementation = "sdpa"  # noqa: SLF001
    return ServingSpec(
        layout=layout,
        config=config,
        generation_config=read_generation_config(stored["generation_config"]),
        position_count=stored["position_count"],
        tokenizer=tokenizer,
        **{name: stored[name] for name in _SIZES},
    )
