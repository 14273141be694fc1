"""Write programs for other runtimes, with adapters as inputs that each call gives."""

# pyright: reportUnusedImport=false

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptc.public_names import lazy_names

if TYPE_CHECKING:
    from adaptc.exporters.to_executorch.executorch_adapter import executorch_model, save_executorch_adapter
    from adaptc.exporters.to_executorch.executorch_model import ExecutorchModel
    from adaptc.exporters.to_executorch.program_to_executorch import export_executorch
    from adaptc.exporters.to_onnx.genai_model import export_genai
    from adaptc.exporters.to_onnx.onnx_adapter import onnx_session, save_onnx_adapter
    from adaptc.exporters.to_onnx.program_to_onnx import export_onnx
    from adaptc.exporters.to_onnx.session import OnnxSession
    from adaptc.exporters.to_openvino.openvino_adapter import openvino_model, save_openvino_adapter
    from adaptc.exporters.to_openvino.openvino_model import OpenVinoModel
    from adaptc.exporters.to_openvino.program_to_openvino import export_openvino
    from adaptc.exporters.transformers_backend import register_transformers_backend

#: public name -> the module that defines it
PUBLIC = {
    "export_onnx": "adaptc.exporters.to_onnx.program_to_onnx",
    "save_onnx_adapter": "adaptc.exporters.to_onnx.onnx_adapter",
    "onnx_session": "adaptc.exporters.to_onnx.onnx_adapter",
    "export_genai": "adaptc.exporters.to_onnx.genai_model",
    "OnnxSession": "adaptc.exporters.to_onnx.session",
    "export_openvino": "adaptc.exporters.to_openvino.program_to_openvino",
    "save_openvino_adapter": "adaptc.exporters.to_openvino.openvino_adapter",
    "openvino_model": "adaptc.exporters.to_openvino.openvino_adapter",
    "OpenVinoModel": "adaptc.exporters.to_openvino.openvino_model",
    "export_executorch": "adaptc.exporters.to_executorch.program_to_executorch",
    "save_executorch_adapter": "adaptc.exporters.to_executorch.executorch_adapter",
    "executorch_model": "adaptc.exporters.to_executorch.executorch_adapter",
    "ExecutorchModel": "adaptc.exporters.to_executorch.executorch_model",
    "register_transformers_backend": "adaptc.exporters.transformers_backend",
}

__all__ = [*PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, PUBLIC)
