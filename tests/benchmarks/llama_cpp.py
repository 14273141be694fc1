"""Decode next to llama.cpp: SmolLM2 from GGUF files of several types, with the same LoRA of rank 16 on all layers.

``python -m tests.benchmarks.llama_cpp PYTHON [rounds]``: PYTHON is an interpreter of another environment, with the
package ``xllamacpp``. All sides have the weights of SmolLM2's file, stored again in each type, and the same threads. A
call continues a prompt of 16 tokens by 64, greedily; the prompt counts. llama.cpp rounds the inputs of quantised layers
to 8 bits, and adaptc does not. The aim is that adaptc takes no longer, for Q8_0 and Q4_0.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import adaptc
from examples.quickstart import gguf_path
from tests.benchmarks.generating import decode_call, per_token
from tests.benchmarks.harness import Row, interleave, machine, markdown
from tests.benchmarks.model import tokens

PROMPT, NEW, RANK, ALPHA = 16, 64, 16, 32
TYPES = {"Q8_0": torch.float32, "Q4_0": torch.float32, "BF16": torch.bfloat16, "F32": torch.float32}
#: PEFT's name of a layer -> its name in a GGUF file
LAYERS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_model(path: Path, kind: str) -> Path:
    """Write SmolLM2's file again, with its matrices stored as ``kind``, and return ``path``."""
    source, wanted = gguf.GGUFReader(gguf_path()), gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    for field in source.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            value_type, *rest = field.types
            writer.add_key_value(field.name, field.contents(), value_type, rest[-1] if rest else None)
    for tensor in source.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        to = wanted if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, to), raw_dtype=to)
    _finish(writer)
    return path


def write_lora(path: Path, adapter: Path) -> Path:
    """Write a LoRA of PEFT's as a GGUF file, and return ``path``."""
    from safetensors.torch import load_file

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    for key, value in load_file(adapter / "adapter_model.safetensors").items():
        _, _, number, rest = key.removeprefix("base_model.model.").split(".", 3)
        layer, _, factor = rest.removesuffix(".weight").rpartition(".")
        values, name = value.float().numpy(), LAYERS[layer]
        if factor == "lora_B" and name in ("attn_q", "attn_k"):
            # llama.cpp's rotary embedding pairs neighbours, and transformers' the halves of a head.
            values = values.reshape(-1, 2, 32, RANK).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"blk.{number}.{name}.weight.{factor.lower()}", np.ascontiguousarray(values))
    _finish(writer)
    return path


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Peer:
    """A process of llama.cpp that waits for lines. ``arguments`` are those of ``llama_cpp_peer``."""

    def __init__(self, python: str, *arguments: Any) -> None:
        script = Path(__file__).with_name("llama_cpp_peer.py")
        self.process = subprocess.Popen(
            [python, str(script), *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._read(lambda line: line == "ready")

    def _read(self, is_wanted: Callable[[str], bool]) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if is_wanted(line.strip()):
                return line
        raise RuntimeError("llama.cpp ended: is xllamacpp in that environment?")

    def __call__(self, line: str = "go") -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return json.loads(self._read(lambda line: line.startswith("{")))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def load_model(path: Path, dtype: torch.dtype, *, keep_blocks: bool) -> Any:
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, quantization_config=plain
    )
    return adaptc.quantize(model.eval(), gguf_file=path) if keep_blocks else model.eval()


def run(python: str, rounds: int, folder: Path) -> list[Row]:
    draw = torch.Generator().manual_seed(0)
    prompt = tokens(1, PROMPT)["input_ids"]
    config = adaptc.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights=False)
    tokenizer = AutoTokenizer.from_pretrained(gguf_path().parent, gguf_file=gguf_path().name)
    rows: list[Row] = []
    adapter: Path | None = None
    for kind, dtype in TYPES.items():
        file = write_model(folder / f"{kind}.gguf", kind)
        model = load_model(file, dtype, keep_blocks=kind.startswith("Q"))
        gen = adaptc.compile_for_generation(
            model, config if adapter is None else str(adapter), max_batch=1, max_length=256, backend="inductor"
        )
        if adapter is None:
            for value in gen.program.binding.values.values():
                if value.ndim > 1:
                    torch.nn.init.normal_(value, std=0.02, generator=draw)
            adapter = adaptc.save_adapter(gen, folder / "adapter")
            write_lora(folder / "lora.gguf", adapter)
        peers = [
            Peer(python, file, lora, torch.get_num_threads(), NEW, *prompt[0].tolist())
            for lora in (folder / "lora.gguf", "-")
        ]
        calls: dict[str, Any] = {"llama.cpp": peers[0], "adaptc": decode_call(gen, 1, PROMPT, NEW)}
        calls |= {"llama.cpp, no adapter": peers[1], "adaptc, no adapter": decode_call(gen.base, 1, PROMPT, NEW)}
        rows += per_token(interleave(f"decode, {kind}", calls, "llama.cpp", rounds, 2), NEW)
        ours = tokenizer.decode(gen.generate(prompt, max_new_tokens=NEW, do_sample=False)[0, PROMPT:])
        theirs = peers[0]()
        equal = next((i for i, (a, b) in enumerate(zip(ours, theirs["text"], strict=False)) if a != b), len(ours))
        print(
            f"{kind}: the first {equal} of {len(ours)} letters are those of llama.cpp, which took "
            f"{theirs['ms']:.1f} ms a token by its own clock",
            file=sys.stderr,
        )
        for peer in peers:
            peer.close()
        print(markdown(rows[-4:]), file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    load = os.getloadavg()[0]
    interpreter, count = [*sys.argv[1:], "5"][:2]
    with tempfile.TemporaryDirectory() as made_in:
        table = markdown(run(interpreter, int(count), Path(made_in)))
    print(f"SmolLM2, measured on {machine()}, load {load:.1f} before. Per new token.\n\n{table}")
