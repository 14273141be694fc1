"""Write small GGUF files of the llama architecture, whose matrices are plain or random blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

SPECIAL = ("<unk>", "<s>", "</s>")

#: the bytes at which blocks have float16 numbers
HALVES = {Kind.Q8_0: [0], Kind.Q4_0: [0], Kind.Q4_1: [0, 2], Kind.Q4_K: [0, 2], Kind.Q6_K: [208]}


def blocks(kind: Kind, rows: int, columns: int, seed: int = 0) -> Any:
    """Return random blocks (rows, bytes), whose every bit is drawn, with finite scales."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(seed)
    made = draw.integers(0, 256, (rows, columns // elements, nbytes), dtype=np.uint8)
    for start in HALVES[kind]:
        halves = (draw.normal(size=(rows, columns // elements, 1)) / 512).astype(np.float16)
        made[..., start : start + 2] = halves.view(np.uint8)
    return made.reshape(rows, -1)


def write_gguf(
    path: Path,
    vocab: int,
    *,
    hidden: int = 24,
    inner: int = 40,
    heads: int = 3,
    kv_heads: int = 3,
    special: Sequence[str] = SPECIAL,
    kinds: Mapping[str, Kind] | None = None,
) -> dict[str, torch.Tensor]:
    """Write a llama of one layer with words as its tokens, and return the values of its matrices by name.

    ``kinds`` maps names of matrices, such as "blk.0.attn_q", to types of blocks; all others are float32.
    """
    rng = np.random.default_rng(0)
    narrow = hidden // heads * kv_heads
    shapes = {
        "token_embd": (vocab, hidden),
        "output": (vocab, hidden),
        "blk.0.ffn_gate": (inner, hidden),
        "blk.0.ffn_up": (inner, hidden),
        "blk.0.ffn_down": (hidden, inner),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (narrow, hidden),
        "blk.0.attn_v": (narrow, hidden),
        "blk.0.attn_output": (hidden, hidden),
        **dict.fromkeys(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), (hidden,)),
    }
    writer = gguf.GGUFWriter(path, "llama")
    _add_sizes(writer, hidden, inner, heads, kv_heads, hidden // heads)
    _add_words(writer, vocab, special)
    made: dict[str, torch.Tensor] = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        made[name] = _add_matrix(writer, name, shape, (kinds or {}).get(name), rng, seed)
    _finish(writer)
    return made


def write_expert_gguf(path: Path, vocab: int, kinds: Mapping[str, Kind], experts: int = 3) -> dict[str, torch.Tensor]:
    """Write a mixture of experts of one layer (qwen3moe), and return the values of its matrices by name.

    transformers does not read the size of an expert from a file, so it has that of its default.
    """
    hidden, inner, head = 256, 768, 16
    writer = gguf.GGUFWriter(path, "qwen3moe")
    _add_sizes(writer, hidden, inner, 4, 2, head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(2)
    _add_words(writer, vocab, SPECIAL)
    shapes = {
        "token_embd": (vocab, hidden),
        "output": (vocab, hidden),
        "blk.0.attn_q": (4 * head, hidden),
        "blk.0.attn_k": (2 * head, hidden),
        "blk.0.attn_v": (2 * head, hidden),
        "blk.0.attn_output": (hidden, 4 * head),
        "blk.0.ffn_gate_inp": (experts, hidden),
        "blk.0.ffn_gate_exps": (experts, inner, hidden),
        "blk.0.ffn_up_exps": (experts, inner, hidden),
        "blk.0.ffn_down_exps": (experts, hidden, inner),
        **dict.fromkeys(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), (hidden,)),
        **dict.fromkeys(("blk.0.attn_q_norm", "blk.0.attn_k_norm"), (head,)),
    }
    rng = np.random.default_rng(0)
    made = {n: _add_matrix(writer, n, s, kinds.get(n), rng, i) for i, (n, s) in enumerate(shapes.items())}
    _finish(writer)
    return made


def _add_sizes(writer: Any, hidden: int, inner: int, heads: int, kv_heads: int, head: int) -> None:
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(1)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(1e-5)


def _add_words(writer: Any, vocab: int, special: Sequence[str]) -> None:
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [str(i) for i in range(10)] + ["Ġ", "Ġw"]
    tokens = [*special, *letters]
    tokens += [f"<{i}>" for i in range(vocab - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (vocab - len(special)))
    writer.add_token_merges(["Ġ w"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _add_matrix(writer: Any, name: str, shape: tuple[int, ...], kind: Kind | None, rng: Any, seed: int) -> torch.Tensor:
    """Add a matrix, or a stack of matrices, of random values or blocks, and return its values."""
    if kind is None:
        values = rng.standard_normal(shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", values)
    else:
        data = blocks(kind, math.prod(shape[:-1]), shape[-1], seed=seed).reshape(*shape[:-1], -1)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
        values = gguf.quants.dequantize(data, kind)
    return torch.from_numpy(values)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
