"""Tensors of an adapter with another number of axes than its slots have, or with no rows at all, are refused as such,
in a directory and in a state dict, off which sizes are read; and the program stays as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import adaptc
from adaptc.errors import AdaptcError, CheckpointError
from tests.support.oracle import file_tensors, shared_base_program

PROMPTS = {
    "prompt": adaptc.PromptTuningConfig(num_virtual_tokens=3),
    "p_tuning": adaptc.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=7),
    "multitask": adaptc.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=5, num_ranks=2),
    "cpt": adaptc.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[4, 5, 6]),
    "prefix": adaptc.PrefixTuningConfig(num_virtual_tokens=3),
    "projected": adaptc.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True),
    "cartridge": adaptc.CartridgeConfig(num_virtual_tokens=3),
}
TARGETS = {"target_modules": ["q_proj", "v_proj"]}
LAYERS = {
    "adaption_prompt": adaptc.AdaptionPromptConfig(adapter_len=3, adapter_layers=2),
    "alora": adaptc.LoraConfig(r=3, alora_invocation_tokens=[7], **TARGETS),
    "dora": adaptc.LoraConfig(r=3, use_dora=True, **TARGETS),
    "lily": adaptc.LilyConfig(r=3, **TARGETS),
    "loha": adaptc.LoHaConfig(r=3, **TARGETS),
    "lora": adaptc.LoraConfig(r=3, **TARGETS),
    "lora_rs": adaptc.LoraConfig(r=3, use_rslora=True, **TARGETS),
    "poly": adaptc.PolyConfig(r=3, n_tasks=5, **TARGETS),
    "vera": adaptc.VeraConfig(r=3, **TARGETS),
}
AXES: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": torch.flatten,
    "scalar": torch.sum,
    "one more": lambda t: t.unsqueeze(0),
    "one more behind": lambda t: t.unsqueeze(-1),
}


def refused(program: adaptc.AdaptedProgram, folder: Path, tensors: dict[str, Tensor], key: str) -> None:
    """From a directory with these tensors, and as a state dict, whole and the one at ``key`` alone."""
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    before = dict(program.binding.values)
    for adapter in (folder, tensors, {key: tensors[key]}):
        with pytest.raises(AdaptcError):
            adaptc.swap(program, adapter)
    assert {k: id(t) for k, t in before.items()} == {k: id(t) for k, t in program.binding.values.items()}


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("name", [*PROMPTS, *LAYERS])
def test_other_axes(name, tmp_path):
    program = adaptc.compile(shared_base_program("llama"), {**PROMPTS, **LAYERS}[name])
    folder = adaptc.save_adapter(program, tmp_path / "adapter")
    good = file_tensors(folder)
    for key, tensor in list(good.items())[:4]:
        for how, change in AXES.items():
            if tensor.ndim == 1 and how == "flat":
                continue
            refused(program, folder, {**good, key: change(tensor)}, key)


@pytest.mark.long
@pytest.mark.parametrize("name", ["prompt", "p_tuning", "multitask"])
def test_other_axes_for_two_stacks(name, tmp_path):
    """Of an encoder and a decoder, whose rows lie one behind the other in files."""
    program = adaptc.compile(shared_base_program("t5"), PROMPTS[name].replace(task_type="SEQ_2_SEQ_LM"))
    folder = adaptc.save_adapter(program, tmp_path / "adapter")
    good = file_tensors(folder)
    for key in good.keys() & {"prompt_embeddings", "prefix_task_cols"}:
        for change in AXES.values():
            refused(program, folder, {**good, key: change(good[key])}, key)


@pytest.mark.few(4)
@pytest.mark.parametrize("name", [n for n in {**PROMPTS, **LAYERS} if n != "multitask"])
def test_no_rows(name, tmp_path):
    """An adapter that would do nothing, and whose config could not be read again."""
    config = {**PROMPTS, **LAYERS}[name]
    program = adaptc.compile(shared_base_program("llama"), config)
    folder = adaptc.save_adapter(program, tmp_path / "adapter")
    good = file_tensors(folder)
    if name in PROMPTS:
        none = {"prompt_embeddings": good["prompt_embeddings"][:0]}
    else:
        sizes = {k: [0 if n == 3 else n for n in t.shape] for k, t in good.items()}
        none = {k: good[k].new_zeros(s) for k, s in sizes.items()}
    assert any(not t.numel() for t in none.values())
    with pytest.raises(CheckpointError, match=r"state dict: .* would do nothing"):
        adaptc.swap(program, none)
    shutil.rmtree(folder)
