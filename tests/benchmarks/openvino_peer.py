"""Continue a text with OpenVINO GenAI, in an environment of its own that has the package ``openvino-genai``.

``python openvino_peer.py MODEL LORA PRECISION THREADS NEW TOKEN...``: MODEL is a GGUF file of F16, LORA a
file of safetensors by PEFT whose alpha is twice its rank, or "-" for none. PRECISION is that of the computation, or "-"
for the engine's own choice. For each line on standard input the tokens are continued greedily by NEW tokens. A line of
JSON has these.

The engine finds the layers of a LoRA by the names of its matmuls. Its reader of GGUF files names the weights alone, so
the model is saved, and its matmuls get the names that a model exported from PyTorch has.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

_MAX_NODES_TO_WEIGHT = 6


def write_named(source: Path, folder: Path) -> Path:
    """Write the model of a GGUF file to ``folder`` with named matmuls, and return the folder."""
    read, named = folder / "read", folder / "named"
    read.mkdir()
    named.mkdir()
    openvino_genai.LLMPipeline(str(shutil.copy(source, read)), "CPU", enable_save_ov_model=True)
    model = openvino.Core().read_model(read / "openvino_model.xml")
    count = 0
    for op in model.get_ops():
        weight = _weight_of(op) if op.get_type_name() == "MatMul" else None
        if weight is not None:
            name = re.sub(r"\[(\d+)\]", r".\1", weight.removesuffix(".weight"))
            op.set_friendly_name(f"__module.{name}/ov_ext::linear/MatMul")
            count += 1
    assert count > 0
    openvino.save_model(model, named / "openvino_model.xml", compress_to_fp16=False)
    for path in read.glob("openvino_*tokenizer.*"):
        shutil.copy(path, named)
    return named


def _weight_of(matmul: Any) -> str | None:
    """Return the name of a layer's weight that is the second operand; None for another operand."""
    node = matmul.input_value(1).get_node()
    for _ in range(_MAX_NODES_TO_WEIGHT):
        name = node.get_friendly_name()
        if name.startswith("model.layers[") and name.endswith(".weight"):
            return name
        if node.get_input_size() == 0:
            return None
        node = node.input_value(0).get_node()
    return None


def main(model: str, lora: str, precision: str, threads: str, new: str, *tokens: str) -> None:
    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": int(threads)}
    if precision != "-":
        options["INFERENCE_PRECISION_HINT"] = precision
    if lora != "-":
        options["adapters"] = openvino_genai.AdapterConfig(openvino_genai.Adapter(lora), 2.0)
    with tempfile.TemporaryDirectory() as folder:
        pipeline = openvino_genai.LLMPipeline(str(write_named(Path(model), Path(folder))), "CPU", **options)
    ids = np.array([[int(t) for t in tokens]])
    inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
    config: Any = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.ignore_eos = int(new), False, True
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps({"tokens": pipeline.generate(inputs, config).tokens[0]}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
