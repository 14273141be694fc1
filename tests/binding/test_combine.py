"""Adapters that act together: each on what the ones before it made of the weights, in the program as in a merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

import adaptc
from tests.support.subject import adapter_parameters, assert_close, assert_valid


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(15, 21)
        self.down = nn.Linear(21, 9, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


X = torch.randn(5, 15, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(11)
    return Net().double().requires_grad_(False).eval()


def randomized(program: adaptc.AdaptedProgram, seed: int = 0) -> dict[str, Tensor]:
    """Random values in place; copies of them by key."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in adapter_parameters(program).values():
            t.add_(torch.randn(t.shape, generator=g, dtype=t.dtype) * 0.4)
    return {k: t.detach().clone() for k, t in adapter_parameters(program).items()}


def saved(model: nn.Module, config: Any, path: Path, seed: int) -> Path:
    program = adaptc.compile(model, config, example_inputs=X)
    randomized(program, seed)
    return Path(adaptc.save_adapter(program, path))


def weights(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """What one adapter alone makes of each weight."""
    merged = adaptc.merge(adaptc.compile(model, path, example_inputs=X))
    return {k: v for k, v in merged.state_dict.items() if k.endswith("weight")}


PAIRS = {
    "c3a": (adaptc.C3AConfig(block_size=3, target_modules=["up", "down"]),) * 2,
    "lora": (adaptc.LoraConfig(r=3, target_modules=["up"]), adaptc.LoraConfig(r=2, target_modules=["up", "down"])),
    "fourier and lora": (
        adaptc.FourierFTConfig(n_frequency=19, target_modules=["up"]),
        adaptc.LoraConfig(r=2, target_modules=["up"]),
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("pair", list(PAIRS))
def test_what_is_added_adds_up(model: nn.Module, pair: str, tmp_path: Path):
    """PEFT feeds the outputs of one C3A adapter to the next."""
    one, two = (saved(model, c, tmp_path / str(i), i) for i, c in enumerate(PAIRS[pair]))
    program = adaptc.compile(model, {"one": one, "two": two}, example_inputs=X)
    assert_valid(program)
    twin = Net().double()
    base = model.state_dict()
    a, b = weights(model, one), weights(model, two)
    twin.load_state_dict({k: a[k] + b[k] - v if k in a else v for k, v in base.items()})
    assert_close(program(X), twin(X), 1e-9)
    merged = adaptc.merge(program)
    assert_close(merged(X), twin(X), 1e-9)
    back = adaptc.unmerge(merged)
    assert torch.equal(back(X), program(X))
    assert torch.equal(adaptc.unload(back)(X), torch.export.export(model, (X,)).module()(X))


@pytest.mark.long
def test_rotations_follow_one_another(model: nn.Module, tmp_path: Path):
    """PEFT turns by the one and then the other in the forward pass, and the other way round when it merges."""
    configs = [
        adaptc.OFTConfig(oft_block_size=3, target_modules=["up"]),
        adaptc.OFTConfig(oft_block_size=5, target_modules=["up"]),
    ]
    one, two = (saved(model, c, tmp_path / str(i), i) for i, c in enumerate(configs))
    program = adaptc.compile(model, {"one": one, "two": two}, example_inputs=X)
    first = adaptc.merge(adaptc.compile(model, one, example_inputs=X))
    middle = Net().double()
    middle.load_state_dict(dict(first.state_dict))
    after = adaptc.compile(middle, two, example_inputs=X)
    assert_close(program(X), after(X), 1e-9)
    assert_close(adaptc.merge(program)(X), after(X), 1e-9)
    other = adaptc.compile(model, {"two": two, "one": one}, example_inputs=X)
    assert not torch.allclose(other(X), program(X), rtol=1e-3, atol=1e-3)


def test_as_peft_where_peft_is_right(model: nn.Module, tmp_path: Path):
    """Two LoRA adapters at once, each written for PEFT under its name, and read from there."""
    configs = {"style": {"r": 3, "target_modules": ["up"]}, "task": {"r": 2, "target_modules": ["up", "down"]}}
    program = adaptc.compile(
        model, {n: adaptc.LoraConfig(**c) for n, c in configs.items()}, example_inputs=X, training=True
    )
    randomized(program)
    for name in configs:
        adaptc.save_adapter(program, tmp_path, adapter_name=name)
    twin = Net().double()
    twin.load_state_dict(model.state_dict())
    theirs = peft.PeftModel.from_pretrained(twin, str(tmp_path / "style"), adapter_name="style")
    theirs.load_adapter(str(tmp_path / "task"), adapter_name="task")
    theirs.base_model.set_adapter(["style", "task"])
    assert_close(program(X), theirs(X), 1e-9)
    with pytest.raises(adaptc.ConfigError, match=r"no adapter called 'default'.*'style', 'task'"):
        adaptc.save_adapter(program, tmp_path)


def test_one_of_them_swaps_or_goes(model: nn.Module, tmp_path: Path):
    lora = adaptc.LoraConfig(r=3, target_modules=["up", "down"])
    hra = adaptc.HRAConfig(r=2, target_modules=["up"])
    style, style2 = (saved(model, lora.replace(r=r), tmp_path / f"l{r}", r) for r in (3, 5))
    turn = saved(model, hra, tmp_path / "hra", 7)
    program = adaptc.compile(model, {"turn": turn, "style": style}, example_inputs=X)
    both = program(X)
    adaptc.swap(program, {"style": style2})
    assert_valid(program)
    assert_close(program(X), adaptc.compile(model, {"turn": turn, "style": style2}, example_inputs=X)(X), 1e-9)
    adaptc.swap(program, {"turn": None})
    assert_close(program(X), adaptc.compile(model, style2, example_inputs=X)(X), 1e-9)
    adaptc.swap(program, {"turn": turn, "style": style})
    assert_close(program(X), both, 1e-9)
    bound = program.bind({"style": None})
    assert_close(bound(X), adaptc.compile(model, turn, example_inputs=X)(X), 1e-9)
    for bad in (style, {"tone": style}, {}):
        with pytest.raises(adaptc.SwapError, match=r"name the one to change.*'turn', 'style'"):
            adaptc.swap(program, bad)
    assert_close(program(X), both, 1e-9)


def test_options_of_a_swap_are_of_one_of_them(model: nn.Module, tmp_path: Path):
    config = adaptc.LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False)
    program = adaptc.compile(model, {"a": config, "b": config.replace(r=2)}, example_inputs=X)
    for name in "ab":
        adaptc.save_adapter(program, tmp_path, adapter_name=name)
    both = program(X)
    adaptc.swap(program, {"b": tmp_path}, adapter_name="b")
    assert_close(program(X), both, 1e-9)
    wider = config.replace(r=2, lora_alpha=32)
    adaptc.swap(program, {"b": tmp_path / "b"}, config=wider)
    assert program.binding.joint_adapters["b"].config.lora_alpha == 32
    assert not torch.allclose(program(X), both)
    now = program.binding
    with pytest.raises(adaptc.ConfigError, match="config= is of one adapter, and 2 are given"):
        adaptc.swap(program, {"a": tmp_path / "a", "b": tmp_path / "b"}, config=wider)
    assert program.binding is now


def test_read_from_a_file(model: nn.Module, tmp_path: Path):
    configs = {
        "a": adaptc.LoraConfig(r=3, target_modules=["up"]),
        "b": adaptc.VeraConfig(r=5, target_modules=["up", "down"]),
        "c": adaptc.VeraConfig(r=3, target_modules=["down"], projection_prng_key=4),
    }
    program = adaptc.compile(model, configs, example_inputs=X, training=True)
    randomized(program)
    loaded = adaptc.load(adaptc.save(program, tmp_path / "p.pt2"))
    assert torch.equal(loaded(X), program(X))
    assert list(loaded.binding.joint_adapters) == ["a", "b", "c"]
    for name in configs:
        adaptc.save_adapter(loaded, tmp_path, adapter_name=name)
    adaptc.swap(program, {n: tmp_path / n for n in configs})
    assert torch.equal(loaded(X), program(X))
    assert "LORA + VERA adapter 'a, b, c'" in str(adaptc.report(loaded))


def test_training_reaches_all_of_them(model: nn.Module):
    configs = {
        n: adaptc.LoraConfig(r=r, target_modules=["up"], init_lora_weights=False) for n, r in (("a", 2), ("b", 3))
    }
    program = adaptc.compile(model, configs, example_inputs=X, training=True)
    module = program.module()
    module(X).square().sum().backward()
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert len(named) == 4
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in named.values())


class Tied(Net):
    """Two layers, and a table that a head shares."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(29, 15)
        self.head = nn.Linear(9, 15)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(self.embed(x)))


IDS = torch.tensor([[3, 17, 5, 3, 0], [1, 28, 5, 17, 2]])
TRAINED: dict[str, Any] = {
    "whole": {"target_modules": ["up"], "modules_to_save": ["head"]},
    "rows": {"target_modules": ["up"], "trainable_token_indices": {"embed": [3, 17]}},
    "some of them": {"target_modules": ["up"], "trainable_token_indices": {"embed": [5, 17, 3]}},
    "others": {"target_modules": ["down"], "trainable_token_indices": {"embed": [0, 5]}},
    "the table": {"target_modules": ["down"], "modules_to_save": ["embed"]},
    "biases": {"target_modules": ["up"], "bias": "all"},
    "its biases": {"target_modules": ["up"], "bias": "lora_only"},
}


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ("whole", "whole", r"all of it in 'head\.(weight|bias)'"),
        ("whole", "biases", r"all of it in 'head\.bias'"),
        ("biases", "its biases", r"all of it in 'up\.bias'"),
        ("rows", "some of them", r"the rows 3, 17 in 'embed\.weight'"),
        ("some of them", "others", r"the rows 5 in 'embed\.weight'"),
        ("rows", "the table", r"all of it in 'embed\.weight'"),
        ("the table", "rows", r"all of it in 'embed\.weight'"),
        ("rows", "others", ""),
        ("whole", "rows", ""),
    ],
)
def test_what_only_one_of_them_can_train_is_refused(first: str, second: str, what: str, tmp_path: Path):
    """As PEFT refuses it: the later one would count alone, in silence."""
    torch.manual_seed(5)
    net = Tied().double().eval()
    configs = {"one": adaptc.LoraConfig(r=2, **TRAINED[first]), "two": adaptc.LoraConfig(r=3, **TRAINED[second])}
    if what:
        with pytest.raises(adaptc.ConfigError, match=f"'one' and 'two' both train {what}"):
            adaptc.compile(net, configs, example_inputs=IDS)
        return
    program = adaptc.compile(net, configs, example_inputs=IDS, training=True)
    randomized(program)
    for name in configs:
        adaptc.save_adapter(program, tmp_path, adapter_name=name)
    theirs = peft.PeftModel.from_pretrained(net, str(tmp_path / "one"), adapter_name="one")
    theirs.load_adapter(str(tmp_path / "two"), adapter_name="two")
    for module in theirs.modules():  # one by one, since wrappers of whole modules and tables take one adapter alone
        if isinstance(module, LoraLayer):
            module.set_adapter([n for n in ("one", "two") if n in module.lora_A])
        elif isinstance(module, TrainableTokensLayer):
            module.set_adapter(list(module.trainable_tokens_delta))
        elif isinstance(module, ModulesToSaveWrapper):
            module.set_adapter("one")
    assert_close(program(IDS), theirs(IDS), 1e-9)


def test_a_swap_to_what_the_other_trains_is_refused(tmp_path: Path):
    torch.manual_seed(5)
    net = Tied().double().eval()
    rows, some, others = (adaptc.LoraConfig(r=2, **TRAINED[n]) for n in ("rows", "some of them", "others"))
    for name, config in (("some", some.replace(target_modules=["down"])), ("others", others)):
        adaptc.save_adapter(adaptc.compile(net, config, example_inputs=IDS), tmp_path / name)
    program = adaptc.compile(net, {"one": rows, "two": others}, example_inputs=IDS)
    before = program(IDS)
    with pytest.raises(adaptc.ConfigError, match=r"'one' and 'two' both train the rows 3, 17"):
        adaptc.swap(program, {"two": tmp_path / "some"})
    assert torch.equal(program(IDS), before)
    adaptc.swap(program, {"one": None, "two": tmp_path / "others"})


def test_refusals(model: nn.Module, tmp_path: Path):
    lora = adaptc.LoraConfig(r=2, target_modules=["up"])
    with pytest.raises(adaptc.ConfigError, match="names of adapters"):
        adaptc.compile(model, {"a.b": lora}, example_inputs=X)
    pissa = lora.replace(init_lora_weights="pissa")
    with pytest.raises(adaptc.ConfigError, match="'a' and 'b' both change"):
        adaptc.compile(model, {"a": pissa, "b": pissa}, example_inputs=X)
    program = adaptc.compile(model, {"a": lora, "b": lora}, example_inputs=X)
    with pytest.raises(adaptc.ConfigError, match="one adapter at a time"):
        adaptc.package(program, tmp_path / "p.pt2")
