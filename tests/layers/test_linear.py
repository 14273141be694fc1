"""Linear layers, transformers' Conv1D, embeddings, and weights that several modules share: PEFT is the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import adaptc
from tests.support.custom_models import CastTied, FunctionalHead, Tied
from tests.support.oracle import assert_differs
from tests.support.site_cases import LINEAR, LORA
from tests.support.site_checks import assert_close, assert_valid, changed_by, parametrize_checks


@pytest.mark.few(22)
@parametrize_checks(LINEAR)
def test_site(name, check, tmp_path):
    assert changed_by(check, name, tmp_path) == []


def test_an_adapter_on_one_of_two_tied_weights_leaves_the_other():
    model = Tied().double().eval()
    ids = torch.randint(29, (3, 5))
    for target, other in (("embed", "head"), ("head", "embed")):
        config = adaptc.LoraConfig(**LORA, target_modules=[target])
        merged = adaptc.merge(adaptc.compile(model, config, example_inputs=ids))
        assert_valid(merged)
        assert not torch.equal(merged.state_dict[f"{target}.weight"], model.embed.weight)
        assert torch.equal(merged.state_dict[f"{other}.weight"], model.embed.weight)


def test_a_weight_the_parent_reads_too_is_untied_by_a_merge():
    model = FunctionalHead().double().eval()
    config = adaptc.LoraConfig(**LORA, target_modules=["embed"])
    merged = adaptc.merge(adaptc.compile(model, config, example_inputs=torch.randint(29, (3, 5))))
    ids = torch.randint(29, (2, 7))
    twin = nn.Embedding.from_pretrained(merged.state_dict["embed.weight"].detach())
    assert_close(merged(ids), nn.functional.linear(torch.tanh(model.mid(twin(ids))), model.embed.weight))
    assert_valid(merged)


def test_tied_weights_that_are_cast_before_each_use(tmp_path):
    model = CastTied().eval()
    ids = torch.randint(29, (2, 5))
    for targets in (["embed"], ["head"], ["embed", "head"]):
        config = adaptc.LoraConfig(**LORA, target_modules=targets)
        program = adaptc.compile(model, config, example_inputs=torch.randint(29, (3, 4)))
        adapted = program(ids)
        assert_differs(adapted, model(ids), at_least=0.1)
        merged = adaptc.merge(program)
        assert_valid(merged)
        assert_close(merged(ids), adapted, 0.05)
        assert {"embed", "head"} - set(targets) == {
            m for m in ("embed", "head") if torch.equal(merged.state_dict[f"{m}.weight"], model.embed.weight)
        }
        assert torch.equal(adaptc.unload(program)(ids), model(ids))
