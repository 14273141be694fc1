"""Adapters of PEFT with tensors of layers that the model never calls, such as a decoder's attention to an encoder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import BartConfig, BartForCausalLM

import adaptc
from tests.support.families import perturb
from tests.support.oracle import quiet

IDS = torch.randint(4, 60, (2, 7), generator=torch.Generator().manual_seed(0))
NEVER_CALLED = "16 of its tensors are of layers that the program never calls, such as 'model.decoder.*encoder_attn"


def model() -> Any:
    config = BartConfig(
        vocab_size=61, d_model=24, decoder_layers=2, decoder_attention_heads=3, decoder_ffn_dim=37, is_decoder=True,
        max_position_embeddings=32, is_encoder_decoder=False,
    )  # fmt: skip
    torch.manual_seed(0)
    made = BartForCausalLM(config)
    perturb(made)
    return made.eval()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(1)
    with quiet():
        wrapped = peft.get_peft_model(copy.deepcopy(model()), config).eval()
    path = tmp_path_factory.mktemp("adapter")
    wrapped.save_pretrained(str(path))
    return wrapped, path


def same_files(one: Path, other: Path) -> None:
    a, b = (load_file(p / "adapter_model.safetensors") for p in (one, other))
    assert a.keys() == b.keys()
    assert any("encoder_attn" in key for key in a)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.long
@torch.no_grad()
def test_they_are_told_of_kept_and_written_again(adapter: tuple[Any, Path], tmp_path: Path) -> None:
    wrapped, path = adapter
    with pytest.warns(adaptc.AdaptcWarning, match=NEVER_CALLED):
        program = adaptc.compile(model(), path)
    torch.testing.assert_close(program(input_ids=IDS)["logits"], wrapped(input_ids=IDS)["logits"], rtol=1e-5, atol=1e-5)
    same_files(path, adaptc.save_adapter(program, tmp_path / "compiled"))
    other = adaptc.compile(model(), adaptc.LoraConfig(r=2, target_modules="all-linear"))
    for times in ("once", "again"):  # what is remembered of the first swap serves the second
        with pytest.warns(adaptc.AdaptcWarning, match=NEVER_CALLED):
            adaptc.swap(other, path)
        same_files(path, adaptc.save_adapter(other, tmp_path / times))
    assert {t.device.type for t in other.binding.to("meta").idle_tensors.values()} == {"meta"}


@pytest.mark.long
@torch.no_grad()
def test_a_program_file_says_that_it_lacks_them(adapter: tuple[Any, Path], tmp_path: Path) -> None:
    wrapped, path = adapter
    with pytest.warns(adaptc.AdaptcWarning, match=NEVER_CALLED):
        program = adaptc.compile(model(), path)
    with pytest.warns(adaptc.AdaptcWarning, match="has no tensors of layers that the program never calls"):
        adaptc.save(program, tmp_path / "program.pt2")
    loaded = adaptc.load(tmp_path / "program.pt2")
    assert not loaded.binding.idle_tensors
    with pytest.warns(adaptc.AdaptcWarning, match=NEVER_CALLED):
        adaptc.swap(loaded, path)
    torch.testing.assert_close(loaded(input_ids=IDS)["logits"], wrapped(input_ids=IDS)["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.long
@torch.no_grad()
def test_banks_and_several_at_once(adapter: tuple[Any, Path]) -> None:
    wrapped, path = adapter
    program = adaptc.compile(model(), adaptc.LoraConfig(r=2, target_modules="all-linear"))
    with pytest.warns(adaptc.AdaptcWarning, match=NEVER_CALLED):
        bank = program.bank({"a": path})
    rows = bank(input_ids=IDS, adapters=["a", None])["logits"]
    torch.testing.assert_close(rows[:1], wrapped(input_ids=IDS[:1])["logits"], rtol=1e-5, atol=1e-5)
    with pytest.warns(adaptc.AdaptcWarning, match=NEVER_CALLED):
        both = adaptc.compile(model(), {"one": path, "other": adaptc.LoraConfig(r=2, target_modules="all-linear")})
    assert len(both.binding.idle_tensors) == 16


def test_a_layer_that_an_adapter_replaces_is_called(tmp_path: Path) -> None:
    """Its own weight is not read, as the adapter has another in its place."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    config = adaptc.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    program = adaptc.compile(net, config, example_inputs=torch.randn(2, 5))
    tensors = load_file(adaptc.save_adapter(program, tmp_path / "adapter") / "adapter_model.safetensors")
    adaptc.swap(program, tensors, config=config)
    with pytest.raises(adaptc.SwapError, match=r"no slot in the program: '1\.lora_A"):
        adaptc.swap(program, {**tensors, "base_model.model.1.lora_A.weight": torch.ones(2, 7)}, config=config)


@pytest.mark.long
def test_layers_that_are_called_and_unknown_ones_are_refused(adapter: tuple[Any, Path]) -> None:
    _, path = adapter
    narrow = adaptc.compile(model(), adaptc.LoraConfig(r=2, target_modules=["fc1"]))
    with pytest.raises(adaptc.SwapError, match="no slot in the program"):
        adaptc.swap(narrow, path)
    tensors = load_file(path / "adapter_model.safetensors")
    renamed = {k.replace("encoder_attn", "another_attn"): t for k, t in tensors.items()}
    full = adaptc.compile(model(), adaptc.LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(adaptc.SwapError, match="another_attn"):
        adaptc.swap(full, renamed, config=adaptc.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"))
