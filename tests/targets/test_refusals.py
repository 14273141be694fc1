"""What the target rules refuse or report where PEFT says nothing, and what the messages tell."""

from __future__ import annotations

import time
from collections import OrderedDict

import peft
import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import AdaptcError, ConfigError, TargetError
from adaptc.methods._shared.name_patterns import unused_patterns
from adaptc.patterns import pattern_value
from adaptc.targets.name_rules import TargetCandidate, select_modules_to_save, select_targets

MODEL = {
    "model": "Body",
    "model.embed": "torch.nn.modules.sparse.Embedding",
    **{f"model.layers.{i}": "Block" for i in range(3)},
    **{f"model.layers.{i}.{p}": "torch.nn.modules.linear.Linear" for i in range(3) for p in ("q_proj", "v_proj")},
    **{f"model.layers.{i}.norm": "torch.nn.modules.normalization.LayerNorm" for i in range(3)},
    "lm_head": "torch.nn.modules.linear.Linear",
}
SMALL = [
    TargetCandidate(n, t, "embedding" if "Embedding" in t else "linear")
    for n, t in MODEL.items()
    if t.endswith(("Linear", "Embedding"))
]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "k_prj", "v_prj"]}, "'v_prj' matches no module; nearest are .*'v_proj'"),
        ({"target_modules": ["q_proj", "norm"]}, r"'norm' exists but is not adaptable: .*LayerNorm"),
        ({"target_modules": ["layers.1"]}, r"'model.layers.1' \(Block\); it holds 'model.layers.1.q_proj'"),
        ({"target_modules": [".*q_proj"]}, "list items are names, not regular expressions"),
        ({"target_modules": "q_proj"}, r"whole names; to match endings such as .* write \['q_proj'\]"),
        ({"target_modules": "q_pro."}, "matches only a part of 'model.layers.0.q_proj'"),
        ({"target_modules": "no_such"}, "'no_such' matches no module"),
        ({"target_modules": "all-linear", "exclude_modules": ["lm_hed"]}, "exclude_modules: 'lm_hed'.*'lm_head'"),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["layers.1"]},
            r"what it holds stays adapted.*layers\\\\\.1",
        ),
        ({"target_modules": ["lm_head"], "exclude_modules": ".*head"}, "left out: 1 excluded by '.*head'"),
        ({"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, "1 under modules_to_save"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 7]}, "layer 7; .* are 0, 1, 2"),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "h"}, r"are none \(layers_pattern"),
    ],
)
def test_what_matches_nothing_is_refused(options, message):
    with pytest.raises(TargetError, match=message):
        select_targets(SMALL, **options, all_names=MODEL)


def test_an_adapter_of_another_model_says_that_it_may_be(tmp_path):
    """Its config names modules, and none of them is here."""
    other = nn.Sequential(OrderedDict(query=nn.Linear(5, 3)))
    config = adaptc.LoraConfig(target_modules=["query"], init_lora_weights=False)
    adaptc.save_adapter(adaptc.compile(other, config, example_inputs=torch.randn(2, 5)), tmp_path / "a")
    model = nn.Sequential(OrderedDict(up=nn.Linear(5, 3)))
    with (
        pytest.warns(adaptc.AdaptcWarning, match="'query' matches no module"),
        pytest.raises(
            TargetError, match=r"none of \['query'\], but up\. Is it the model that the adapter was made for"
        ),
    ):
        adaptc.compile(model, tmp_path / "a", example_inputs=torch.randn(2, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": "all-linear", "layers_pattern": "layers"}, "layers_pattern"),
        ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, "needs layers_to_transform"),
    ],
)
def test_options_that_do_not_go_together_are_refused_as_by_peft(options, message):
    with pytest.raises(ValueError, match="layers_"):
        peft.LoraConfig(**options)
    with pytest.raises(ConfigError, match=message):
        select_targets(SMALL, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "(q"},
        {"target_modules": ["q_proj"], "exclude_modules": "*"},
        {"target_modules": ["q_proj"], "modules_to_save": ["("]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "("},
        {"target_modules": ["q_proj", 3]},
        {"target_modules": ["q_proj", ""]},
        {"target_modules": None},
    ],
)
def test_malformed_options_are_config_errors(options):
    with pytest.raises(ConfigError):
        select_targets(SMALL, **options)
    with pytest.raises(AdaptcError):
        pattern_value({"(": 1}, "a", 2)


def test_empty_and_dummy_targets_select_nothing():
    for target in ([], set(), "dummy-target-modules"):
        got = select_targets(SMALL, target_modules=target)
        assert got.names == ()
        assert len(got.left_out) == len(SMALL)


def test_reasons_are_told():
    got = select_targets(
        SMALL,
        target_modules=["q_proj", "v_proj", "embed"],
        exclude_modules=["layers.0.q_proj", "norm"],
        layers_to_transform=[0, 1],
        modules_to_save=["embed"],
        all_names=MODEL,
    )
    assert got.names == ("model.layers.0.v_proj", "model.layers.1.q_proj", "model.layers.1.v_proj")
    assert got.matches["embed"] == ()
    assert dict(got.left_out) == {
        "model.embed": "under modules_to_save ('embed')",
        "model.layers.0.q_proj": "excluded by 'layers.0.q_proj'",
        "model.layers.2.q_proj": "layer 2 not in layers_to_transform",
        "model.layers.2.v_proj": "layer 2 not in layers_to_transform",
        "lm_head": "no entry names it",
    }


def test_a_module_that_an_entry_names_in_vain_is_reported():
    got = select_targets(SMALL, target_modules=".*layers.*", all_names=MODEL)
    assert [n for n, why in got.left_out if "not adaptable (LayerNorm)" in why] == [
        f"model.layers.{i}.norm" for i in range(3)
    ]


def test_linear_means_the_layer_not_the_product():
    router = TargetCandidate("router", "some.TopKRouter", "linear")
    proj = TargetCandidate("out_proj", "torch.nn.modules.linear.NonDynamicallyQuantizableLinear", "linear")
    assert select_targets([router, proj], target_modules="all-linear").names == ("out_proj",)


def test_cost_does_not_grow_with_the_product_of_names_and_entries():
    names = [f"model.blocks.{i // 8}.attn.{i % 8}.proj" for i in range(5000)]
    linear = [TargetCandidate(n, "torch.nn.modules.linear.Linear", "linear") for n in names]
    start = time.process_time()
    got = select_targets(linear, target_modules=names, exclude_modules=names[:2500], all_names=names)
    assert time.process_time() - start < 1.5
    assert got.names == tuple(names[2500:])


def test_a_saved_ending_is_not_adapted_either():
    linear = [TargetCandidate(n, "torch.nn.modules.linear.Linear", "linear") for n in ("my_head", "my_head.fc", "fc")]
    assert select_modules_to_save(["my_head", "my_head.fc", "fc"], ["head"]) == ["my_head"]
    assert select_targets(linear, target_modules=["fc", "my_head"], modules_to_save=["head"]).names == ("fc",)


def test_pattern_value_takes_any_type_and_no_pattern():
    assert pattern_value(None, "a", 8) == 8
    assert pattern_value({"a": 0}, "x.a", 8) == 0
    assert unused_patterns(None, ["a"]) == []
