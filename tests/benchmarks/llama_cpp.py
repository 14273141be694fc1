"""Decode next to llama.cpp: SmolLM2 from GGUF files of several types, with the same LoRA of rank 16 on all layers.

``python -m tests.benchmarks.llama_cpp PYTHON [rounds] [OPENVINO]``: PYTHON is an interpreter of another environment,
with the package ``xllamacpp``, and OPENVINO of one with ``openvino-genai``. All sides have the weights of SmolLM2's
file, stored again in each type, and the same threads. A call continues a prompt of 16 tokens by 64, greedily; the
prompt counts. llama.cpp rounds the inputs of quantised layers to 8 bits, and adaptc does not. The aims: no longer than
llama.cpp for Q8_0, 0.75 of it in float32 and 0.9 in bfloat16, 0.75 of OpenVINO, and 0.35 of llama.cpp for eight rows.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
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
from tests.benchmarks.peer import Peer

PROMPT, NEW, RANK, ALPHA, ROWS = 16, 64, 16, 32, 8
TYPES = {"Q8_0": torch.float32, "Q4_0": torch.float32, "BF16": torch.bfloat16, "F32": torch.float32}
#: the precision in which OpenVINO computes for a type, "-" for its own choice. It reads the weights as F16, as its
#: reader of GGUF files refuses F32 and BF16. In a quantised file the weights have no names by which a LoRA finds its
#: layers.
OPENVINO = {"BF16": "-", "F32": "f32"}
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


def load_model(path: Path, dtype: torch.dtype, *, keep_blocks: bool) -> Any:
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, quantization_config=plain
    )
    return adaptc.quantize(model.eval(), gguf_file=path) if keep_blocks else model.eval()


def run(python: str, rounds: int, openvino: str, folder: Path) -> list[Row]:
    rows: list[Row] = []
    adapters: list[Path] = []
    for kind, dtype in TYPES.items():
        file = write_model(folder / f"{kind}.gguf", kind)
        model = load_model(file, dtype, keep_blocks=kind.startswith("Q"))
        adapters = adapters or write_adapters(model, folder)
        gen = adaptc.compile_for_generation(model, str(adapters[0]), max_batch=ROWS, max_length=256, backend="inductor")
        found = one_row(python, rounds, openvino, kind, gen, adapters[0], folder)
        found += eight_rows(python, rounds, kind, gen, adapters, folder)
        print(markdown(found), file=sys.stderr, flush=True)
        rows += found
    return rows


def one_row(python: str, rounds: int, openvino: str, kind: str, gen: Any, adapter: Path, folder: Path) -> list[Row]:
    """Time a text of one row, with a LoRA and without, for a new token."""
    prompt = tokens(1, PROMPT)["input_ids"]
    text = (torch.get_num_threads(), NEW, *prompt[0].tolist())
    peers: dict[str, Peer] = {}
    for name, lora in {"llama.cpp": folder / "0.gguf", "llama.cpp, no adapter": "-"}.items():
        peers[name] = Peer(python, "llama_cpp_peer.py", folder / f"{kind}.gguf", lora, *text)
    if openvino and kind in OPENVINO:
        source = write_model(folder / f"openvino-{kind}.gguf", "F16")
        for name, lora in {"OpenVINO": adapter / "adapter_model.safetensors", "OpenVINO, no adapter": "-"}.items():
            peers[name] = Peer(openvino, "openvino_peer.py", source, lora, OPENVINO[kind], *text)
    own = {"adaptc": gen, "adaptc, no adapter": gen.base}
    calls: dict[str, Any] = {**peers, **{name: decode_call(one, 1, PROMPT, NEW) for name, one in own.items()}}
    rows = per_token(interleave(f"decode, {kind}", calls, "llama.cpp", rounds, 2), NEW)

    tokenizer = AutoTokenizer.from_pretrained(gguf_path().parent, gguf_file=gguf_path().name)
    ours = tokenizer.decode(gen.generate(prompt, max_new_tokens=NEW, do_sample=False)[0, PROMPT:])
    for name in ("llama.cpp", "OpenVINO"):
        if name in peers:
            found = peers[name]()
            theirs = found["text"] if "text" in found else tokenizer.decode(found["tokens"])
            equal = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
            own_clock = f", which took {found['ms']:.1f} ms a token by its own clock" if "ms" in found else ""
            print(f"{kind}: the first {equal} of {len(ours)} letters are those of {name}{own_clock}", file=sys.stderr)
    for peer in peers.values():
        peer.close()
    return rows


def write_adapters(model: Any, folder: Path) -> list[Path]:
    """Write as many LoRAs as there are rows, both as PEFT and as llama.cpp have them, and return PEFT's directories."""
    config = adaptc.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights=False)
    draw, program, made = torch.Generator().manual_seed(0), adaptc.compile(model, config), []
    for i in range(ROWS):
        for value in program.binding.values.values():
            if value.ndim > 1:
                torch.nn.init.normal_(value, std=0.02, generator=draw)
        made.append(adaptc.save_adapter(program, folder / f"adapter{i}"))
        write_lora(folder / f"{i}.gguf", made[-1])
    return made


def eight_rows(python: str, rounds: int, kind: str, gen: Any, adapters: list[Path], folder: Path) -> list[Row]:
    """Time a batch whose rows have an adapter each, for a new token of all rows."""
    x = tokens(ROWS, PROMPT)
    requests = [(row, i) for i, row in enumerate(x["input_ids"].tolist())]
    work = {
        "model": str(folder / f"{kind}.gguf"),
        "loras": [str(folder / f"{i}.gguf") for i in range(ROWS)],
        "new": NEW,
    }
    work |= {"threads": torch.get_num_threads(), "calls": {"mixed": requests}}
    (folder / "work.json").write_text(json.dumps(work))
    server = Peer(python, "serving/llama_cpp_server.py", folder / "work.json")
    bank = gen.bank({str(i): path for i, path in enumerate(adapters)})
    how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    names = [str(i) for i in range(ROWS)]
    calls = {
        "llama.cpp's server": lambda: server("mixed"),
        "adaptc, a bank": lambda: bank.generate(**x, **how, adapters=names),
    }
    found = interleave(f"{ROWS} rows on {ROWS} adapters, {kind}", calls, "llama.cpp's server", rounds, 1)
    server.close()
    return per_token(found, NEW)


if __name__ == "__main__":
    load = os.getloadavg()[0]
    interpreter, count, other = [*sys.argv[1:], "5", ""][:3]
    with tempfile.TemporaryDirectory() as made_in:
        table = markdown(run(interpreter, int(count), other, Path(made_in)))
    print(f"SmolLM2, measured on {machine()}, load {load:.1f} before. Per new token.\n\n{table}")
