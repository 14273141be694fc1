"""Cartridges composed of others, next to PEFT's; and which do not go together."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import adaptc
from adaptc import CartridgeConfig
from adaptc.errors import AdaptcWarning, CheckpointError, ConfigError
from tests.support.families import FAMILIES
from tests.support.oracle import assert_same, file_tensors, load_peft, quiet, shared_base_program
from tests.support.prompts import PROMPT_WARNINGS, prompt_oracle, run_quietly, text

CARTRIDGE = "CartridgeConfig"


def cartridge(path, name="llama", count=3, frozen=1, **more):
    return prompt_oracle(
        name, path, CARTRIDGE, num_virtual_tokens=count, num_frozen_tokens=frozen, seed=count, **more
    ).path


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_as_peft(name, tmp_path):
    """Files, and logits in both: the number of frozen tokens is the first one's."""
    paths = [cartridge(tmp_path / str(n), name, n, f) for n, f in ((3, 2), (5, 0), (2, 1))]
    peft.compose_cartridge_adapters(paths, output_path=tmp_path / "peft")
    made = adaptc.prefixes.compose_cartridge_adapters(paths, output_path=tmp_path / "ours")
    ours, theirs = (file_tensors(tmp_path / d) for d in ("ours", "peft"))
    assert ours.keys() == theirs.keys() == {"prompt_embeddings"}
    assert torch.equal(ours["prompt_embeddings"], theirs["prompt_embeddings"])
    stored = [json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("ours", "peft")]
    assert {**stored[0], "inference_mode": stored[1]["inference_mode"]} == stored[1]
    assert (stored[0]["num_virtual_tokens"], stored[0]["num_frozen_tokens"]) == (10, 2)
    program = adaptc.compile(shared_base_program(name), paths[0])
    run_quietly(program, text(2, 5))
    with quiet(*PROMPT_WARNINGS):
        expected = run_quietly(load_peft(FAMILIES[name].build(), tmp_path / "ours"), text(3, 7))
    with adaptc.debug.assert_no_recompiles():
        for adapter in (made, tmp_path / "peft"):
            adaptc.swap(program, adapter)
            assert_same(run_quietly(program, text(3, 7)), expected)
    assert program.binding.config.num_frozen_tokens == 2


@pytest.mark.long
def test_of_programs_and_objects(tmp_path):
    """A program, what is bound to one, an object; and what was composed once more, in the order they are given."""
    paths = [cartridge(tmp_path / str(n), count=n) for n in (3, 5)]
    program = adaptc.compile(shared_base_program("llama"), paths[0])
    rows = [file_tensors(p)["prompt_embeddings"] for p in paths]
    given = [program.bind(paths[1]), adaptc.load_adapter(paths[0]), program]
    twice = adaptc.prefixes.compose_cartridge_adapters([adaptc.prefixes.compose_cartridge_adapters(given), paths[1]])
    assert torch.equal(twice.tensors["prompt_embeddings"], torch.cat([rows[i] for i in (1, 0, 0, 1)]))
    assert twice.config.num_virtual_tokens == 16
    path = adaptc.save_adapter(twice, tmp_path / "saved")
    assert torch.equal(file_tensors(path)["prompt_embeddings"], twice.tensors["prompt_embeddings"])
    adaptc.prefixes.compose_cartridge_adapters(paths, output_path=tmp_path / "bin", safe_serialization=False)
    assert (tmp_path / "bin" / "adapter_model.bin").is_file()
    assert torch.equal(adaptc.load_adapter(tmp_path / "bin").tensors["prompt_embeddings"], torch.cat(rows))


def test_what_does_not_go_together(tmp_path):
    one, two = (cartridge(tmp_path / str(n), count=n) for n in (3, 5))
    compose = adaptc.prefixes.compose_cartridge_adapters
    with pytest.raises(ConfigError, match="there are 1 cartridges"):
        compose([one])
    with pytest.raises(ConfigError, match="must be a list"):
        compose(one)
    with pytest.raises(ConfigError, match="there is none"):
        compose([one, two], safe_serialization=False)
    prefix = prompt_oracle("llama", tmp_path / "prefix", "PrefixTuningConfig", num_virtual_tokens=3).path
    with pytest.raises(ConfigError, match="PREFIX_TUNING adapter, and cartridges are composed alone"):
        compose([one, prefix])
    with pytest.raises(ConfigError, match=r"has token_dim 24, and .* 16"):
        compose([one, cartridge(tmp_path / "gpt2", "gpt2")])
    tensors = load_file(one / "adapter_model.safetensors")["prompt_embeddings"]
    config = CartridgeConfig.from_dict(json.loads((one / "adapter_config.json").read_text()))
    narrow = adaptc.Adapter(config, {"prompt_embeddings": tensors[:, :-1]}, "narrow")
    with pytest.raises(ConfigError, match=r"narrow has width of prompt_embeddings 63, and .* 64"):
        compose([one, narrow])
    for rows in (tensors[:0], tensors[:2], tensors[0]):
        with pytest.raises(CheckpointError, match=r"num_virtual_tokens=3: expected \(3,"):
            compose([one, adaptc.Adapter(config, {"prompt_embeddings": rows}, "none")])
    with_head = {"prompt_embeddings": tensors, "score.weight": torch.ones(2, 3)}
    with pytest.raises(ConfigError, match=r"trains modules beside its cartridge \(score.weight\)"):
        compose([one, adaptc.Adapter(config.replace(modules_to_save=["score"]), with_head, "head")])
    named = [
        adaptc.Adapter(config.replace(base_model_name_or_path=n), {"prompt_embeddings": tensors}) for n in ("a", "b")
    ]
    with pytest.warns(AdaptcWarning, match="different models"):
        compose(named)
    save_file({"prompt_embeddings": tensors[:0].contiguous()}, one / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"shape \(0, 64\)"):
        compose([two, one], output_path=tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
