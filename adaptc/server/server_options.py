"""Hold the options of a server, and open the model and the adapters that it serves.

A model whose adapters are all known is captured for their layers alone. One that takes further adapters later is
captured for all linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptc.archives.archive import is_package
from adaptc.capture.model_files import is_gguf
from adaptc.errors import CheckpointError, ConfigError, listing, short_repr
from adaptc.methods.lora_family.lora_config import LoraConfig
from adaptc.server.adapter_root import AdapterRoot
from adaptc.server.read_served import ModelOptions, read_model_and_tokenizer, read_saved_and_tokenizer
from adaptc.serving.compile_for_serving import compile_for_serving
from adaptc.serving.serving_model import ServingModel, make_serving_bank


@dataclass(frozen=True)
class ServerOptions:
    """The options of a server.

    ``name`` is the base's name in requests. ``adapter_root``: the directory below which requests may load adapters,
    None for none. ``load_on_use``: whether the name of a directory below it is a model that is loaded at its first
    request; the adapters that were used least recently make room for it. ``api_key``: the key that requests must bring,
    None for no key. ``max_adapters`` and ``max_rank``: limits of the bank. ``max_batch_tokens``, ``num_blocks`` and
    ``page_size``: sizes of the step, as ``adaptc.compile_for_serving`` has them; None for its own, or for those of a
    program file. ``max_requests``: the most requests at once. ``max_body_bytes``: the largest body.
    """

    name: str
    adapter_root: Path | None = None
    api_key: str | None = None
    max_adapters: int | None = None
    max_rank: int | None = None
    max_batch_tokens: int | None = None
    num_blocks: int | None = None
    page_size: int | None = None
    max_requests: int = 1024
    max_body_bytes: int = 8 << 20
    load_on_use: bool = False
    adapters: Mapping[str, Path] = field(default_factory=dict[str, Path])

    def __post_init__(self) -> None:
        if not self.name or self.name in self.adapters:
            raise ConfigError(f"the base is called {short_repr(self.name)}, which must be a name that no adapter has")
        if self.adapter_root is not None and not self.adapter_root.is_dir():
            raise ConfigError(f"the adapter root {self.adapter_root} is no directory")
        if self.load_on_use and self.adapter_root is None:
            raise ConfigError(
                "adapters are loaded on use from the adapter root, and there is none: give --adapter-root"
            )
        if self.max_requests < 1 or self.max_body_bytes < 1:
            raise ConfigError("a server takes one request or more, and bodies of one byte or more")


def open_served_model(path: Path, model_options: ModelOptions, options: ServerOptions) -> tuple[ServingModel, Any]:
    """Return the model at ``path`` with its adapters, and its tokenizer.

    A transformers directory and a GGUF file are compiled for serving; a program file and a package are of a serving
    model already. Raises CheckpointError and ConfigError as ``adaptc.compile_for_serving`` does.
    """
    if path.is_file() and not is_gguf(path):
        return _open_saved(path, model_options, options)
    model, tokenizer = read_model_and_tokenizer(path, model_options)
    paths = [str(p) for p in options.adapters.values()]
    takes_more = options.adapter_root is not None or not paths
    if takes_more:
        paths.insert(0, LoraConfig(r=2, target_modules="all-linear"))  # type: ignore[arg-type]
    serving = compile_for_serving(
        model,
        paths if len(paths) > 1 else paths[0],
        **_bank_options(options),
        **_given(options, "max_batch_tokens", "num_blocks", "page_size"),
        backend=model_options.backend,
        autocast_adapter_dtype=model_options.autocast_adapter_dtype,
    )
    return serving, tokenizer


def _open_saved(path: Path, model_options: ModelOptions, options: ServerOptions) -> tuple[ServingModel, Any]:
    _refuse(path, _given(options, "max_batch_tokens", "num_blocks", "page_size"))
    if is_package(path):
        _refuse(path, _given(options, "max_adapters", "max_rank"))
        if options.load_on_use:
            raise ConfigError(f"load_on_use is not for a package, whose bank has a fixed number of places: {path}")
    found, tokenizer = read_saved_and_tokenizer(path, model_options, _check_serves)
    if is_package(path):
        for name, adapter in options.adapters.items():
            (found.bank.replace if name in found.bank else found.bank.add)(name, str(adapter))
        return found, tokenizer
    bank = make_serving_bank(found.program, found.spec, **_bank_options(options))
    return type(found)(found.program, found.spec, bank), tokenizer


def _check_serves(path: Path, found: Any) -> None:
    if not isinstance(found, ServingModel):
        raise CheckpointError(
            f"{path} holds no serving model: give the model's directory, or save one of adaptc.compile_for_serving"
        )


def _given(options: ServerOptions, *names: str) -> dict[str, Any]:
    """Return those of the options ``names`` that somebody chose."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _refuse(path: Path, chosen: Mapping[str, Any]) -> None:
    if chosen:
        raise ConfigError(f"{listing(chosen)} of {path} were settled when it was made: leave the options out")


def _bank_options(options: ServerOptions) -> dict[str, Any]:
    """Return the options of ``adaptc.compile_for_serving`` for its bank."""
    return {
        "adapters": {name: str(p) for name, p in options.adapters.items()},
        "capacity": options.max_adapters,
        "max_rank": options.max_rank,
        "evict": options.load_on_use,
        "loader": _loader(options) if options.load_on_use else None,
    }


def _loader(options: ServerOptions) -> Callable[[str], str | None]:
    """Return a function that finds an adapter by the name that requests give."""
    root = AdapterRoot(options.adapter_root)

    def find(name: str) -> str | None:
        found = options.adapters.get(name) or root.find_named(name)
        return None if found is None else str(found)

    return find
