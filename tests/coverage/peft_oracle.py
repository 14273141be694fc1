"""Asks PEFT for what adaptc's outputs and tokens are compared with."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from adaptc.methods.lora_family.lora_config import LoraConfig
from tests.coverage.outputs import Call, Outputs, difference, float_tensors, run
from tests.coverage.rows import Result
from tests.coverage.small_values import random_ids, reason

LORA: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "init_lora_weights": False}
NO_EFFECT = "PEFT's adapter changes nothing"
GENERATE: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


@dataclass
class Oracle:
    """The answer of PEFT: a directory, outputs, the merged model's, tokens. ``merged_tokens`` are those of the merged
    model where its outputs differ.

    Without PEFT, it has a config and the base's outputs.
    """

    adapter: Any
    outputs: list[Outputs]
    merged: list[Outputs] | None = None
    tokens: torch.Tensor | None = None
    tokens_without_cache: torch.Tensor | None = None
    merged_tokens: torch.Tensor | None = None


def ask_peft(
    model: Any, calls: list[Call], directory: str, result: Result, idle: list[str], *, generates: bool
) -> Oracle:
    """Return what PEFT says with an adapter on all linear layers but ``idle``, which is written to ``directory``."""
    import peft

    base = [run(model, call) for call in calls]
    config = peft.LoraConfig(**LORA, exclude_modules=idle or None)
    try:
        wrapped = _wrap(model, config, result)
        wrapped.save_pretrained(directory, save_embedding_layers=False)
        outputs = [run(wrapped, call) for call in calls]
    except Exception as error:
        result.peft = reason(error)
        unused = set(idle_layers(model, calls))
        targets = [t for t in _convolutions(model) if t not in unused] or "all-linear"
        return Oracle(LoraConfig(**{**LORA, "target_modules": targets}), base)
    if not difference(outputs[0], base[0]):
        result.notes.append(NO_EFFECT)
    tokens = _tokens_of(wrapped, result) if generates else None
    without_cache = None if tokens is None else _tokens_of(wrapped, result, use_cache=False)
    merged_tokens = None
    try:
        merged_model = wrapped.merge_and_unload()
        merged = [run(merged_model, call) for call in calls]
        if tokens is not None and difference(merged[0], outputs[0]):
            merged_tokens = _tokens_of(merged_model, result)
    except Exception as error:
        result.notes.append(f"PEFT does not merge: {reason(error)}")
        merged = None
    return Oracle(directory, outputs, merged, tokens, without_cache, merged_tokens)


def _wrap(model: Any, config: Any, result: Result) -> Any:
    """Return PEFT's model. Where PEFT refuses all linear layers, it adapts what it can, and a note says so."""
    import peft

    if layers := _convolutions(model):
        result.notes.append("adapted in its convolutions, since it has no linear layer")
        config.target_modules = set(layers)
    try:
        torch.manual_seed(1)
        return peft.get_peft_model(_with_embeddings(model), config).eval()
    except ValueError as error:
        if "incompatible with Mamba-based models" not in str(error):
            raise
    result.notes.append("PEFT adapts no out_proj here")
    torch.manual_seed(1)
    config.exclude_modules = [*(config.exclude_modules or ()), "out_proj", "conv1d"]
    return peft.get_peft_model(_with_embeddings(model), config).eval()


def _with_embeddings(model: Any) -> Any:
    """Return a copy of a model that has what PEFT asks for to find tied weights."""
    copied = copy.deepcopy(model)
    try:
        copied.get_input_embeddings()
    except NotImplementedError:
        copied.get_input_embeddings = torch.nn.Module
    return copied


def _convolutions(model: Any) -> list[str]:
    """Return the convolutions of a model without linear layers, and nothing for other models."""
    if any(isinstance(m, torch.nn.Linear) for m in model.modules()):
        return []
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, (torch.nn.Conv1d, torch.nn.Conv2d))]
    return [name for name, module in found if module.groups == 1]


def idle_layers(model: Any, calls: list[Call]) -> list[str]:
    """Return the modules whose weight does not act on the output: the model never calls them."""
    copied = copy.deepcopy(model)
    outputs = copied(**copy.deepcopy(calls[0]))
    tensors = [t for t in float_tensors(outputs, detached=False).values() if t.requires_grad]
    torch.stack([t.sum() for t in tensors]).sum().backward()
    return [n for n, m in copied.named_modules() if getattr(getattr(m, "weight", 0), "grad", 0) is None]


def _tokens_of(wrapped: Any, result: Result, **options: Any) -> torch.Tensor | None:
    try:
        torch.manual_seed(0)
        return wrapped.generate(input_ids=random_ids(2, 7), **GENERATE, **options)
    except Exception as error:
        if not options:
            result.generation, result.generation_reason = "PEFT does not generate", reason(error)
        return None
