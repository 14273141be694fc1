"""Models of the families whose attention is written out, and their programs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

import adaptc
from adaptc import LoraConfig
from tests.support.families import FAMILIES
from tests.support.prompts import run_quietly

#: of adaption prompts
OPTIONS = {"adapter_len": 5, "adapter_layers": 2}


def eager_model(name: str) -> Any:
    model = FAMILIES[name].build()
    model.set_attn_implementation("eager")
    return model


@cache
def eager_base_program(name: str) -> adaptc.AdaptedProgram:
    model, example = eager_model(name), FAMILIES[name].inputs(2, 6)
    found = adaptc.compile(model, LoraConfig(r=2, target_modules="all-linear"), example_inputs=example)
    program = adaptc.unload(found)
    assert not program.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    return program


def unpadded_logits(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits of tokens that count: with a window, one that is padding may see nothing at all, and is anything."""
    logits = run_quietly(model, inputs).logits
    return {"logits": logits[inputs["attention_mask"].bool()] if "attention_mask" in inputs else logits}
