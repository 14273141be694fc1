"""Attention to tokens of an adapter's own, computed plainly: transformers' attention function with the formula added.

Works for any model whose attention goes through transformers' table of attention functions, given how its module makes
keys and values of tokens.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

#: module, tokens (count, width), heads of queries and their width -> keys and values, (count, heads, width) each
MakeKeysAndValues = Callable[[Any, Tensor, int, int], tuple[Tensor, Tensor]]


def from_separate_layers(module: Any, tokens: Tensor, heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Layers of their own for keys and values."""
    return tuple(getattr(module, n)(tokens).unflatten(-1, (-1, head_dim)) for n in ("k_proj", "v_proj"))  # type: ignore


def from_packed_layer(name: str) -> MakeKeysAndValues:
    """One layer for queries, keys and values, in this order."""

    def made(module: Any, tokens: Tensor, heads: int, width: int) -> tuple[Tensor, Tensor]:
        rest = getattr(module, name)(tokens)[:, heads * width :]
        keys, values = rest.chunk(2, -1)
        return keys.unflatten(-1, (-1, width)), values.unflatten(-1, (-1, width))

    return made


def from_interleaved_layer(name: str) -> MakeKeysAndValues:
    """One layer that makes query, key and value of one head after the other."""

    def made(module: Any, tokens: Tensor, heads: int, width: int) -> tuple[Tensor, Tensor]:
        each = getattr(module, name)(tokens).unflatten(-1, (heads, 3, width))
        return each[:, :, 1], each[:, :, 2]

    return made


def draw_adaption_prompts(program: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Random values for the adaption prompts of a program, which it has from then on, by their module."""
    torch.manual_seed(4)
    slots = {}
    with torch.no_grad():
        for a in program.adaptation.attachments:
            prompt, gate = (program.binding.values[a.slots[n]] for n in ("adaption_prompt", "adaption_gate"))
            slots[a.key] = prompt.copy_(torch.randn_like(prompt)), gate.copy_(torch.randn_like(gate))
    return slots


@contextlib.contextmanager
def with_adaption_prompts(
    model: nn.Module,
    slots: Mapping[str, tuple[Tensor, Tensor]],
    make_keys_and_values: MakeKeysAndValues = from_separate_layers,
    is_eager: bool = False,
) -> Iterator[None]:
    """While it holds, the modules of ``model`` named in ``slots`` attend to a prompt (1, count, width) with a gate;
    ``is_eager``: those of a model whose attention is not PyTorch's."""
    model_module = sys.modules[type(model).__module__]
    original = model_module.eager_attention_forward if is_eager else ALL_ATTENTION_FUNCTIONS["sdpa"]
    by_module = {id(model.get_submodule(n)): pair for n, pair in slots.items()}

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        out, rest = original(module, query, key, value, mask, **options)
        if id(module) not in by_module:
            return out, rest
        (prompt, gate), scale = by_module[id(module)], options.get("scaling")
        own = (t.transpose(0, 1) for t in make_keys_and_values(module, prompt[0], query.shape[1], query.shape[3]))
        keys, values = (t.repeat_interleave(query.shape[1] // t.shape[0], 0) for t in own)
        scores = torch.einsum("bhqd,hnd->bhqn", query, keys) * (query.shape[3] ** -0.5 if scale is None else scale)
        if cap := options.get("softcap"):
            scores = cap * (scores / cap).tanh()
        return out + gate * torch.einsum("bhqn,hnd->bqhd", scores.softmax(-1), values), rest

    def set_attention(function: Any) -> None:
        if is_eager:
            model_module.eager_attention_forward = function
        else:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = function

    set_attention(attend)
    try:
        yield
    finally:
        set_attention(original)
