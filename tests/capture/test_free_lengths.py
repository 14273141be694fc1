"""Models that loop over positions or over chunks are captured for any length, and compute what PEFT computes."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import adaptc
from tests.coverage.configs.tiny_configs import tiny_config
from tests.support.families import perturb
from tests.support.oracle import (
    assert_differs,
    assert_same,
    assert_same_gradients,
    file_key_of,
    gradients,
    quiet,
    randomize,
)

#: family -> the names of its class, and of the layers that PEFT adapts
FAMILIES = {
    "mamba": ("MambaForCausalLM", ["in_proj", "x_proj"]),
    "falcon_mamba": ("FalconMambaForCausalLM", ["in_proj", "x_proj"]),
    "jamba": ("JambaForCausalLM", ["in_proj", "x_proj", "v_proj"]),
    "zamba": ("ZambaForCausalLM", ["in_proj", "out_proj"]),
    "mamba2": ("Mamba2ForCausalLM", ["in_proj"]),
    "bamba": ("BambaForCausalLM", ["in_proj", "v_proj"]),
    "nemotron_h": ("NemotronHForCausalLM", ["in_proj", "v_proj"]),
    "zamba2": ("Zamba2ForCausalLM", ["out_proj"]),
    "rwkv": ("RwkvForCausalLM", ["key", "value", "receptance"]),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", ["linear_x", "linear_out", "v_proj"]),
}


def build(family: str) -> Any:
    model_class = getattr(transformers, FAMILIES[family][0])
    config = tiny_config(family, model_class)
    config.mamba_chunk_size = 8  # where there is one: that of other names is small in a tiny config
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).float()
    perturb(model)
    return model.eval()


def call(batch: int, length: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(length)
    ids = torch.randint(4, 60, (batch, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.long
@pytest.mark.few(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_pefts_for_other_lengths(family: str) -> None:
    targets = FAMILIES[family][1]
    with quiet():
        theirs = peft.get_peft_model(build(family), peft.LoraConfig(r=3, target_modules=targets)).eval()
    randomize(theirs)
    module = adaptc.compile(build(family), adaptc.LoraConfig(r=3, target_modules=targets)).module()
    values = {file_key_of(n): p for n, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(values[file_key_of(name)])
    for batch, length in ((3, 5), (2, 19)):
        inputs = call(batch, length)
        ours, want = module(**inputs), theirs(**inputs, use_cache=False)
        assert_same(ours.logits, want.logits)
        assert_same_gradients(gradients(module, ours.logits), gradients(theirs, want.logits))
        with theirs.disable_adapter():
            assert_differs(want.logits, theirs(**inputs, use_cache=False).logits, 1e-3)
