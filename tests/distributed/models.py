"""Small language models of odd sizes, and programs of them to train, which are made once for all processes."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import transformers
from torch import Tensor

import adaptc
from tests.support import training
from tests.support.training import VOCABULARY

CONFIG: dict[str, Any] = {**training.CONFIG, "init_lora_weights": False}


@functools.cache
def llama(layers: int = 2, dtype: torch.dtype = torch.float64) -> Any:
    """Not to be changed: a model whose head is tied to its embeddings."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=layers,
        num_attention_heads=5,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval().to(dtype)


@functools.cache
def program(layers: int = 2, dtype: torch.dtype = torch.float64) -> adaptc.AdaptedProgram:
    """Not to be changed: a program to train."""
    g = torch.Generator().manual_seed(1)
    return adaptc.compile(llama(layers, dtype), adaptc.LoraConfig(**CONFIG), training=True, generator=g)


@functools.cache
def upper_program() -> adaptc.AdaptedProgram:
    """A program whose first layer has no adapter."""
    config = adaptc.LoraConfig(**CONFIG | {"layers_to_transform": [1]})
    return adaptc.compile(llama(), config, training=True, generator=torch.Generator().manual_seed(1))


def grouped_llama() -> Any:
    """Return a new model with biases, and with two heads of queries for each of keys."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY + 3,
        hidden_size=28,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        attention_bias=True,
        mlp_bias=True,
    )
    model = transformers.LlamaForCausalLM(config).eval().double()
    for name, norm in list(model.named_modules()):
        if isinstance(norm, transformers.models.llama.modeling_llama.LlamaRMSNorm):
            model.set_submodule(name, ExactNorm(config.hidden_size).double())
    return model


class ExactNorm(torch.nn.Module):
    """The norm of a Llama in the dtype of its input; that of transformers rounds to float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.8, 1.3, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@functools.cache
def seq2seq_program() -> adaptc.AdaptedProgram:
    """A program whose decoder reads in every block what the encoder gave."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": 7, "d_ff": 40, "num_heads": 3, "num_layers": 2}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0)
    model = transformers.T5ForConditionalGeneration(config).eval().double()
    lora = adaptc.LoraConfig(r=3, target_modules=["q", "v"], init_lora_weights=False)
    return adaptc.compile(model, lora, training=True, generator=torch.Generator().manual_seed(1))


#: where it is cut into four stages
SEQ2SEQ_CUTS = ["encoder.block.1", "decoder.block.0", "decoder.block.1"]


def seq2seq_batch() -> dict[str, Tensor]:
    rows = batch()
    return rows | {"labels": batch(tokens=5, seed=3)["input_ids"]}


def mean_of_tokens(outputs: Any, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


def gradients_alone(program: adaptc.AdaptedProgram, rows: dict[str, Tensor], loss: Any) -> dict[str, Tensor]:
    module = program.module().train()
    loss(module(**rows), rows["labels"]).backward()
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def own_program(layers: int = 2, dtype: torch.dtype = torch.float64) -> adaptc.AdaptedProgram:
    return copy.deepcopy(program(layers, dtype))


def batch(rows: int = 12, tokens: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Rows of which each has another number of labels, and the last one padding."""
    ids = torch.randint(1, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    labels, mask = ids.clone(), torch.ones_like(ids)
    for i in range(rows):
        labels[i, : i % (tokens - 2)] = -100
    mask[-1, -2:], labels[-1, -2:] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def even_batch(rows: int = 12, tokens: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Rows with as many labels each."""
    found = batch(rows, tokens, seed)
    return found | {"labels": found["input_ids"].clone()}


def optimizer_of(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def exact_loss(outputs: Any, labels: Tensor) -> Tensor:
    """The mean over all labels of a batch, in the dtype of the logits; that of transformers is float32.

    Each part of a batch has as many labels as any other here.
    """
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def trained_alone(program: adaptc.AdaptedProgram, steps: int, exact: bool) -> tuple[list[float], Any]:
    """The losses of one process with whole batches, and its module."""
    module = program.module().train()
    optimizer, found = optimizer_of([p for p in module.parameters() if p.requires_grad]), []
    for i in range(steps):
        optimizer.zero_grad()
        rows = even_batch(seed=i) if exact else batch(seed=i)
        loss = exact_loss(module(**rows), rows["labels"]) if exact else module(**rows).loss
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found, module


def step_with(pipe: Any, optimizer: torch.optim.Optimizer, seed: int, exact: bool = False) -> float:
    """One step of a pipeline."""
    optimizer.zero_grad()
    loss = pipe.step(**even_batch(seed=seed) if exact else batch(seed=seed))
    optimizer.step()
    return loss.item()
