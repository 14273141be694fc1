"""GraLoRA: what is particular to it. The checks that hold for every method are in ``test_every_method``."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adaptc
from adaptc import CheckpointError, ConfigError, GraloraConfig, TargetError
from adaptc.methods.lora_family.gralora import Gralora
from adaptc.passes.graph.ops import Op
from adaptc.runtime.rank_padding import find_paddings
from tests.support.chain import (
    FILE,
    TARGETS,
    as_stored,
    chain,
    compile_chain,
    copy_adapter_with,
    inputs,
    load_peft_chain,
    peft_chain,
    peft_config,
    tensor_files_are_equal,
)

#: plain blocks, and blocks beside a plain LoRA
KINDS = [{"r": 6, "alpha": 5}, {"r": 8, "alpha": 3, "gralora_k": 4, "hybrid_r": 3}]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", KINDS, ids=["blocks", "hybrid"])
def test_files_go_both_ways(options, tmp_path):
    model = peft_chain(peft_config("GraloraConfig", **options), tmp_path / "a")
    program = compile_chain(tmp_path / "a")
    close(program(inputs(5)), model(inputs(5)))
    close(adaptc.merge(program)(inputs(5)), model.merge_and_unload()(inputs(5)))
    adaptc.save_adapter(program, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")
    close(load_peft_chain(tmp_path / "b")(inputs(5)), program(inputs(5)))


def test_each_block_has_factors_of_its_own(tmp_path):
    """The change of a block reads no other block's factors, whatever the layout of the file."""
    peft_chain(peft_config("GraloraConfig", target_modules=["q"], r=4, alpha=8), tmp_path)
    found = load_file(tmp_path / FILE)
    a, b = (found[f"base_model.model.q.gralora_{n}"] for n in "AB")
    merged = adaptc.merge(compile_chain(tmp_path)).state_dict["q.weight"]
    for j in range(2):
        for n in range(2):
            rows, columns = slice(10 * j, 10 * j + 10), slice(6 * n, 6 * n + 6)
            change = (a[n][:, 2 * j : 2 * j + 2] @ b[j][2 * n : 2 * n + 2]).T * 2
            close(merged[rows, columns], chain().q.weight[rows, columns] + change)


@pytest.mark.parametrize("scheme", [True, False])
@pytest.mark.parametrize("hybrid", [0, 3])
def test_first_values_are_peft_s(tmp_path, hybrid, scheme):
    """In every layer: PEFT draws some values that it throws away."""
    options = {"r": 6, "hybrid_r": hybrid, "init_weights": scheme, "target_modules": TARGETS}
    peft_chain(peft_config("GraloraConfig", **options), tmp_path / "a", torch.float32, random_values=False, seed=1)
    generator = torch.Generator().manual_seed(1)
    adaptc.save_adapter(compile_chain(GraloraConfig(**options), torch.float32, generator=generator), tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("options", KINDS, ids=["blocks", "hybrid"])
def test_dropout_is_that_of_peft(options, tmp_path):
    """The plain LoRA beside the blocks has a noise of its own."""
    model = peft_chain(peft_config("GraloraConfig", gralora_dropout=0.5, **options), tmp_path / "a").train()
    module, x = compile_chain(tmp_path / "a", training=True).module(), inputs(4)
    torch.manual_seed(0)
    first = module(x)
    assert not torch.allclose(first, module(x))
    torch.manual_seed(0)
    close(first, model(x))
    close(module.eval()(x), model.eval()(x))


@pytest.mark.long
def test_one_program_serves_all_ranks(tmp_path):
    kinds = [{"r": 6, "hybrid_r": 3}, {"r": 2, "hybrid_r": 5, "alpha": 1}, {"r": 8, "hybrid_r": 1}]
    models = [peft_chain(peft_config("GraloraConfig", **k), tmp_path / str(i)) for i, k in enumerate(kinds)]
    program = compile_chain(GraloraConfig(r=4, hybrid_r=2, target_modules=TARGETS))
    for i in (2, 0, 1):
        adaptc.swap(program, tmp_path / str(i))
        close(program(inputs(2)), models[i](inputs(2)))
        close(adaptc.merge(program)(inputs(2)), models[i](inputs(2)))
    bank = program.bank({str(i): tmp_path / str(i) for i in range(3)})
    found = bank(inputs(4), adapters=["0", "2", None, "1"])
    for row, i in ((0, 0), (1, 2), (3, 1)):
        close(found[row], models[i](inputs(4))[row])
    close(found[2], chain()(inputs(4))[2])


def test_the_ranks_of_a_bare_state_dict_are_those_of_its_tensors(tmp_path):
    """The scale is that of the program's alpha over the ranks that were found."""
    model = peft_chain(peft_config("GraloraConfig", r=8, hybrid_r=2), tmp_path)
    program = compile_chain(GraloraConfig(r=4, hybrid_r=3, target_modules=TARGETS))
    adaptc.swap(program, load_file(tmp_path / FILE))
    close(program(inputs(2)), model(inputs(2)))
    assert not torch.allclose(program(inputs(2)), chain()(inputs(2)))


def test_blocks_and_a_plain_lora_are_another_structure(tmp_path):
    peft_chain(peft_config("GraloraConfig", r=4, hybrid_r=2), tmp_path)
    program = compile_chain(GraloraConfig(r=4, target_modules=TARGETS))
    with pytest.raises(adaptc.AdaptcError, match=r"hybrid|gralora_A_general"):
        adaptc.swap(program, tmp_path)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_inputs_of_four_axes():
    """PEFT takes two axes or three."""
    torch.manual_seed(0)
    model, x = Deep().double(), torch.randn(2, 3, 5, 12).double()
    config = GraloraConfig(r=6, hybrid_r=2, init_weights=False, target_modules=["layer"])
    program = adaptc.compile(model, config, example_inputs=x, form="apply")
    weight = adaptc.merge(program).state_dict["layer.weight"]
    assert not torch.allclose(weight, model.layer.weight, atol=1e-3)
    close(program(x), nn.functional.linear(x, weight, model.layer.bias))


@pytest.mark.parametrize("hybrid", [0, 3])
@pytest.mark.parametrize("form", ["apply", "weight"])
def test_packages_may_pad_the_rank(form, hybrid):
    op = Op("linear", (21, 15), torch.ops.aten.linear.default)
    assert find_paddings(Gralora(r=6, hybrid=hybrid > 0, hybrid_r=hybrid, k=3), op, form)


def test_tensors_that_are_no_grid_are_refused(tmp_path):
    peft_chain(peft_config("GraloraConfig", r=4), tmp_path / "a")
    program = compile_chain(tmp_path / "a")
    before = program(inputs(2))
    for name, change in (
        ("flat", lambda t: t.flatten(0, 1)),
        ("odd", lambda t: t[:, :, :3].clone()),
    ):
        key = "base_model.model.k.gralora_A"
        path = copy_adapter_with(
            tmp_path / "a", tmp_path / name, lambda d, key=key, change=change: d.update({key: change(d[key])})
        )
        with pytest.raises(CheckpointError, match=r"gralora_A.*expected three axes, with a multiple of gralora_k=2"):
            adaptc.swap(program, path)
    assert torch.equal(program(inputs(2)), before)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"gralora_k": 0}, "gralora_k must be a positive integer"),
        ({"hybrid_r": -1}, "hybrid_r must be an integer of at least 0"),
        ({"r": 7, "gralora_k": 3}, "r=7 and gralora_k=3. r=9 fits"),
        ({"gralora_dropout": 1.0}, r"gralora_dropout must lie in \[0, 1\)"),
        ({"bias": "some"}, "'gralora_only'"),
    ],
)
def test_bad_values_are_refused_by_name(options, match):
    with pytest.raises(ConfigError, match=match):
        GraloraConfig(**options)


def test_a_layer_that_no_grid_divides_is_refused():
    with pytest.raises(TargetError, match=r"'q.weight'.*\(20, 12\) into gralora_k=8 .* may be 1, 2, 4"):
        compile_chain(GraloraConfig(r=8, gralora_k=8, target_modules=["q"]))


def test_config_has_peft_s_fields_and_defaults():
    assert as_stored(GraloraConfig(target_modules=["q"])) == as_stored(
        peft_config("GraloraConfig", target_modules=["q"])
    )
