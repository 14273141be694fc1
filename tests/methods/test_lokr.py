"""LoKr alone: how sizes are split, and adapters whose rank makes their factors one tensor or two."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lokr.layer import factorization
from torch import nn

import adaptc
from adaptc.errors import ConfigError, SwapError
from adaptc.methods.lycoris.lokr import LoKr, split_size
from adaptc.passes.graph.ops import Op
from tests.support.lycoris import assert_close, make_layers, normal, randomize, save_peft_adapter, slots_by_file_key
from tests.support.oracle import assert_differs


@given(st.integers(1, 3000), st.one_of(st.just(-1), st.integers(1, 70)))
def test_sizes_are_split_as_in_peft(size, factor):
    assert split_size(size, factor) == factorization(size, factor)


@pytest.mark.parametrize("factor", [0, -2, 2.0, True])
def test_illegal_factors_are_named(factor):
    with pytest.raises(ConfigError, match=r"LoKrConfig\.decompose_factor"):
        adaptc.LoKrConfig(decompose_factor=factor)


@pytest.mark.parametrize(
    ("r", "whole"), [(1, (False, False)), (2, (True, False)), (3, (True, False)), (4, (True, True))]
)
def test_the_rank_decides_what_is_one_tensor(r, whole):
    """3 x 7 times 4 x 5: a factor is one tensor from half of its longer side on."""
    assert LoKr(r=r, decompose_both=True).sizes.specialized_for(Op("linear", (21, 20))).whole == whole


def test_ranks_swap_where_the_tensors_are_the_same(tmp_path):
    model, x = make_layers(nn.Linear(20, 21)), normal(5, 20)
    options = {"target_modules": ["a"], "decompose_both": True, "alpha": 3}
    program = adaptc.compile(model, adaptc.LoKrConfig(r=2, **options), example_inputs=x[:3])
    theirs = save_peft_adapter(model, "LoKrConfig", tmp_path / "3", r=3, **options)
    adaptc.swap(program, tmp_path / "3")
    assert_close(program(x), theirs(x))
    again = adaptc.compile(model, adaptc.LoKrConfig(r=2, **options), example_inputs=x[:3])
    adaptc.swap(again, slots_by_file_key(program))  # the rank is read off the tensors
    assert_close(again(x), theirs(x))
    assert again.binding.methods["a.weight|lokr"].r == 3


def test_other_tensors_need_code_of_their_own(tmp_path):
    model, x = make_layers(nn.Linear(20, 21)), normal(5, 20)
    adapters = {"small": {"r": 3}, "large": {"r": 4}, "both": {"r": 1, "decompose_both": True}}
    theirs = {
        n: save_peft_adapter(model, "LoKrConfig", tmp_path / n, target_modules=["a"], **o) for n, o in adapters.items()
    }
    alone = adaptc.compile(model, tmp_path / "small", example_inputs=x[:3])
    before = alone(x)
    for name in ("large", "both"):
        with pytest.raises(SwapError, match=r"no slot in the program.*a\.lokr_w"):
            adaptc.swap(alone, tmp_path / name)
    assert torch.equal(alone(x), before)
    program = adaptc.compile(model, [tmp_path / n for n in adapters], example_inputs=x[:3])
    assert len(program.adaptation.attachments) == 3
    for name in (*adapters, "small"):
        adaptc.swap(program, tmp_path / name)
        assert_close(program(x), theirs[name](x))
        assert_close(adaptc.merge(program)(x), theirs[name](x))
    adaptc.swap(program, tmp_path / "large")
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    assert_close(loaded(x), theirs["large"](x))
    adaptc.save_adapter(loaded, tmp_path / "again")
    adaptc.swap(loaded, tmp_path / "both")
    assert_close(loaded(x), theirs["both"](x))
    adaptc.swap(loaded, tmp_path / "again")
    assert_close(loaded(x), theirs["large"](x))


@pytest.mark.parametrize("r", [2, 6], ids=["two tensors", "one tensor"])
def test_a_convolution_without_a_batch(r):
    model, x = make_layers(nn.Conv2d(15, 22, 3, padding="same", dilation=2)), normal(15, 5, 4)
    config = adaptc.LoKrConfig(r=r, target_modules=["a"])
    programs = [
        adaptc.compile(model, config, example_inputs=x, dynamic_shapes=None, form=form) for form in ("apply", "weight")
    ]
    found, expected = (randomize(p)(x) for p in programs)
    assert found.shape == (22, 5, 4)
    assert_differs(found, model(x), at_least=0.1)
    assert_close(found, expected)


def test_pefts_product_with_one_kernel_axis_stands_in_front_of_the_weight():
    """A whole W2 (k, n, kernel) of a one-dimensional convolution is multiplied as (1, l, m) by PEFT."""
    model = make_layers(nn.Conv1d(15, 22, 3))
    config = adaptc.LoKrConfig(r=8, target_modules=["a"])
    with pytest.raises(ConfigError, match="apply form"):
        adaptc.compile(model, config, example_inputs=normal(3, 15, 7), form="apply")
    program = adaptc.compile(model, config.replace(r=2), example_inputs=normal(3, 15, 7), form="apply")
    assert program.adaptation.attachments[0].form == "apply"
