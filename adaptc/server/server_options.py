"""Hold the options of a server, and open the model and the adapters that it serves.

A model whose adapters are all known is captured for their layers alone. One that takes further adapters later is
captured for all linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptc.chat.models import ModelOptions, read_model_and_tokenizer
from adaptc.errors import ConfigError, short_repr
from adaptc.methods.lora_family.lora_config import LoraConfig
from adaptc.serving.compile_for_serving import compile_for_serving
from adaptc.serving.serving_model import ServingModel


@dataclass(frozen=True)
class ServerOptions:
    """The options of a server.

    ``name`` is the base's name in requests. ``adapter_root``: the directory below which requests may load adapters,
    None for none. ``api_key``: the key that requests must bring, None for no key. ``max_adapters`` and ``max_rank``:
    limits of the bank. ``max_requests``: the most requests at once. ``max_body_bytes``: the largest body.
    """

    name: str
    adapter_root: Path | None = None
    api_key: str | None = None
    max_adapters: int | None = None
    max_rank: int | None = None
    max_batch_tokens: int = 256
    num_blocks: int = 256
    page_size: int = 32
    max_requests: int = 1024
    max_body_bytes: int = 8 << 20
    adapters: Mapping[str, Path] = field(default_factory=dict[str, Path])

    def __post_init__(self) -> None:
        if not self.name or self.name in self.adapters:
            raise ConfigError(f"the base is called {short_repr(self.name)}, which must be a name that no adapter has")
        if self.adapter_root is not None and not self.adapter_root.is_dir():
            raise ConfigError(f"the adapter root {self.adapter_root} is no directory")
        if self.max_requests < 1 or self.max_body_bytes < 1:
            raise ConfigError("a server takes one request or more, and bodies of one byte or more")


def open_served_model(path: Path, model_options: ModelOptions, options: ServerOptions) -> tuple[ServingModel, Any]:
    """Return the model at ``path``, compiled for serving with its adapters, and its tokenizer.

    Raises CheckpointError and ConfigError as ``adaptc.compile_for_serving`` and ``adaptc chat`` do.
    """
    model, tokenizer = read_model_and_tokenizer(path, model_options)
    paths = [str(p) for p in options.adapters.values()]
    takes_more = options.adapter_root is not None or not paths
    if takes_more:
        paths.insert(0, LoraConfig(r=2, target_modules="all-linear"))  # type: ignore[arg-type]
    serving = compile_for_serving(
        model,
        paths if len(paths) > 1 else paths[0],
        adapters={name: str(p) for name, p in options.adapters.items()},
        max_batch_tokens=options.max_batch_tokens,
        num_blocks=options.num_blocks,
        page_size=options.page_size,
        capacity=options.max_adapters,
        max_rank=options.max_rank,
        backend=model_options.backend,
    )
    return serving, tokenizer
