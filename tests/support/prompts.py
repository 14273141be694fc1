"""Prompt methods of PEFT on the tiny families: inputs padded on either side, and adapters of any number of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from hypothesis import strategies as st
from torch import Tensor

import adaptc
from adaptc.generation.spec import cache_argument_name
from tests.support.families import FAMILIES, VOCAB
from tests.support.oracle import Oracle, assert_same, quiet, shared_base_program

#: what PEFT says of prompts, which is on purpose
PROMPT_WARNINGS = (
    "`is_gradient_checkpointing` is deprecated.*",
    "Position ids are not supported.*",
    ".*past_key_values.*",
)


def prompt_oracle(name: str, path: Path, cls: str = "PromptTuningConfig", seed: int = 0, **config: Any) -> Oracle:
    """A family with a prompt of PEFT's, of random values, saved to ``path``."""
    config = {"task_type": "CAUSAL_LM", **config}
    return Oracle.wrap_and_save(name, getattr(peft, cls)(**config), path, seed=seed)


def text(batch: int, length: int, padding: str | None = "right", seed: int = 0) -> dict[str, Tensor]:
    """Ids, and unless ``padding`` is None a mask in which each row is padded by another number, "left" or "right"."""
    generator = torch.Generator().manual_seed(seed * 100_000 + 1000 * batch + length)
    ids = torch.randint(4, VOCAB, (batch, length), generator=generator)
    if padding is None:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    for row in range(batch):
        n = row * 3 % length
        if n and padding == "left":
            mask[row, :n] = 0
        elif n:
            mask[row, length - n :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def labels(inputs: dict[str, Tensor]) -> Tensor:
    """Labels of which the first ones do not count."""
    out = inputs["input_ids"].clone()
    out[:, : out.shape[1] // 3] = -100
    return out


def run_quietly(module: Any, inputs: dict[str, Tensor]) -> Any:
    with torch.no_grad(), quiet(*PROMPT_WARNINGS):
        return module(**inputs)


def generate_with_peft(model: Any, **options: Any) -> Any:
    """``model.generate`` of PEFT, which finds the cache under the name that transformers gave it once."""
    current_name, old_name = cache_argument_name(), "past_key_values"
    inner, outer = model.base_model_prepare_inputs_for_generation, model.prepare_inputs_for_generation

    def renamed(out: dict[str, Any], old: str, new: str) -> dict[str, Any]:
        return {new if n == old else n: v for n, v in out.items()}

    def base_inputs(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return renamed(inner(*args, **kwargs), current_name, old_name)

    def wrapped_inputs(*args: Any, task_ids: Any = None, **kwargs: Any) -> dict[str, Any]:
        return renamed(outer(*args, task_ids=task_ids, **kwargs), old_name, current_name)

    model.base_model_prepare_inputs_for_generation, model.prepare_inputs_for_generation = base_inputs, wrapped_inputs
    try:
        with torch.no_grad(), quiet(*PROMPT_WARNINGS), torch.random.fork_rng():
            torch.manual_seed(5)
            return model.generate(**options)
    finally:
        model.base_model_prepare_inputs_for_generation = inner
        del model.prepare_inputs_for_generation


#: calls with other numbers of tokens in front: (tokens, batch, length, padding)
CALLS = st.lists(
    st.tuples(st.integers(1, 17), st.integers(1, 5), st.integers(1, 13), st.sampled_from(["left", "right", None])),
    min_size=1,
    max_size=4,
)


def check_saved_program(
    first: Oracle, second: Oracle, inputs: dict[str, Tensor], folder: Path
) -> adaptc.AdaptedProgram:
    """A program that torch or adaptc saved takes other numbers of tokens, too; sizes in its graph follow a swap. Of
    GPT-2; gives its base again."""
    program = adaptc.compile(shared_base_program("gpt2"), first.path)
    adaptc.swap(program, second.path)
    torch.export.save(program, folder / "torch.pt2")
    with torch.no_grad():
        again = torch.export.load(folder / "torch.pt2").module()(**inputs)
    assert_same(again, run_quietly(second.model, inputs))
    adaptc.swap(program, first.path)
    loaded = adaptc.load(adaptc.save(program, folder / "ours.pt2"))
    assert_same(run_quietly(loaded, inputs), run_quietly(first.model, inputs))
    adaptc.swap(loaded, second.path)
    assert_same(run_quietly(loaded, inputs), run_quietly(second.model, inputs))
    unloaded = adaptc.unload(loaded)
    assert_same(run_quietly(unloaded, inputs), run_quietly(FAMILIES["gpt2"].build(), inputs))
    return unloaded
