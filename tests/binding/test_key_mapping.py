"""Adapters whose keys were written for other module names: every entry point renames them, and errors say how."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import adaptc
from adaptc import CheckpointError, ConfigError, LoraConfig, SwapError
from adaptc.adapter_files.directory import read_adapter, write_adapter
from adaptc.binding.suggest_mapping import suggest_mappings

CONFIG = LoraConfig(r=3, target_modules=["up", "down"])
EXAMPLE = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Modules called ``layers.0.up``, and below another one ``model.layers.0.up``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Outer(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.model = net

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(1)
    return Outer(Net())


@pytest.fixture(scope="module")
def program(net: nn.Module) -> Any:
    return adaptc.compile(net, CONFIG, example_inputs=EXAMPLE)


def adapter(program: Any) -> dict[str, Tensor]:
    """An adapter with keys as the program has them."""
    torch.manual_seed(2)
    state = program.module().state_dict()
    return {k: torch.randn_like(t) for k, t in state.items()}


def inner(tensors: dict[str, Tensor], old: str = "model.layers", new: str = "layers") -> dict[str, Tensor]:
    """The same for the model inside."""
    return {k.replace(f"base_model.model.{old}", f"base_model.model.{new}"): t for k, t in tensors.items()}


MAPPING = {"^layers": "model.layers"}


def as_directory(tensors: dict[str, Tensor], folder: Path) -> Path:
    bare = {k.removeprefix("base_model.model."): t for k, t in tensors.items()}
    return write_adapter(folder, CONFIG.to_dict(), bare)


FORMS: dict[str, Callable[[dict[str, Tensor], Path], Any]] = {
    "state dict": lambda tensors, folder: tensors,
    "bare keys": lambda tensors, folder: {k.removeprefix("base_model.model."): t for k, t in tensors.items()},
    "directory": as_directory,
    "file": lambda tensors, folder: read_adapter(as_directory(tensors, folder)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("entry", ["swap", "bind"])
def test_every_form_of_an_adapter_is_renamed(program, form, entry, tmp_path):
    tensors = adapter(program)
    given = FORMS[form](inner(tensors), tmp_path)
    expected = program.bind(tensors)(EXAMPLE)
    assert not torch.allclose(expected, program.base(EXAMPLE))
    for _ in range(2):  # the second time by what is remembered of the first
        if entry == "bind":
            found = program.bind(given, key_mapping=MAPPING)(EXAMPLE)
        else:
            own = adaptc.compile(program.base, CONFIG)
            assert adaptc.swap(own, given, key_mapping=MAPPING).sites == 4
            found = own(EXAMPLE)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(SwapError, match="no slot"):
        program.bind(given)


def test_compile_renames_directories(net, program, tmp_path):
    tensors = adapter(program)
    made = adaptc.compile(net, as_directory(inner(tensors), tmp_path), example_inputs=EXAMPLE, key_mapping=MAPPING)
    torch.testing.assert_close(made(EXAMPLE), program.bind(tensors)(EXAMPLE), rtol=0, atol=0)


@pytest.mark.parametrize("form", ["state dict", "bare keys", "weights"])
@pytest.mark.parametrize("entry", ["compile", "swap", "bind"])
def test_keys_without_a_config_are_renamed_alike(net, program, form, entry, tmp_path):
    """What PEFT puts in front of a key is no part of what an expression sees, whoever reads it."""
    tensors = adapter(program)
    given: Any = inner(tensors)
    if form == "bare keys":
        given = FORMS[form](given, tmp_path)
    elif form == "weights":
        save_file({k: t.clone() for k, t in given.items()}, tmp_path / "some.safetensors")
        given = tmp_path / "some.safetensors"
    options: dict[str, Any] = {"key_mapping": MAPPING, "config": LoraConfig(r=3)}
    if entry == "compile":
        made = adaptc.compile(net, given, example_inputs=EXAMPLE, **options)
    elif entry == "swap":
        made = adaptc.compile(program.base, CONFIG)
        adaptc.swap(made, given, **options)
    else:
        made = adaptc.bind(program, given, **options)
    torch.testing.assert_close(made(EXAMPLE), program.bind(tensors)(EXAMPLE), rtol=0, atol=0)


def test_adapters_that_act_together_are_renamed(net, program, tmp_path):
    together = adaptc.compile(net, {"one": CONFIG, "two": CONFIG}, example_inputs=EXAMPLE)
    tensors = adapter(program)
    adaptc.swap(together, {"two": inner(tensors)}, key_mapping=MAPPING)
    torch.testing.assert_close(together(EXAMPLE), program.bind(tensors)(EXAMPLE), rtol=1e-5, atol=1e-5)


def test_the_first_expression_that_matches_rules(program):
    tensors = adapter(program)
    rules = {"^layers": "model.layers", "layers": "never"}
    found = program.bind(inner(tensors), key_mapping=rules)(EXAMPLE)
    torch.testing.assert_close(found, program.bind(tensors)(EXAMPLE), rtol=0, atol=0)


def test_a_mapping_with_nothing_to_rename_is_refused(net, program):
    before = program.binding
    with pytest.raises(ConfigError, match=r"key_mapping.*directories"):
        adaptc.compile(net, CONFIG, example_inputs=EXAMPLE, key_mapping=MAPPING)
    with pytest.raises(CheckpointError, match=r"both become '.*' *\. Make the key_mapping"):
        adaptc.swap(program, adapter(program), key_mapping={r"layers\.\d": "layers.0"})
    with pytest.raises(ConfigError, match="key_mapping"):
        adaptc.swap(program, adapter(program), key_mapping={"(": ""})
    assert program.binding is before


@pytest.mark.parametrize(
    "option", [{"key_mapping": MAPPING}, {"config": CONFIG}, {"component": "unet"}, {"adapter_name": "one"}]
)
@pytest.mark.parametrize("what", ["binding", "bound", "program"])
def test_what_is_bound_takes_no_options_of_files(program, what, option):
    before = program.binding
    given = {"binding": program.binding, "bound": program.bind(program), "program": program}[what]
    with pytest.raises(ConfigError, match=f"{next(iter(option))} is for files and state dicts"):
        adaptc.swap(program, given, **option)
    with pytest.raises(ConfigError, match=f"{next(iter(option))} is for files and state dicts"):
        adaptc.bind(program, given, **option)
    assert program.binding is before


def test_options_of_the_base_and_of_state_dicts(program):
    with pytest.raises(ConfigError, match="the base has no config"):
        program.bind(None, config=CONFIG)
    program.bind(None, config=None, key_mapping=None)
    with pytest.raises(ConfigError, match="adapter_name='one' chooses from a directory"):
        program.bind(adapter(program), adapter_name="one")
    with pytest.raises(SwapError, match=r"this is the base.*prog\.base"):
        adaptc.swap(program, program.bind(None))


@pytest.mark.parametrize(
    ("old", "new"),
    [("model.layers", "layers"), ("model.layers", "base.model.layers"), ("model.layers", "a(b.layers")],
)
def test_an_error_has_the_mapping_that_fits(program, old, new):
    tensors = adapter(program)
    given = inner(tensors, old, new)
    with pytest.raises(SwapError, match="under other names") as raised:
        adaptc.swap(program, given)
    assert "compile" not in str(raised.value)
    mapping = eval(re.search(r"key_mapping=(\{.*?\})", str(raised.value))[1])  # type: ignore[index]
    torch.testing.assert_close(
        program.bind(given, key_mapping=mapping)(EXAMPLE), program.bind(tensors)(EXAMPLE), rtol=0, atol=0
    )


def test_an_error_has_a_mapping_for_modules_the_program_was_compiled_without(net, program):
    narrow = adaptc.compile(net, CONFIG.replace(target_modules=["up"]), example_inputs=EXAMPLE)
    with pytest.raises(SwapError, match=r"compile\(model, adapter, key_mapping=\{'\^': 'model\.'\}\)"):
        adaptc.swap(narrow, inner(adapter(program)))


def test_no_mapping_is_made_up_where_none_fits(program):
    tensors = adapter(program)
    for wrong in (
        {**inner(tensors), "base_model.model.head.lora_A.weight": torch.ones(3, 5)},
        {k.replace("up", "gate"): t for k, t in tensors.items()},
        {k.replace("layers.1", "layers.2"): t for k, t in inner(tensors).items()},
    ):
        with pytest.raises(SwapError, match="compile") as raised:
            adaptc.swap(program, wrong)
        assert "key_mapping" not in str(raised.value)


TAILS = ["lora_A.weight", "lora_B.weight", "lora_A.weight_scale", "vera_lambda_b"]
paths = st.lists(st.sampled_from(["a", "b.c", "net", "x+y", "0", "model"]), max_size=3).map(
    lambda parts: "".join(f"{p}." for p in parts)
)


@given(
    sites=st.sets(st.sampled_from([f"layers.{i}.{n}" for i in range(11) for n in ("q", "k", "v")]), min_size=1),
    ours=paths,
    theirs=paths,
)
def test_a_mapping_makes_all_keys_known_ones(sites, ours, theirs):
    known = [f"{ours}{site}" for site in sorted(sites)]
    keys = [f"{theirs}{site}.{tail}" for site in sorted(sites) for tail in TAILS]
    found = suggest_mappings(keys, known, TAILS)
    if ours == theirs:
        assert found == []
        return
    for mapping in found:
        assert sorted(_renamed(k, mapping) for k in keys) == sorted(f"{k}.{t}" for k in known for t in TAILS)
    assert len(found) == 1


def _renamed(key: str, mapping: dict[str, str]) -> str:
    for pattern, new in mapping.items():
        key, hits = re.subn(pattern, new, key)
        if hits:
            break
    return key


def test_parts_of_a_model_have_beginnings_of_their_own():
    sites = ["unet.mid.q", "unet.up.0.q", "text.layers.0.q", "text.layers.1.q"]
    keys = ["lora_unet.mid.q.t", "lora_unet.up.0.q.t", "lora_te.layers.0.q.t", "lora_te.layers.1.q.t"]
    (mapping,) = suggest_mappings(keys, sites, ["t"])
    assert [_renamed(k, mapping) for k in keys] == [f"{s}.t" for s in sites]


def test_tensors_of_the_model_itself_follow_the_others():
    keys = ["net.t", "net.a.q.t"]
    assert suggest_mappings(keys, ["a.q", ""], ["t"]) == [{r"^net\.": ""}]
    assert suggest_mappings(["net.t"], ["a.q", ""], ["t"]) == []


def test_every_mapping_is_named_where_several_fit():
    sites = ["text.layers.0.q", "vision.layers.0.q"]
    assert suggest_mappings(["layers.0.q.t"], sites, ["t"]) == [{"^": "text."}, {"^": "vision."}]
