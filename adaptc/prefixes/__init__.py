"""Initialise KV prefixes from texts and from ``past_key_values``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptc.public_names import lazy_names

if TYPE_CHECKING:
    from adaptc.adapters.compose import compose_cartridge_adapters
    from adaptc.adapters.past_key_values import prompt_embeddings_from_past_key_values
    from adaptc.prefixes.init_kv_prefix import initialize_kv_prefix_from_past_key_values, initialize_kv_prefix_from_text

#: public name -> the module that defines it
PUBLIC = {
    "initialize_kv_prefix_from_text": "adaptc.prefixes.init_kv_prefix",
    "initialize_kv_prefix_from_past_key_values": "adaptc.prefixes.init_kv_prefix",
    "prompt_embeddings_from_past_key_values": "adaptc.adapters.past_key_values",
    "compose_cartridge_adapters": "adaptc.adapters.compose",
}

__all__ = [*PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, PUBLIC)
