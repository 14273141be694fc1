"""A swap to an adapter whose options need other code than the program has names these options, whatever the method
calls its tensors in files, and proposes no name that a tensor has already."""

from __future__ import annotations

import pytest
import torch

import adaptc
from adaptc.errors import CheckpointError, SwapError
from tests.support.oracle import file_tensors, shared_base_program

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


@pytest.mark.few(2)
@pytest.mark.parametrize("name", list(OTHERS))
def test_options_are_named(name, tmp_path):
    config, other, message = OTHERS[name]
    folder = adaptc.save_adapter(adaptc.compile(shared_base_program("llama"), other), tmp_path)
    program = adaptc.compile(shared_base_program("llama"), config)
    with pytest.raises(SwapError, match=message) as raised:
        adaptc.swap(program, folder)
    for key in file_tensors(adaptc.save_adapter(program, tmp_path / "own")):
        assert f"{key.removeprefix('base_model.model.')!r} (nearest" not in str(raised.value)


def test_a_config_that_says_another_width_of_the_model():
    """What would be written of it could not be read."""
    program, rows = (
        adaptc.compile(shared_base_program("llama"), adaptc.PromptTuningConfig(**TOKENS)),
        torch.randn(5, 24),
    )
    other, own = (adaptc.PromptTuningConfig(num_virtual_tokens=5, token_dim=width) for width in (99, 24))
    before = program.binding
    with pytest.raises(CheckpointError, match="token_dim=99, and the program has 24"):
        adaptc.swap(program, {"prompt_embeddings": rows}, config=other)
    assert program.binding is before
    adaptc.swap(program, {"prompt_embeddings": rows}, config=own)
    assert program.binding.config.token_dim == 24
