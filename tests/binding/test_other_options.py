"""A swap to an adapter whose options need other code than the program has names these options, whatever the method
calls its tensors in files, and proposes no name that a tensor has already."""

from __future__ import annotations

import pytest

import adaptc
from adaptc.errors import SwapError
from tests.support.oracle import base, file_tensors

TOKENS = {"num_virtual_tokens": 3}
TARGETS = {"target_modules": ["q_proj"]}
OTHERS = {
    "tasks": (
        adaptc.MultitaskPromptTuningConfig(**TOKENS, num_tasks=2),
        adaptc.MultitaskPromptTuningConfig(**TOKENS, num_tasks=5),
        r"'model.embed_tokens.weight' was compiled for tasks=2, and the adapter has tasks=5",
    ),
    "encoder": (
        adaptc.PromptEncoderConfig(**TOKENS),
        adaptc.PromptEncoderConfig(**TOKENS, encoder_reparameterization_type="LSTM"),
        r"compiled for encoder='MLP'.*, and the adapter has encoder='LSTM'",
    ),
    "method": (
        adaptc.PrefixTuningConfig(**TOKENS),
        adaptc.CartridgeConfig(**TOKENS),
        r"compiled for method='prefix_tuning'.*, and the adapter has method='cartridge'",
    ),
    "experts": (
        adaptc.LilyConfig(r=2, **TARGETS),
        adaptc.LilyConfig(r=2, num_B=3, **TARGETS),
        r"'model.layers.0.self_attn.q_proj' was compiled for count=2, and the adapter has count=3",
    ),
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_options_are_named(name, tmp_path):
    config, other, message = OTHERS[name]
    folder = adaptc.save_adapter(adaptc.compile(base("llama"), other), tmp_path)
    program = adaptc.compile(base("llama"), config)
    with pytest.raises(SwapError, match=message) as raised:
        adaptc.swap(program, folder)
    for key in file_tensors(adaptc.save_adapter(program, tmp_path / "own")):
        assert f"{key.removeprefix('base_model.model.')!r} (nearest" not in str(raised.value)
