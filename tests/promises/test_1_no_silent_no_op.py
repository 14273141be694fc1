"""Promise 1: every entry of a config and every key of a file binds to a site, or the call raises and names what is
near. What was left out is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import adaptc
from adaptc import AdaptcError, LoraConfig
from tests.support.families import FAMILIES

#: an entry that names nothing, and what the message says instead
MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "target_modules": ({"target_modules": ["q_proj", "v_prj"]}, "'v_prj'.*v_proj"),
    "a pattern": ({"target_modules": r".*\.attention\.q"}, "attention"),
    "target_parameters": ({"target_parameters": ["mlp.gate_prj.weight"]}, "gate_prj.*gate_proj"),
    "layers_to_transform": ({"target_modules": ["q_proj"], "layers_to_transform": [0, 7]}, "7"),
    "exclude_modules": ({"target_modules": ["q_proj"], "exclude_modules": ["o_porj"]}, "o_porj.*o_proj"),
    "rank_pattern": ({"target_modules": ["q_proj"], "rank_pattern": {"q_prj": 3}}, "rank_pattern.*q_prj"),
    "alpha_pattern": ({"target_modules": ["q_proj"], "alpha_pattern": {"v_proj": 3}}, "alpha_pattern.*v_proj"),
    "modules_to_save": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]}, "lm_haed.*lm_head"),
    "trainable_token_indices": (
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tkns": [1]}},
        "embed_tkns.*embed_tokens",
    ),
}


@pytest.fixture(scope="module")
def base() -> torch.export.ExportedProgram:
    """A language model, captured once."""
    return adaptc.unload(adaptc.compile(FAMILIES["llama"].build(), LoraConfig(r=2, target_modules=["q_proj"])))


@pytest.mark.parametrize("field", list(MISSES))
def test_an_entry_that_names_nothing_raises_and_names_what_is_near(
    field: str, base: torch.export.ExportedProgram
) -> None:
    options, message = MISSES[field]
    with pytest.raises(AdaptcError, match=f"(?s){message}"):
        adaptc.compile(base, LoraConfig(r=3, **options))


@pytest.mark.parametrize("how", ["compile", "swap", "bind"])
def test_a_key_of_a_file_that_names_nothing_raises(
    how: str, base: torch.export.ExportedProgram, tmp_path: Path
) -> None:
    program = adaptc.compile(base, LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    file = adaptc.save_adapter(program, tmp_path) / "adapter_model.safetensors"
    tensors = load_file(file)
    renamed = {k.replace("layers.1.self_attn", "layers.1.self_atn"): v for k, v in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file)
    use = {
        "compile": lambda: adaptc.compile(base, tmp_path),
        "swap": lambda: adaptc.swap(program, tmp_path),
        "bind": lambda: program.bind(tmp_path),
    }[how]
    with pytest.raises(AdaptcError, match=r"layers\.1\.self_at"):
        use()


def test_the_report_tells_what_matched_and_what_was_left_out_and_why() -> None:
    report = adaptc.report(
        adaptc.compile(FAMILIES["llama"].build(), LoraConfig(r=3, target_modules=["q_proj"], layers_to_transform=[1]))
    )
    assert list(report.matches) == ["q_proj"]
    text = str(report)
    assert "1 of 2" in text
    for left in ("k_proj", "down_proj", "lm_head"):
        assert left in text


def test_the_adapter_of_every_matched_site_changes_the_output() -> None:
    """A match that adapts nothing would be the worst of all."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6), nn.Flatten(), nn.Linear(18, 4)).eval()
    ids = torch.tensor([[3, 9, 1], [4, 4, 7]])
    for entry in ("0", "1", "3"):
        config = LoraConfig(r=2, target_modules=[entry], init_lora_weights=False)
        program = adaptc.compile(net, config, example_inputs=ids)
        assert not torch.allclose(program(ids), net(ids), atol=1e-3), entry
        by_program = adaptc.compile(torch.export.export(net, (ids,)), config)
        assert not torch.allclose(by_program(ids), net(ids), atol=1e-3), entry
