"""SHiRA: illegal options, PEFT's masks, masks of the user's own, what a file may hold."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from peft.tuners.shira.mask_functions import random_mask
from safetensors.torch import load_file, save_file

import adaptc
from adaptc.errors import CheckpointError, ConfigError, SwapError, TargetError
from adaptc.methods.sparse.shira import Shira
from adaptc.passes.graph.ops import Op
from tests.support.spectral import compile_blocks, differing_fields, make_blocks, peft_wrapped

FILE = "adapter_model.safetensors"
BAD = [{"r": 0}, {"r": True}, {"r": 1.5}, {"random_seed": "x"}]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_illegal_options_are_named(bad):
    (name,) = bad
    with pytest.raises(ConfigError, match=rf"ShiraConfig\.{name}"):
        adaptc.ShiraConfig(**bad)


def test_fields_and_defaults_are_pefts():
    assert differing_fields(peft.ShiraConfig(), adaptc.ShiraConfig()) == {}


def test_more_entries_than_the_matrix_has():
    with pytest.raises(ConfigError, match=r"site 'head\.weight'.*r=4 means 64 entries.*of the 55|r=3 is the most"):
        compile_blocks(adaptc.ShiraConfig(r=4, target_modules=["up", "head"]))
    with pytest.raises(ConfigError, match="no r fits: leave this layer out"):
        Shira(r=1).sizes.specialized_for(Op("weight", (1, 9)))
    with pytest.raises(TargetError, match="two axes"):
        Shira(r=1).slots(Op("weight", (9,)))


@pytest.mark.parametrize("seed", [None, 0, 9])
@pytest.mark.parametrize("zeros", [True, False])
def test_masks_and_first_values_are_pefts(seed, zeros):
    options = {"r": 3, "target_modules": ["up", "down", "head"], "random_seed": seed, "init_weights": zeros}
    theirs = peft_wrapped(peft.ShiraConfig(**options), seed=4)
    after = torch.rand(3)
    torch.manual_seed(4)
    program = compile_blocks(adaptc.ShiraConfig(**options))
    assert torch.equal(torch.rand(3), after)
    layers = dict(theirs.base_model.model.named_modules())
    for a in program.adaptation.attachments:
        weight, indices = (program.binding.values[a.slots[n]] for n in ("shira_weight", "shira_indices"))
        layer = layers[a.module]
        assert torch.equal(indices, layer.shira_indices["default"])
        assert indices.dtype == layer.shira_indices["default"].dtype == torch.int32
        assert torch.equal(weight, layer.shira_weight["default"])
        assert bool(weight.any()) is not zeros
        assert len({tuple(p) for p in indices.T.tolist()}) == weight.numel() == 3 * sum(layer.base_layer.weight.shape)


@pytest.mark.long
def test_masks_of_ones_own(tmp_path):
    """Of a layer and r, as in PEFT; they stay with copies of the config, and out of files."""

    def largest(layer, r, **options):
        n = r * (layer.in_features + layer.out_features)
        assert options == {}
        flat = layer.weight.abs().flatten()
        return torch.zeros_like(flat).index_fill(0, flat.topk(n).indices, 1).reshape(layer.weight.shape)

    options = {"r": 2, "target_modules": ["up", "head"], "mask_type": "largest", "init_weights": False}
    with pytest.warns(UserWarning, match="mask_type"):
        config = peft.ShiraConfig(**options)
    config.mask_fn = largest
    theirs = peft_wrapped(config)
    ours = adaptc.ShiraConfig(**options)
    with pytest.raises(ConfigError, match="mask_type='largest' is not 'random', and the config has no mask_fn"):
        compile_blocks(ours)
    ours.mask_fn = largest
    x = make_blocks()[1]
    torch.manual_seed(4)
    program = compile_blocks(copy.copy(ours).replace(base_model_name_or_path="there"))
    torch.testing.assert_close(program(x), theirs(x), rtol=1e-6, atol=1e-6)
    torch.manual_seed(4)
    assert torch.equal(compile_blocks(config)(x), program(x))
    adaptc.save_adapter(program, tmp_path)
    assert "mask_fn" not in json.loads((tmp_path / "adapter_config.json").read_text())
    for again in (compile_blocks(tmp_path), adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))):
        torch.testing.assert_close(again(x), theirs(x), rtol=1e-6, atol=1e-6)
        adaptc.swap(again, tmp_path)


def test_a_mask_function_gets_the_seed_of_random_masks():
    config = adaptc.ShiraConfig(r=2, target_modules=["up"], random_seed=5)
    config.mask_fn = random_mask
    found = compile_blocks(config).binding.values
    expected = compile_blocks(config.replace()).binding.values
    plain = compile_blocks(adaptc.ShiraConfig(r=2, target_modules=["up"], random_seed=5)).binding.values
    indices = [k for k in found if "indices" in k]
    assert indices
    assert all(torch.equal(found[k], expected[k]) and torch.equal(found[k], plain[k]) for k in indices)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda layer, r: torch.ones(3, 3), r"shape \(7, 11\) with 36 ones .*gave shape \(3, 3\)"),
        (lambda layer, r: torch.ones_like(layer.weight), "with 77 ones"),
        (lambda layer, r: random_mask(layer, r) * 2, "with 0 ones"),
        (lambda layer, r: None, r"gave shape \(\)"),
    ],
)
def test_masks_that_are_none(mask, message):
    config = adaptc.ShiraConfig(r=2, target_modules=["up"])
    config.mask_fn = mask
    with pytest.raises(ConfigError, match=message):
        compile_blocks(config)


def test_indices_in_a_file(tmp_path):
    """Floats, as PEFT writes them on Windows, are read; places outside the matrix are refused by name."""
    program = compile_blocks(adaptc.ShiraConfig(r=2, target_modules=["head"], init_weights=False))
    adaptc.save_adapter(program, tmp_path)
    tensors = load_file(tmp_path / FILE)
    (key,) = [k for k in tensors if "indices" in k]
    save_file({**tensors, key: tensors[key].float()}, tmp_path / FILE)
    other = compile_blocks(adaptc.ShiraConfig(r=1, target_modules=["head"]))
    adaptc.swap(other, tmp_path)
    assert torch.equal(other(make_blocks()[1]), program(make_blocks()[1]))
    for axis, word in ((0, "row 5"), (1, "column 11")):
        wrong = tensors[key].clone()
        wrong[axis, 3] = (5, 11)[axis]
        save_file({**tensors, key: wrong}, tmp_path / FILE)
        with pytest.raises(CheckpointError, match=rf"shira_indices holds {word}, and the matrix has shape \(5, 11\)"):
            adaptc.swap(other, tmp_path)
    save_file({k: v for k, v in tensors.items() if k != key}, tmp_path / FILE)
    with pytest.raises((CheckpointError, SwapError), match="shira_indices"):
        adaptc.swap(other, tmp_path)
    assert torch.equal(other(make_blocks()[1]), program(make_blocks()[1]))


def test_places_that_are_named_twice_add_up():
    op, W = Op("weight", (3, 4)), torch.zeros(3, 4)
    slots = {"shira_weight": torch.tensor([1.0, 2.0, 4.0]), "shira_indices": torch.tensor([[1, 2, 1], [3, 0, 3]])}
    expected = torch.sparse_coo_tensor(slots["shira_indices"], slots["shira_weight"], (3, 4), check_invariants=True)
    assert torch.equal(Shira(r=1).weight(op, W, slots, torch.tensor(1.0)), expected.to_dense())
