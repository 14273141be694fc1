"""Promise 1: every entry of a config and every key of a file binds to a site, or the call raises and names what is
near. Of a file's config, where the keys decide, it warns. What was left out is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import adaptc
from adaptc import AdaptcError, AdaptcWarning, C3AConfig, FourierFTConfig, IA3Config, LoraConfig
from adaptc.methods import TargetedConfig
from tests.support.families import FAMILIES

LORA = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)
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


@pytest.mark.long
@pytest.mark.parametrize("field", list(MISSES))
def test_an_entry_that_names_nothing_raises_and_names_what_is_near(
    field: str, base: torch.export.ExportedProgram
) -> None:
    options, message = MISSES[field]
    with pytest.raises(AdaptcError, match=f"(?s){message}"):
        adaptc.compile(base, LoraConfig(r=3, **options))


#: a config, and what the config of its file says instead that binds to nothing
OF_FILES: dict[str, tuple[TargetedConfig, dict[str, Any], str]] = {
    "target_modules": (LORA, {"target_modules": ["q_proj", "v_prj"]}, "v_prj"),
    "exclude_modules": (LORA, {"exclude_modules": ["o_porj"]}, "o_porj"),
    "rank_pattern": (LORA, {"rank_pattern": {"q_prj": 7}}, "q_prj"),
    "alpha_pattern": (LORA, {"alpha_pattern": {"v_proj": 7}}, "v_proj"),
    "layers_to_transform": (LORA, {"layers_to_transform": [0, 1, 7]}, "layers_to_transform.*7"),
    "modules_to_save": (LORA, {"modules_to_save": ["lm_haed"]}, "lm_haed"),
    "target_parameters": (LORA, {"target_parameters": ["mlp.gate_prj.weight"]}, "gate_prj"),
    "n_frequency_pattern": (
        FourierFTConfig(n_frequency=9, target_modules=["q_proj"], init_weights=True),
        {"n_frequency_pattern": {"q_prj": 7}},
        "q_prj",
    ),
    "feedforward_modules": (
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        {"target_modules": ["q_proj", "down_prj"], "feedforward_modules": ["down_prj"]},
        "feedforward_modules.*down_prj|down_prj",
    ),
    "block_size_pattern": (
        C3AConfig(block_size=8, target_modules=["q_proj"]),
        {"block_size_pattern": {"v_proj": 4}},
        "v_proj",
    ),
}


@pytest.mark.parametrize("field", list(OF_FILES))
def test_an_entry_of_a_file_that_names_nothing_is_told(
    field: str, base: torch.export.ExportedProgram, tmp_path: Path
) -> None:
    """What a file adapts is what it has tensors for, and those are all bound: ``swap`` takes such a file too."""
    config, edits, named = OF_FILES[field]
    program = adaptc.compile(base, config)
    with torch.no_grad():
        for p in program.module().parameters():
            p.add_(p.requires_grad * torch.randn_like(p) / 8)
    adaptc.save_adapter(program, tmp_path)
    told = tmp_path / "adapter_config.json"
    told.write_text(json.dumps(json.loads(told.read_text()) | edits))
    with pytest.warns(AdaptcWarning, match=f"(?s)binds to nothing.*{named}"):
        again = adaptc.compile(base, tmp_path)
    ids = torch.tensor([[3, 9, 1], [4, 4, 7]])
    want = program(input_ids=ids).logits
    torch.testing.assert_close(again(input_ids=ids).logits, want, atol=1e-5, rtol=0)
    assert not torch.allclose(want, program.base(input_ids=ids).logits, atol=1e-3)
    adaptc.swap(program, tmp_path)
    torch.testing.assert_close(program(input_ids=ids).logits, want, atol=1e-5, rtol=0)


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


@pytest.mark.long
def test_the_report_tells_what_matched_and_what_was_left_out_and_why() -> None:
    report = adaptc.report(
        adaptc.compile(FAMILIES["llama"].build(), LoraConfig(r=3, target_modules=["q_proj"], layers_to_transform=[1]))
    )
    assert list(report.matches) == ["q_proj"]
    text = str(report)
    assert "1 of 2" in text
    for left in ("k_proj", "down_proj", "lm_head"):
        assert left in text


@pytest.mark.filterwarnings("ignore:Sequential was captured for some sizes alone")  # Flatten, in front of a layer
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
