"""Options that do nothing beside the others are told of, as they are read and from files, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest

import adaptc
from adaptc.errors import AdaptcWarning
from tests.support.oracle import shared_base_program

UNUSED = {
    "layers of an MLP": (adaptc.PromptEncoderConfig, {"encoder_num_layers": 3}, {}),
    "dropout of an MLP": (adaptc.PromptEncoderConfig, {"encoder_dropout": 0.2}, {}),
    "dropout of one layer": (
        adaptc.PromptEncoderConfig,
        {"encoder_dropout": 0.2},
        {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1},
    ),
    "a text": (adaptc.PromptTuningConfig, {"prompt_tuning_init_text": "classify:"}, {}),
    "a text, beside a vocabulary": (
        adaptc.MultitaskPromptTuningConfig,
        {"prompt_tuning_init_text": "classify:"},
        {"prompt_tuning_init": "SAMPLE_VOCAB"},
    ),
    "a source": (adaptc.MultitaskPromptTuningConfig, {"prompt_tuning_init_state_dict_path": "source.bin"}, {}),
    "decay": (adaptc.CPTConfig, {"opt_loss_decay_factor": 0.9}, {"cpt_token_ids": [5, 6, 7]}),
}


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("name", list(UNUSED))
def test_told_of(name, tmp_path):
    cls, unused, others = UNUSED[name]
    (option, value), *_ = unused.items()
    others = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, **others}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        config = cls(**others)
        assert not told
        cls(**others, **unused)
    (warning,) = told
    assert issubclass(warning.category, AdaptcWarning)
    assert f"{cls.__name__}: {option}={value!r} has no effect" in str(warning.message)
    folder = adaptc.save_adapter(adaptc.compile(shared_base_program("llama"), config), tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), option: value}))
    with pytest.warns(AdaptcWarning, match=f"{option}=.* has no effect"):
        program = adaptc.compile(shared_base_program("llama"), folder)
    assert getattr(program.binding.config, option) == value


def test_options_that_are_used():
    used = [
        adaptc.PromptEncoderConfig(
            num_virtual_tokens=3,
            encoder_reparameterization_type="LSTM",
            encoder_num_layers=3,
            encoder_dropout=0.2,
        ),
        adaptc.CPTConfig(task_type="CAUSAL_LM", opt_weighted_loss_type="decay", opt_loss_decay_factor=0.9),
    ]
    assert all(dataclasses.is_dataclass(c) for c in used)  # and no warning, which would be an error
