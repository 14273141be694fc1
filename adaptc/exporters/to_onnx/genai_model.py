"""Write a decoder as a folder of ONNX Runtime GenAI, with adapters as inputs and the cache as inputs and outputs.

GenAI calls one ONNX file for prompts and for single tokens. It feeds the keys and values of all tokens so far, and gets
them back with those of the new tokens. Adapters are ``.onnx_adapter`` files, which its ``Adapters`` load by name.

    input_ids, position_ids       (batch, length)               int64
    attention_mask                (batch, past + length)        int64
    past_key_values.<layer>.key   (batch, heads, past, size)    and .value
    -> logits                     (batch, length, vocabulary)
    -> present.<layer>.key        (batch, heads, past + length, size)    and .value
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from adaptc.capture.explain_failure import run_model
from adaptc.capture.model_state import keyword_only_parameter, patch_forward
from adaptc.errors import CaptureError, CheckpointError, ConfigError
from adaptc.exporters.prepare_export import prepare_inputs
from adaptc.exporters.to_onnx.program_to_onnx import write_onnx
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.compile_program import compile_model
from adaptc.runtime.options import RunOptions
from adaptc.torch_typing import is_list_or_tuple

MODEL_FILE = "model.onnx"
CONFIG_FILE = "genai_config.json"
#: sizes of the example step that differ from each other and from those of models
_ROWS, _LENGTH, _PAST = 3, 5, 11


@dataclass(frozen=True)
class _Layers:
    """The layers of a model's cache: their number, and the heads and the size of a key, which are all the same."""

    count: int
    heads: int
    size: int
    dtype: torch.dtype

    def names(self, pattern: str) -> list[str]:
        return [pattern.format(i, kind) for i in range(self.count) for kind in ("key", "value")]


def export_genai(model: Any, adapter: Any, path: str | os.PathLike[str], *, adapter_name: str = "default") -> Path:
    """Write a model of transformers that generates as a folder for ONNX Runtime GenAI, with any adapter as inputs.

    ``onnxruntime_genai.Model(path)`` opens it. It computes the base, or the adapter that
    ``generator.set_active_adapter`` names. :func:`save_onnx_adapter` writes adapters for its ``model.onnx``, and
    ``onnxruntime_genai.Adapters.load`` reads them. The folder gets no tokenizer: ``tokenizer.save_pretrained(path)``
    adds it.

    Args:
        model: a decoder of transformers whose layers keep keys and values of all tokens.
        adapter: a config, or a PEFT directory or other adapter, whose sites the model gets. The values of the adapter
            are not written.
        path: the folder, which is made where there is none.
        adapter_name: the name of the adapter in ``adapter``.

    Returns:
        the folder.

    Raises:
        CaptureError: the model cannot be captured with its cache, or its layers keep something else.
        ConfigError: the config or the adapter has a value that cannot be honoured.
        TargetError: an entry of the config names no layer.
        BackendError: onnx is not installed, or has no operator for one of the program's.
        CheckpointError: the files cannot be written. What was there before stays, here and above.

    Example:
        >>> folder = adaptc.exporters.export_genai(lm, LoraConfig(target_modules=["q_proj"]), "genai")
        >>> sorted(p.name for p in folder.iterdir())
        ['genai_config.json', 'model.onnx', 'model.onnx.data']
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"cannot export to {folder}: it is a file, and GenAI opens folders")
    if not isinstance(model, nn.Module) or not hasattr(model, "generation_config"):
        raise ConfigError(f"export_genai takes a model of transformers that generates, not a {type(model).__name__}")
    untyped: Any = model
    if untyped.config.is_encoder_decoder:
        raise ConfigError(f"{type(model).__name__} has an encoder, and this writes decoders alone")
    layers = _find_layers(untyped)
    prepared = prepare_inputs(_capture(untyped, adapter, adapter_name, layers), "an ONNX file")
    own = ["input_ids", "attention_mask", "position_ids", *layers.names("past_key_values.{}.{}")]
    if len(prepared.input_names) != len(own):
        missing = {_argument(n) for n in own} - set(prepared.input_names)
        raise CaptureError(f"{type(model).__name__} reads no {', '.join(sorted(missing))}, which GenAI feeds")
    prepared = replace(prepared, input_names=own, output_names=["logits", *layers.names("present.{}.{}")])
    config = json.dumps(_genai_config(untyped, layers), indent=2) + "\n"
    write_onnx(prepared, folder / MODEL_FILE, {CONFIG_FILE: config.encode()})
    return folder


def _find_layers(model: Any) -> _Layers:
    """Return the layers of the cache that the model makes of two tokens. Raises CaptureError for other caches."""
    name = type(model).__name__
    out = run_model(model, input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=True)
    found = getattr(out, "cache", None) or getattr(out, "past_key_values", None)
    layers: Sequence[Any] = getattr(found, "layers", None) or ()
    if not layers:
        raise CaptureError(f"{name} gives no cache of keys and values, so GenAI has nothing to go on from")
    sizes: set[tuple[int, int, torch.dtype]] = set()
    for i, layer in enumerate(layers):
        if type(layer).__name__ != "DynamicLayer" or not isinstance(layer.keys, Tensor):
            raise CaptureError(
                f"layer {i} of {name} keeps a {type(layer).__name__}, and GenAI's cache is of keys and values of all "
                "tokens"
            )
        sizes |= {(t.shape[1], t.shape[3], t.dtype) for t in (layer.keys, layer.values)}
    if len(sizes) != 1:
        raise CaptureError(f"the keys and values of {name} have several sizes, and GenAI's cache has one")
    return _Layers(len(layers), *sizes.pop())


def _capture(model: Any, adapter: Any, adapter_name: str, layers: _Layers) -> AdaptedProgram:
    """Return the program of one step, which takes and returns the cache as plain tensors."""
    from transformers.cache_utils import DynamicCache

    device, total = model.device, _PAST + _LENGTH
    rows, length, past = (Dim.AUTO for _ in range(3))
    example: dict[str, Tensor] = {
        "input_ids": torch.ones(_ROWS, _LENGTH, dtype=torch.int64, device=device),
        "attention_mask": torch.ones(_ROWS, total, dtype=torch.int64, device=device),
        "position_ids": torch.arange(_PAST, total, device=device).expand(_ROWS, -1).contiguous(),
    }
    names = [_argument(n) for n in layers.names("past_key_values.{}.{}")]
    for n in names:
        shape = (_ROWS, layers.heads, _PAST, layers.size)
        example[n] = torch.zeros(shape, dtype=layers.dtype, device=device)
    shapes = {n: {0: rows, 2: past} if n in names else {0: rows, 1: length} for n in example}
    original = model.forward

    def forward(**inputs: Any) -> tuple[Tensor, ...]:
        tensors = [inputs.pop(n) for n in names]
        _relate_sizes(inputs, tensors)
        cache: Any = DynamicCache(ddp_cache_data=list(zip(tensors[::2], tensors[1::2], strict=True)))
        out = original(**inputs, past_key_values=cache, use_cache=True)
        return (out.logits, *(t for layer in cache.layers for t in (layer.keys, layer.values)))

    with patch_forward(model, forward, [keyword_only_parameter(n) for n in example]):
        return compile_model(
            AdaptedProgram,
            model,
            adapter,
            RunOptions(),
            example_inputs=example,
            dynamic_shapes=shapes,
            adapter_name=adapter_name,
        )


def _relate_sizes(inputs: dict[str, Any], past: Sequence[Tensor]) -> None:
    """Compare the sizes that must be equal, so that torch's tracer learns that they are."""
    rows, length = inputs["input_ids"].shape
    done = past[0].shape[2]
    if any(t.shape[0] != rows or t.shape[2] != done for t in past):
        raise CaptureError("the tensors of the cache have different sizes")
    if tuple(inputs["position_ids"].shape) != (rows, length) or inputs["attention_mask"].shape[0] != rows:
        raise CaptureError("position_ids and attention_mask are not of the rows of input_ids")
    if inputs["attention_mask"].shape[1] != done + length:
        raise CaptureError("attention_mask is not of the past and the new tokens")


def _argument(name: str) -> str:
    return name.replace(".", "_")


def _genai_config(model: Any, layers: _Layers) -> dict[str, Any]:
    """Return the content of GenAI's config of a decoder."""
    config, generation = model.config.get_text_config(decoder=True), model.generation_config
    ends = generation.eos_token_id if generation.eos_token_id is not None else config.eos_token_id
    first_end = ends[0] if is_list_or_tuple(ends) and ends else ends
    fill = generation.pad_token_id if generation.pad_token_id is not None else config.pad_token_id
    context = getattr(config, "max_position_embeddings", None) or 2048
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "log_severity_level": 3, "provider_options": []},
        "filename": MODEL_FILE,
        "head_size": layers.size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": layers.count,
        "num_key_value_heads": layers.heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    tokens: dict[str, Any] = {
        "bos_token_id": generation.bos_token_id if generation.bos_token_id is not None else config.bos_token_id,
        "eos_token_id": ends,
        "pad_token_id": fill if fill is not None else first_end,
    }
    return {
        "model": {
            "type": "decoder",
            "context_length": context,
            "vocab_size": config.vocab_size,
            **{name: value for name, value in tokens.items() if value is not None},
            "decoder": decoder,
        },
        "search": {"do_sample": False, "max_length": context, "num_beams": 1, "past_present_share_buffer": False},
    }
