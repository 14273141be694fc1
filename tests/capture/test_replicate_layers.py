"""Replicated layers: PEFT's outputs, shared parameters, modules of their own, and a model that is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adaptc.capture.capture import capture
from adaptc.capture.repeated_layers.replicate_layers import replicate_layers
from adaptc.errors import ConfigError
from tests.support.families import FAMILIES

RANGES = [(0, 2), (1, 2), (0, 1), (0, 2)]
ORDER = [0, 1, 1, 0, 0, 1]
LISTS = {
    "llama": "model.layers",
    "qwen3": "model.layers",
    "gemma2": "model.layers",
    "mixtral": "model.layers",
    "bert": "bert.encoder.layer",
    "falcon": "transformer.h",
    "gpt2": "transformer.h",
    "gpt_neo": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "roberta": "roberta.encoder.layer",
}


def logits(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**FAMILIES[name].inputs(2, 9)).logits


# Families whose list of layers PEFT finds and whose config lists nothing by layer: PEFT leaves such lists as they are.
@pytest.mark.parametrize(("name", "target"), [("llama", "q_proj"), ("mixtral", "v_proj"), ("bert", "query")])
def test_outputs_are_those_of_peft(name: str, target: str) -> None:
    replica = replicate_layers(FAMILIES[name].build(), RANGES)
    config = LoraConfig(target_modules=[target], layer_replication=[list(r) for r in RANGES])  # type: ignore[arg-type]
    oracle = get_peft_model(FAMILIES[name].build(), config).eval()  # B is zero, so the adapter does nothing
    torch.testing.assert_close(logits(replica, name), logits(oracle, name), rtol=0, atol=0)
    inner = oracle.get_base_model().config.to_dict()
    assert replica.config.num_hidden_layers == inner["num_hidden_layers"] == 6


@pytest.mark.parametrize("name", sorted(LISTS))
def test_layers_are_modules_of_their_own_over_the_same_parameters(name: str) -> None:
    model = FAMILIES[name].build()
    modules = {n: id(m) for n, m in model.named_modules()}
    before, config = logits(model, name), copy.deepcopy(model.config.to_dict())
    replica = replicate_layers(model, RANGES)

    old, new = (m.get_submodule(LISTS[name]) for m in (model, replica))
    assert len(new) == len(ORDER)
    for position, source in enumerate(ORDER):
        expected = dict(old[source].named_parameters())
        found = dict(new[position].named_parameters())
        assert expected.keys() == found.keys()
        assert all(found[key] is expected[key] for key in expected)
        for key in ("layer_idx", "layer_id"):
            indexed = [getattr(m, key) for m in new[position].modules() if hasattr(m, key)]
            assert indexed == [position for m in old[source].modules() if hasattr(m, key)]
    every = [id(m) for layer in new for m in layer.modules()]
    assert len(every) == len(set(every))
    shared = {key.split(".", 1)[-1]: p for key, p in replica.named_parameters() if not key.startswith(LISTS[name])}
    assert shared
    assert all(any(p is q for q in model.parameters()) for p in shared.values())

    assert not torch.equal(logits(replica, name), before)
    assert {n: id(m) for n, m in model.named_modules()} == modules
    assert model.config.to_dict() == config
    assert torch.equal(logits(model, name), before)
    assert replica.config.num_hidden_layers == len(ORDER)
    assert all(m.config is replica.config for m in new.modules() if hasattr(m, "config"))


@pytest.mark.parametrize("name", ["gemma2", "qwen3", "gpt_neo"])
def test_repeating_every_layer_once_is_the_model(name: str) -> None:
    model = FAMILIES[name].build()
    replica = replicate_layers(model, [(0, 1), (1, 2)])
    torch.testing.assert_close(logits(replica, name), logits(model, name), rtol=0, atol=0)


def test_what_the_config_lists_by_layer_follows_the_layers() -> None:
    model = FAMILIES["gemma2"].build()
    kinds = list(model.config.layer_types)
    assert len(set(kinds)) == 2
    assert replicate_layers(model, RANGES).config.layer_types == [kinds[i] for i in ORDER]


@pytest.mark.long
def test_replica_is_captured_with_a_parameter_for_each_copy() -> None:
    model = FAMILIES["llama"].build()
    replica = replicate_layers(model, [(0, 2), (0, 2)])
    captured = capture(replica)
    assert captured.module_types["model.layers.3.self_attn.q_proj"] == "torch.nn.modules.linear.Linear"
    first, third = (captured.program.state_dict[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 2))
    assert first is third
    inputs = FAMILIES["llama"].inputs(3, 5)
    with torch.no_grad():
        found = captured.program.module()(**inputs).logits
        torch.testing.assert_close(found, replica(**inputs).logits, rtol=1e-6, atol=1e-6)


def test_tensors_that_are_not_registered_are_shared_too() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))
            self.derived = self.weight * 2  # no leaf: cannot be copied

    model = nn.Module()
    model.layers = nn.ModuleList([Layer(), Layer()])
    replica = replicate_layers(model, [(1, 2), (0, 2), (1, 2)])
    assert [layer.derived is model.layers[i].derived for layer, i in zip(replica.layers, [1, 0, 1, 1], strict=True)]
    assert all(layer.derived is model.layers[i].derived for layer, i in zip(replica.layers, [1, 0, 1, 1], strict=True))


@pytest.mark.parametrize(
    "ranges", [[], [(0, 3)], [(1, 1)], [(-1, 1)], [(1, 0)], [(0,)], [5], [(0.0, 1)], [(False, True)]]
)
def test_ranges_outside_the_list_are_refused(ranges) -> None:
    with pytest.raises(ConfigError, match="layer_replication"):
        replicate_layers(FAMILIES["llama"].build(), ranges)


def test_list_that_is_not_found_is_named() -> None:
    with pytest.raises(ConfigError, match=r"looked for layers, h, encoder\.layer, decoder\.layers in .*resnet.*stages"):
        replicate_layers(FAMILIES["resnet"].build(), [(0, 1)])
