"""MiCA: B are the singular vectors of the smallest singular values, and A alone is trained, as in PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adaptc
from tests.support.oracle import assert_differs, quiet

CONFIG: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 5,
    "init_lora_weights": "mica",
    "target_modules": ["rows", "up", "down"],
}
IDS = torch.tensor([[1, 5, 2], [8, 0, 16]])


class Net(nn.Module):
    """An embedding, a linear layer and one of transformers' transposed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.up, self.down = nn.Embedding(17, 7), nn.Linear(7, 13), Conv1D(11, 13)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.rows(ids))))


def net() -> Net:
    torch.manual_seed(2)
    model = Net().eval()
    nn.init.normal_(model.down.bias)
    return model


def by_peft() -> Any:
    with quiet(".*fan_in_fan_out.*"):
        return peft.get_peft_model(net(), peft.LoraConfig(**CONFIG)).eval()


def trained(module: nn.Module) -> tuple[list[float], set[str]]:
    """Return the losses of some steps, and the names of the parameters that were trained."""
    own = {n.replace(".default", ""): p for n, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(own.values(), lr=0.3)
    target, losses = torch.linspace(-1, 1, 66).reshape(2, 3, 11), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (module(IDS) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {n.removeprefix("base_model.model.").removesuffix(".weight") for n in own}


def test_training_and_files_are_pefts(tmp_path: Path) -> None:
    theirs = by_peft()
    program = adaptc.compile(net(), adaptc.LoraConfig(**CONFIG), example_inputs=IDS, training=True)
    module = program.module()
    torch.testing.assert_close(module(IDS), theirs(IDS))
    (expected, _), (found, names) = trained(theirs), trained(module)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[-1] < found[0]
    assert names == {"rows.lora_embedding_A", "up.lora_A", "down.lora_A"}
    torch.testing.assert_close(module(IDS), theirs(IDS), rtol=1e-4, atol=1e-5)
    assert_differs(module(IDS), net()(IDS))

    ours = adaptc.save_adapter(program, tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    one, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs"))
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-5)
    with quiet(".*fan_in_fan_out.*"):
        loaded = peft.PeftModel.from_pretrained(net(), str(ours)).eval()
    torch.testing.assert_close(loaded(IDS), module(IDS))


def test_a_file_goes_on_with_a_frozen_b_and_swaps_into_other_programs(tmp_path: Path) -> None:
    theirs = by_peft()
    trained(theirs)
    theirs.save_pretrained(str(tmp_path))
    again = adaptc.compile(net(), tmp_path, example_inputs=IDS, training=True).module()
    with quiet(".*fan_in_fan_out.*"):
        expected = peft.PeftModel.from_pretrained(net(), str(tmp_path), is_trainable=True).eval()
    (want, _), (found, names) = trained(expected), trained(again)
    assert found == pytest.approx(want, rel=1e-5)
    assert names == {"rows.lora_embedding_A", "up.lora_A", "down.lora_A"}

    plain = adaptc.compile(net(), adaptc.LoraConfig(**{**CONFIG, "init_lora_weights": True}), example_inputs=IDS)
    adaptc.swap(plain, tmp_path)
    torch.testing.assert_close(plain(IDS), theirs(IDS))
    merged = adaptc.merge(plain)
    torch.testing.assert_close(merged(IDS), theirs.merge_and_unload()(IDS))
    assert torch.equal(adaptc.unmerge(merged)(IDS), plain(IDS))


def test_tied_layers_are_refused() -> None:
    """PEFT takes them, and gives the two layers factors that are no longer tied."""
    with pytest.raises(adaptc.ConfigError, match=r"ensure_weight_tying=True has no meaning with .*mica"):
        adaptc.LoraConfig(**{**CONFIG, "init_lora_weights": "MiCA"}, ensure_weight_tying=True)


def test_it_combines_with_no_other_variant() -> None:
    for other in ({"use_dora": True}, {"alora_invocation_tokens": [3]}):
        with pytest.raises(adaptc.ConfigError, match="init_lora_weights='mica' are variants of LoRA"):
            adaptc.LoraConfig(**CONFIG, **other)
        with pytest.raises(ValueError, match="mica"), quiet(".*"):
            peft.get_peft_model(net(), peft.LoraConfig(**CONFIG, **other, task_type="CAUSAL_LM"))
