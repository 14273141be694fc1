"""Look into programs and adapters: recompilation, lowering, X-LoRA's scalings, status, and what adapters change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptc.public_names import lazy_names

if TYPE_CHECKING:
    from adaptc.api.merge_and_lower import lower
    from adaptc.api.reporting import xlora_scalings
    from adaptc.reports.similarity import compare_adapters
    from adaptc.reports.spectra import measure_spectra
    from adaptc.reports.status import get_layer_status, get_model_status
    from adaptc.runtime.recompiles import assert_no_recompiles

#: public name -> the module that defines it
PUBLIC = {
    "assert_no_recompiles": "adaptc.runtime.recompiles",
    "lower": "adaptc.api.merge_and_lower",
    "xlora_scalings": "adaptc.api.reporting",
    "compare_adapters": "adaptc.reports.similarity",
    "measure_spectra": "adaptc.reports.spectra",
    "get_model_status": "adaptc.reports.status",
    "get_layer_status": "adaptc.reports.status",
}

__all__ = [*PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, PUBLIC)
