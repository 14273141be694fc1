"""One program for several adapters: the union of their sites, each bound as itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig, SwapError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 7)
        self.up = nn.Linear(7, 11)
        self.norm = nn.LayerNorm(11)
        self.conv = nn.Conv1d(11, 5, 3, padding="same")
        self.down = nn.Linear(5, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(torch.relu(self.up(self.emb(ids))))
        return self.down(torch.tanh(self.conv(h.transpose(1, 2)).transpose(1, 2)))


CONFIGS = {
    "narrow": {"r": 3, "target_modules": ["up"], "lora_alpha": 5},
    "wide": {"r": 5, "target_modules": ["up", "down", "conv"], "rank_pattern": {"down": 2}, "use_rslora": True},
    "whole": {"r": 2, "target_modules": ["emb"], "modules_to_save": ["norm"]},
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(3)
    return Net()


@pytest.fixture(scope="module")
def saved(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out: dict[str, Path] = {}
    for i, (name, config) in enumerate(CONFIGS.items()):
        twin = Net()
        twin.load_state_dict(model.state_dict())
        peft_model = get_peft_model(twin, PeftLoraConfig(**config, init_lora_weights=False))
        torch.manual_seed(i)
        with torch.no_grad():
            for p in peft_model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.3)
        out[name] = tmp_path_factory.mktemp(name)
        peft_model.save_pretrained(str(out[name]))
    return out


def peft_output(model: nn.Module, folder: Path, ids: Tensor) -> Tensor:
    twin = Net()
    twin.load_state_dict(model.state_dict())
    return PeftModel.from_pretrained(twin, str(folder))(ids)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_the_union_is_compiled_and_the_first_is_bound(model, saved, backend):
    ids = torch.randint(0, 13, (3, 6))
    program = adaptc.compile(
        model, [str(d) for d in saved.values()], example_inputs=torch.randint(0, 13, (2, 4)), backend=backend
    )
    assert {a.fqn for a in program.adaptation.attachments} >= {"emb.weight", "up.weight", "down.weight", "norm.bias"}
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(program(ids), peft_output(model, saved["narrow"], ids), **close)
    with adaptc.debug.assert_no_recompiles():
        for name in ("wide", "whole", "narrow", "wide"):
            adaptc.swap(program, saved[name])
            torch.testing.assert_close(program(ids), peft_output(model, saved[name], ids), **close)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", list(CONFIGS))
def test_what_is_saved_after_a_swap_is_the_swapped_adapter_alone(model, saved, name, tmp_path):
    program = adaptc.compile(model, list(saved.values()), example_inputs=torch.randint(0, 13, (2, 4)))
    adaptc.swap(program, saved[name])
    adaptc.save_adapter(program, tmp_path / "again")
    from adaptc.adapter_files.directory import read_adapter

    before, after = read_adapter(saved[name]), read_adapter(tmp_path / "again")
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(before.tensors[k], after.tensors[k]) for k in before.tensors)
    ids = torch.randint(0, 13, (2, 9))
    torch.testing.assert_close(
        peft_output(model, tmp_path / "again", ids), peft_output(model, saved[name], ids), rtol=0, atol=0
    )
    merged = adaptc.merge(program)
    torch.testing.assert_close(merged(ids), program(ids), rtol=1e-5, atol=1e-5)


def test_a_config_first_and_a_directory_second(model, saved):
    ids = torch.randint(0, 13, (3, 6))
    program = adaptc.compile(
        model, [LoraConfig(r=4, target_modules=["emb"]), saved["wide"]], example_inputs=torch.randint(0, 13, (2, 4))
    )
    torch.testing.assert_close(program(ids), model(ids), rtol=1e-6, atol=1e-6)
    assert set(program.binding.methods) == {"emb.weight|lora"}
    adaptc.swap(program, saved["wide"])
    torch.testing.assert_close(program(ids), peft_output(model, saved["wide"], ids), rtol=1e-4, atol=1e-5)


def test_key_mapping_renames_the_modules_of_a_directory(model, saved):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.net(ids)

    ids = torch.randint(0, 13, (3, 6))
    program = adaptc.compile(
        Wrapped(), LoraConfig(r=2, target_modules=["up"]), example_inputs=torch.randint(0, 13, (2, 4))
    )
    with pytest.raises(SwapError, match=r"net\.up"):
        adaptc.swap(program, saved["narrow"])
    adaptc.swap(program, saved["narrow"], key_mapping={r"^(up|down)": r"net.\1"})
    torch.testing.assert_close(program(ids), peft_output(model, saved["narrow"], ids), rtol=1e-5, atol=1e-6)


def test_an_adapter_without_tensors_for_the_program_is_refused(model):
    program = adaptc.compile(model, LoraConfig(target_modules=["up"]), example_inputs=torch.randint(0, 13, (2, 4)))
    with pytest.raises(SwapError, match="would do nothing"):
        adaptc.swap(program, {})


def test_a_binding_of_another_program_is_refused(model):
    example = torch.randint(0, 13, (2, 4))
    one = adaptc.compile(model, LoraConfig(target_modules=["up"]), example_inputs=example)
    two = adaptc.compile(model, LoraConfig(target_modules=["down"]), example_inputs=example)
    with pytest.raises(SwapError, match="other sites"):
        adaptc.swap(one, two.binding)


@pytest.mark.long
def test_a_saved_program_of_convolutions_is_compiled_for_every_rank_when_loaded(model, saved, tmp_path):
    ids = torch.randint(0, 13, (3, 6))
    program = adaptc.compile(model, saved["wide"], example_inputs=torch.randint(0, 13, (2, 4)))
    loaded = adaptc.load(adaptc.save(program, tmp_path / "p.pt2"), backend="inductor")
    torch.testing.assert_close(loaded(ids), program(ids), rtol=1e-4, atol=1e-5)
    with adaptc.debug.assert_no_recompiles():
        config = LoraConfig(r=9, target_modules=["conv"])
        adaptc.swap(
            loaded,
            {"conv.lora_A.weight": torch.ones(9, 11, 3), "conv.lora_B.weight": torch.ones(5, 9, 1)},
            config=config,
        )
        changed = loaded(ids)
    assert not torch.allclose(changed, program(ids))
    adaptc.swap(program, loaded.binding)
    torch.testing.assert_close(changed, program(ids), rtol=1e-4, atol=1e-5)
