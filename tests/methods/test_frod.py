"""FRoD beyond the table of methods: bases that the layers of one role share, made of the weights of all of them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.frod.model import _category_from_key, _layer_index_from_key
from safetensors.torch import load_file
from torch import Tensor, nn

import adaptc
from adaptc import CheckpointError, ConfigError, FrodConfig, TargetError
from adaptc.methods.shared_factors.frod import block_of, category_of, count_entries, draw_entries
from tests.support.chain import FILE, as_stored, copy_adapter_with, peft_config, randomize, tensor_files_are_equal
from tests.support.layer_table import Experts
from tests.support.subject import loss


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"q": nn.Linear(12, 9), "o": nn.Linear(9, 12)})
        self.down = nn.Linear(12, 5, bias=False)
        self.up = nn.Linear(5, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.attn["o"](torch.tanh(self.attn["q"](x))))
        return torch.tanh(self.up(torch.tanh(self.down(x))))


class Blocks(nn.Module):
    """(batch, 12) -> (batch, 12), with categories that have more rows than columns in all, and fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


TARGETS = ["q", "o", "down"]


def blocks(dtype: torch.dtype = torch.float64) -> Blocks:
    torch.manual_seed(2)
    return Blocks().to(dtype).eval()


def inputs(batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(batch)
    return torch.randn(batch, 12).to(dtype)


def peft_blocks(
    path: Path, dtype: torch.dtype = torch.float64, random_values: bool = True, seed: int | None = None, **options: Any
) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft_config("FrodConfig", **{"target_modules": TARGETS, "progressbar": False, **options})
        base = blocks(dtype)
        if seed is not None:
            torch.manual_seed(seed)
        model = peft.get_peft_model(base, config).eval()
        if random_values:
            randomize({n: p for n, p in model.named_parameters() if p.requires_grad})
        model.save_pretrained(str(path))
    return model


def compiled(adapter: Any, dtype: torch.dtype = torch.float64, **options: Any) -> adaptc.AdaptedProgram:
    return adaptc.compile(blocks(dtype), adapter, example_inputs=inputs(3, dtype), **options)


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layer.11.attention.self.query",
        "encoder.layer.2.attention.output.dense",
        "encoder.layer.2.output.dense",
        "model.layers.3.self_attn.q_proj",
        "h.7.attn.c_attn",
        "h.7.c_fc",
        "classifier.dense",
        "head",
        "experts.4.layers.mlp.5.up",
        "layers.x.3.up",
        "a.layers",
    ],
)
def test_roles_and_blocks_are_peft_s(name):
    assert category_of(name) == _category_from_key(name)
    assert block_of(name) == _layer_index_from_key(name, -1)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.3, 1.0])
def test_entries_are_off_the_diagonal_and_distinct(rate):
    for places, size in zip(draw_entries(3, rate, (1, 2, 7)), (1, 2, 7), strict=True):
        assert places.shape == (2, count_entries(size, rate))
        assert not (places[0] == places[1]).any()
        assert len({*zip(*places.tolist(), strict=True)}) == places.shape[1]


@pytest.mark.parametrize("saved", [True, False])
def test_layers_of_one_role_share_a_basis(tmp_path, saved):
    model = peft_blocks(tmp_path / "a", save_projection=saved, sparse_rate=0.2, projection_prng_key=5)
    program, x = compiled(tmp_path / "a"), inputs(5)
    torch.testing.assert_close(program(x), model(x), rtol=1e-9, atol=1e-9)
    found = program.binding.values
    for slot in ("frod_V", "frod_s_indices"):
        assert len({found[a.slots[slot]].data_ptr() for a in program.adaptation.attachments}) == 3
    for a in program.adaptation.attachments:
        layer, category = model.base_model.model.get_submodule(a.module), category_of(a.module)
        for slot in ("frod_V", "frod_s_indices", "frod_s_size"):
            assert torch.equal(found[a.slots[slot]], getattr(model.base_model, slot)[category]["default"])
        assert torch.equal(found[a.slots["frod_U"]], layer.frod_U["default"])
    adaptc.save_adapter(program, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")
    assert len(load_file(tmp_path / "b" / FILE)) == 18 + 9 * saved
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(blocks(), str(tmp_path / "b")).eval()
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        adaptc.merge(program)(x), copy.deepcopy(model).merge_and_unload()(x), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("init", [True, False])
def test_first_values_are_peft_s(tmp_path, init):
    options: dict[str, Any] = {
        "sparse_rate": 0.2,
        "init_weights": init,
        "target_modules": TARGETS,
        "progressbar": False,
    }
    model = peft_blocks(tmp_path / "a", torch.float32, random_values=False, seed=1, **options)
    program = compiled(FrodConfig(**options), torch.float32, generator=torch.Generator().manual_seed(1))
    adaptc.save_adapter(program, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")
    x = inputs(4, torch.float32)
    torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
    base = blocks(torch.float32)(x)
    assert torch.allclose(program(x), base, rtol=1e-4, atol=1e-5) == init


@pytest.mark.long
def test_swaps_to_other_sites_and_places(tmp_path):
    options: list[dict[str, Any]] = [
        {"target_modules": ["q", "down"], "projection_prng_key": 1},
        {"target_modules": ["o"], "save_projection": False},
        {"save_projection": False, "projection_prng_key": 7, "regularization_alpha": 0.1},
    ]
    models = [peft_blocks(tmp_path / str(i), sparse_rate=0.2, **o) for i, o in enumerate(options)]
    program, x = compiled([tmp_path / str(i) for i in range(3)]), inputs(2)
    for i in (2, 0, 1, 2):
        adaptc.swap(program, tmp_path / str(i))
        program.validate()
        torch.testing.assert_close(program(x), models[i](x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(adaptc.merge(program)(x), models[i](x), rtol=1e-9, atol=1e-9)
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    torch.testing.assert_close(loaded(x), models[2](x), rtol=1e-9, atol=1e-9)
    adaptc.swap(loaded, tmp_path / "0")
    torch.testing.assert_close(loaded(x), models[0](x), rtol=1e-9, atol=1e-9)
    peft_blocks(tmp_path / "other", sparse_rate=0.3)
    with pytest.raises(adaptc.SwapError, match=r"compiled for rate=0\.2, and the adapter has rate=0\.3"):
        adaptc.swap(program, tmp_path / "other")


@pytest.mark.long
def test_changes_of_two_adapters_add_up(tmp_path):
    for name, key in (("a", 1), ("b", 2)):
        peft_blocks(tmp_path / name, sparse_rate=0.2, projection_prng_key=key, target_modules=["down"])
    one, two = (compiled(tmp_path / n) for n in "ab")
    both = compiled({"a": tmp_path / "a", "b": tmp_path / "b"})
    name = "layers.1.down.weight"
    base = blocks().get_parameter(name).detach()
    changes = [adaptc.merge(p).state_dict[name] - base for p in (one, two)]
    torch.testing.assert_close(adaptc.merge(both).state_dict[name], base + sum(changes), rtol=1e-9, atol=1e-9)
    x = inputs(3)
    torch.testing.assert_close(both(x), adaptc.merge(both)(x), rtol=1e-8, atol=1e-8)


@pytest.mark.long
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_training_is_peft_s(tmp_path, dropout):
    model = peft_blocks(tmp_path / "a", sparse_rate=0.2, frod_dropout=dropout).train()
    module, x, found = compiled(tmp_path / "a", training=True).module(), inputs(4), []
    for m in (model, module.train()):
        torch.manual_seed(0)
        out = m(x)
        loss(out).backward()
        grads = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        found.append((out, {n.removeprefix("base_model.model."): g for n, g in grads.items()}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-8)
    assert len(found[0][1]) == 18
    torch.testing.assert_close(module.eval()(x), model.eval()(x), rtol=1e-9, atol=1e-9)


@pytest.mark.long
def test_above_half_precision_the_weight_is_made_in_float32(tmp_path):
    """PEFT rounds U, V and l to bfloat16, and with them the weight, before it has changed anything."""
    options: dict[str, Any] = {"target_modules": TARGETS, "progressbar": False}
    model = peft_blocks(tmp_path / "a", torch.bfloat16, random_values=False, **options)
    program, x = compiled(FrodConfig(**options), torch.bfloat16), inputs(64, torch.bfloat16)
    exact = blocks(torch.bfloat16).float()(x.float())
    own, theirs, base = ((out(x).float() - exact).abs().mean() for out in (program, model, blocks(torch.bfloat16)))
    assert own < 1.5 * base
    assert own < theirs


def test_a_later_layer_of_one_role_and_block_stands_for_both(tmp_path):
    """As in PEFT, whose table of weights has one place for the two."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(6, 7, bias=False)])})
            self.two = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(6, 7, bias=False)])})

        def forward(self, x: Tensor) -> Tensor:
            return self.one["layers"][0](x) + torch.tanh(self.two["layers"][0](x))

    torch.manual_seed(0)
    base = Twins().double()
    config = {"target_modules": ["0"], "progressbar": False, "save_projection": False, "sparse_rate": 0.2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), peft.FrodConfig(**config)).eval()
        randomize({n: p for n, p in model.named_parameters() if p.requires_grad})
        model.save_pretrained(str(tmp_path))
    x = torch.randn(3, 6).double()
    program = adaptc.compile(base, tmp_path, example_inputs=x)
    torch.testing.assert_close(program(x), model(x), rtol=1e-9, atol=1e-9)


def test_files_that_do_not_fit_are_refused(tmp_path):
    peft_blocks(tmp_path / "a", sparse_rate=0.2)
    program = compiled(tmp_path / "a")
    before = program(inputs(2))
    without = copy_adapter_with(tmp_path / "a", tmp_path / "b", lambda t: t.pop("base_model.frod_V.attn_q"))
    with pytest.raises(CheckpointError, match=r"frod_V.attn_q' is missing"):
        adaptc.swap(program, without)

    def shift(t: dict[str, Tensor]) -> None:
        t["base_model.frod_s_indices.attn_q"] += 7

    with pytest.raises(CheckpointError, match=r"frod_s_indices.'attn_q' holds places from 7 to 18, and .* 12 inputs"):
        adaptc.swap(program, copy_adapter_with(tmp_path / "a", tmp_path / "c", shift))
    assert torch.equal(program(inputs(2)), before)


def test_layers_without_a_common_basis_are_refused():
    model = nn.ModuleDict({"a": nn.ModuleDict({"up": nn.Linear(5, 7)}), "b": nn.ModuleDict({"a": nn.ModuleDict()})})
    model["b"]["a"]["up"] = nn.Linear(7, 9)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["b"]["a"]["up"](torch.tanh(self.parts["a"]["up"](x)))

    with pytest.raises(
        ConfigError, match=r"one basis for all layers of the role 'a_up', and these have 5 and 7 inputs"
    ):
        adaptc.compile(Both(), FrodConfig(target_modules=["up"]), example_inputs=torch.randn(2, 5))
    with pytest.raises(TargetError, match="stacks 3 matrices of experts"):
        adaptc.compile(Experts(5, 7), FrodConfig(target_parameters=["matrices"]), example_inputs=torch.randn(2, 5))


def test_weights_without_a_basis_are_refused():
    model = nn.Sequential(nn.Linear(5, 7))
    nn.init.constant_(model[0].weight, float("nan"))
    config = FrodConfig(target_modules=["0"])
    with pytest.raises(ConfigError, match="not all of them are finite"):
        adaptc.compile(model, config, example_inputs=torch.randn(2, 5))
    nn.init.eye_(model[0].weight)  # of which one inverse is that of zeros
    with pytest.raises(ConfigError, match=r"no common basis of its weights with regularization_alpha=-1\.0"):
        adaptc.compile(model, config.replace(regularization_alpha=-1.0), example_inputs=torch.randn(2, 5))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sparse_rate": 1.5}, r"sparse_rate must lie in \[0, 1\], got 1.5"),
        ({"frod_dropout": 1.0}, r"frod_dropout must lie in \[0, 1\)"),
        ({"runtime_offload_base_weight": True}, "runtime_offload_base_weight=True is not supported: the base weights"),
        ({"bias": "some"}, "'frod_only'"),
    ],
)
def test_bad_values_are_refused_by_name(options, match):
    with pytest.raises(ConfigError, match=match):
        FrodConfig(**options)


def test_config_has_peft_s_fields_and_defaults():
    assert as_stored(FrodConfig(target_modules=["q"])) == as_stored(peft_config("FrodConfig", target_modules=["q"]))
