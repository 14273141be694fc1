"""DoRA beside other adapters at one weight: the length it divides by is that of the model's own weight and its delta,
whatever others made of the weight before; forward, gradients and merge are PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc.errors import ConfigError
from tests.support.subject import assert_close, assert_valid


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(23, 15)
        self.up = nn.Linear(15, 21)
        self.conv = nn.Conv1d(3, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.tanh(self.up(self.emb(x))))


X = torch.tensor([[3, 9, 22], [0, 4, 9], [7, 7, 1], [11, 2, 3]])
COMMON: dict[str, Any] = {"target_modules": ["emb", "up", "conv"], "init_lora_weights": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {**COMMON, "r": 2},
    "dora": {**COMMON, "r": 3, "use_dora": True},
    "other": {**COMMON, "r": 2, "lora_alpha": 5, "use_dora": True},
}
#: adapters in their order, and the forms that DoRA gets where it may choose
ORDERS = [("plain", "dora"), ("dora", "plain"), ("dora", "other"), ("plain", "dora", "other")]


def net() -> nn.Module:
    torch.manual_seed(1)
    return Net().double().eval()


def together(names: tuple[str, ...], **more: Any) -> adaptc.AdaptedProgram:
    """A program of these adapters, with random values."""
    configs = {n: adaptc.LoraConfig(**OPTIONS[n]) for n in names}
    program = adaptc.compile(net(), configs, example_inputs=X, training=True, **more)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in program.module().parameters():
            p.add_(p.requires_grad * torch.rand_like(p) * 0.5)
    return program


def by_peft(program: adaptc.AdaptedProgram, names: tuple[str, ...], path: Path) -> peft.PeftModel:
    first, *others = names
    for name in names:
        adaptc.save_adapter(program, path, adapter_name=name)
    wrapped = peft.PeftModel.from_pretrained(net(), str(path / first), adapter_name=first, is_trainable=True)
    for name in others:
        wrapped.load_adapter(str(path / name), adapter_name=name, is_trainable=True)
    wrapped.base_model.set_adapter(list(names))
    return wrapped.eval()


def gradients(module: nn.Module, out: Tensor) -> list[Tensor]:
    """By name, without the part that PEFT's module of the vector adds to it."""
    out.square().sum().backward()
    named = {n.removeprefix("base_model.model."): p for n, p in module.named_parameters() if p.requires_grad}
    grads = {n.removesuffix(".weight"): p.grad for n, p in named.items()}
    return [g.flatten() for _, g in sorted(grads.items()) if g is not None]


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("form", ["auto", "apply", "weight"])
@pytest.mark.parametrize("names", ORDERS, ids="-".join)
def test_as_peft(names: tuple[str, ...], form: str, tmp_path: Path) -> None:
    program = together(names, form=form)
    wrapped = by_peft(program, names, tmp_path)
    want = wrapped(X)
    assert_close(program(X), want, 1e-9)
    alone = adaptc.compile(net(), tmp_path / names[0], example_inputs=X)
    assert not torch.allclose(alone(X), want, rtol=1e-2)
    module = program.module().eval()
    ours, theirs = gradients(module, module(X)), gradients(wrapped, want)
    assert len(ours) == len(theirs) > 6 * (len(names) - 1)
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, 1e-7)
    merged = adaptc.merge(program)
    assert_close(merged(X), want, 1e-9)
    assert torch.equal(adaptc.unmerge(merged)(X), program(X))
    assert_close(wrapped.merge_and_unload()(X), want, 1e-9)
    assert_valid(program)


@pytest.mark.long
@pytest.mark.parametrize("form", ["auto", "weight"])
def test_ranks_change_and_files_are_understood(form: str, tmp_path: Path) -> None:
    program = together(("plain", "dora"), form=form)
    wider = adaptc.LoraConfig(**{**OPTIONS["dora"], "r": 5})
    other = adaptc.save_adapter(adaptc.compile(net(), wider, example_inputs=X), tmp_path / "wider")
    adaptc.swap(program, {"dora": other})
    assert_valid(program)
    loaded = adaptc.load(adaptc.save(program, tmp_path / "p.pt2"))
    wrapped = by_peft(program, ("plain", "dora"), tmp_path)
    for one in (program, loaded, adaptc.merge(loaded)):
        assert_close(one(X), wrapped(X), 1e-9)
    adaptc.swap(program, {"plain": None})
    assert_close(program(X), adaptc.compile(net(), other, example_inputs=X)(X), 1e-9)


def test_with_dropout_it_reads_the_base_around_the_layer() -> None:
    """PEFT gives what DoRA adds to the layer's own output the dropped input, and the base's weight."""
    options = {n: {**o, "target_modules": ["up"], "lora_dropout": 0.5} for n, o in OPTIONS.items()}
    configs = {n: adaptc.LoraConfig(**options[n]) for n in ("plain", "dora")}
    program = adaptc.compile(net(), configs, example_inputs=X, training=True)
    assert [a.form for a in program.adaptation.attachments] == ["apply", "apply"]


def test_an_earlier_one_that_changes_the_weight_has_it_do_so_too() -> None:
    """A form asked for is taken or refused."""
    turn = adaptc.OFTConfig(oft_block_size=3, target_modules=["up"])
    dora = adaptc.LoraConfig(**{**OPTIONS["dora"], "target_modules": ["up"]})
    program = adaptc.compile(net(), {"turn": turn, "dora": dora}, example_inputs=X)
    assert [a.form for a in program.adaptation.attachments] == ["weight", "weight"]
    assert_close(adaptc.merge(program)(X), program(X), 1e-9)
    dropped = dora.replace(lora_dropout=0.5)
    with pytest.raises(ConfigError, match=r"would lose its dropout.*looks at the base's weight"):
        adaptc.compile(net(), {"turn": turn, "dora": dropped}, example_inputs=X, training=True)
