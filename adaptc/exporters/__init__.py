"""Write programs for other runtimes, with adapters as inputs that each call gives."""

# pyright: reportUnusedImport=false

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptc.public_names import lazy_names

if TYPE_CHECKING:
    from adaptc.exporters.onnx_adapter import onnx_session, save_onnx_adapter
    from adaptc.exporters.program_to_onnx import export_onnx
    from adaptc.exporters.session import OnnxSession

#: public name -> the module that defines it
PUBLIC = {
    "export_onnx": "adaptc.exporters.program_to_onnx",
    "save_onnx_adapter": "adaptc.exporters.onnx_adapter",
    "onnx_session": "adaptc.exporters.onnx_adapter",
    "OnnxSession": "adaptc.exporters.session",
}

__all__ = [*PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, PUBLIC)
