"""Write plain LoRA as a GGUF file, as llama.cpp reads it: names of its tensors, one alpha, and its order of rows.

The layout is that of llama.cpp's convert_lora_to_gguf.py and src/llama-adapter.cpp.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptc.adapter_files.atomic_write import atomic_replace, explain_write_errors
from adaptc.adapters.adapter import Adapter
from adaptc.engines.check import read_model_config
from adaptc.engines.facts import FACTOR_NAMES
from adaptc.engines.gguf_families import FAMILIES, Family
from adaptc.errors import CheckpointError, ConfigError, listing
from adaptc.methods.lora_family.lora_config import LoraConfig

_EMBEDDING, _OUTPUT = "token_embd", "output"


def write_gguf(adapter: Adapter, path: Path, model: str | os.PathLike[str]) -> Path:
    """Write ``adapter``, which is plain LoRA of one rank, as a GGUF file for the model in the directory ``model``.

    Raises ConfigError for a family or a layer that llama.cpp's adapters do not have, or without the package gguf.
    Raises CheckpointError where the model has no config or the file cannot be written.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("GGUF files are written with the package gguf: pip install 'adaptc[gguf]'")
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory, and llama.cpp reads one file: give its name, such as lora.gguf")
    import gguf

    config, lora = read_model_config(model), adapter.config
    assert isinstance(lora, LoraConfig)
    family = FAMILIES.get(config["model_type"])
    if family is None:
        raise ConfigError(
            f"{model} is a {config['model_type']!r}, and adapters for llama.cpp are written for {', '.join(FAMILIES)}: "
            "convert the adapter with llama.cpp's convert_lora_to_gguf.py once adaptc convert --for peft --rank has "
            "written its scales out, or merge it, adaptc merge MODEL ADAPTER -o DIR, and convert the model"
        )
    tensors = _name_tensors(adapter, config, family)
    with explain_write_errors(path), atomic_replace(path, "new.gguf") as new:
        writer: Any = gguf.GGUFWriter(new, family.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(lora.r))
        if lora.alora_invocation_tokens:
            kinds = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
            writer.add_key_value(
                gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, [*lora.alora_invocation_tokens], kinds[0], kinds[1]
            )
        for name, value in tensors.items():
            writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def _name_tensors(adapter: Adapter, config: Mapping[str, Any], family: Family) -> dict[str, np.ndarray[Any, Any]]:
    """Return the tensors by their names in GGUF files, in the layout of llama.cpp."""
    import gguf

    names = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(names[family.architecture], int(config["num_hidden_layers"]))
    out: dict[str, np.ndarray[Any, Any]] = {}
    unknown: list[str] = []
    for module, (down, up) in _pairs(adapter).items():
        name = table.get_name(module)
        if name is None:
            unknown.append(module)
            continue
        _check_tied(adapter, module, name, config, family)
        if family.permutes_qk and name.endswith((".attn_q", ".attn_k")):
            heads = config["num_attention_heads"]
            up = _permute_heads(up, heads if name.endswith("q") else config.get("num_key_value_heads") or heads)
        # The loader looks rows of A up by tokens.
        down = down.mT if name == _EMBEDDING else down
        out |= {f"{name}.weight.lora_a": _to_array(down), f"{name}.weight.lora_b": _to_array(up)}
    if unknown:
        raise ConfigError(
            f"{adapter.source}: the architecture {family.architecture!r} of llama.cpp has no tensor for "
            f"{listing(map(repr, unknown), 3)}; leave these out of the adapter, or merge it into the model"
        )
    return out


def _pairs(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for a, b in FACTOR_NAMES:
        modules = [k.removesuffix(f".{a}") for k in adapter.tensors if k.endswith(f".{a}")]
        found |= {m: (adapter.tensors[f"{m}.{a}"], adapter.tensors[f"{m}.{b}"]) for m in modules}
    return found


def _check_tied(adapter: Adapter, module: str, name: str, config: Mapping[str, Any], family: Family) -> None:
    if name in (_EMBEDDING, _OUTPUT) and (family.always_tied or config.get("tie_word_embeddings")):
        raise ConfigError(
            f"{adapter.source}: {module!r} is tied to another layer, and llama.cpp has one tensor for both; leave it "
            "out of the adapter, or merge it into the model"
        )


def _permute_heads(up: Tensor, heads: int) -> Tensor:
    """Return B with the rows of each head in pairs of neighbours, where transformers has two halves."""
    if up.shape[0] % (2 * heads):
        raise ConfigError(
            f"B has {up.shape[0]} rows, which are no {heads} heads of an even size: is it another model's?"
        )
    return up.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _to_array(value: Tensor) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(value.detach().cpu().to(torch.float32).numpy())
