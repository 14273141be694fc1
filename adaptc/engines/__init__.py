"""Check whether a serving engine takes an adapter as it is meant, and rewrite adapters so that it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptc.public_names import lazy_names

if TYPE_CHECKING:
    from adaptc.engines.check import check_adapter
    from adaptc.engines.export import export_adapter
    from adaptc.engines.vllm_resolver import AdapterResolver

#: public name -> the module that defines it
PUBLIC = {
    "check_adapter": "adaptc.engines.check",
    "export_adapter": "adaptc.engines.export",
    "AdapterResolver": "adaptc.engines.vllm_resolver",
}

__all__ = [*PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, PUBLIC)
