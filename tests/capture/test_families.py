"""Every architecture family is captured from the model alone, which stays as it was; the program does what it does."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from adaptc.capture.capture import capture
from adaptc.errors import AdaptcWarning
from tests.support.families import FAMILIES
from tests.support.model_state import changed_paths, state_of

CACHES = {"past_key_values", "cache_params", "cache"}
TEXT = ("causal", "encoder", "seq2seq")
TRAINED = ["llama", "gpt2", "deberta_v2", "electra", "t5", "vit", "resnet"]


def assert_same_outputs(found, expected) -> None:
    assert type(found) is type(expected)
    assert set(expected) - set(found) <= CACHES
    assert set(found) <= set(expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_program_equals_model_at_other_sizes(name: str) -> None:
    family = FAMILIES[name]
    model = family.build().train()
    config = copy.deepcopy(model.config.to_dict())
    before = state_of(model)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AdaptcWarning)
        captured = capture(model)
    told = [str(w.message) for w in caught if issubclass(w.category, AdaptcWarning)]
    assert told == []

    assert not captured.training
    assert changed_paths(before, state_of(model)) == []
    assert captured.model_type == config["model_type"]
    for key, parameter in model.named_parameters():
        assert captured.program.state_dict[key] is parameter
    assert set(captured.module_types) == {n for n, _ in model.named_modules(remove_duplicate=False)}
    assert captured.fills == ({"attention_mask": ("ones_like", "input_ids")} if family.kind in TEXT else {})
    head = model.get_output_embeddings()
    assert (captured.output_embedding is None) == (head is None)
    if captured.output_embedding is not None:
        assert model.get_submodule(captured.output_embedding) is head

    run = captured.program.module()
    model.eval()
    for batch, seq in [(4, 9), (1, 5), (5, 1)]:
        inputs = family.inputs(batch, seq)
        with torch.no_grad():
            assert_same_outputs(run(**inputs), model(**inputs))


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("name", TRAINED)
def test_training_program_has_the_model_s_loss_and_gradients(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    before = state_of(model)
    captured = capture(model, training=True)
    assert captured.training
    assert changed_paths(before, state_of(model)) == []

    batch, seq = 4, 5
    inputs = family.inputs(batch, seq)
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, 3, (batch,), generator=generator)
    if name == "electra":
        inputs |= {"start_positions": targets, "end_positions": targets + 1}
    elif family.kind in ("vision", "image") or name == "deberta_v2":
        inputs["labels"] = targets
    else:
        inputs["labels"] = inputs.pop("decoder_input_ids", inputs.get("input_ids")).clone()
        inputs["labels"][0, 1] = -100

    def gradients(run) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        torch.manual_seed(3)  # both draw the same dropout masks
        loss = run(**inputs).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    found, found_grads = gradients(captured.program.module())
    expected, expected_grads = gradients(model.train())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert set(found_grads) == set(expected_grads)
    for key, value in expected_grads.items():
        torch.testing.assert_close(found_grads[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    rows = {"ignore_rows"} if targets is inputs.get("labels") else {"ignore_like"}
    seq2seq = family.kind in ("seq2seq", "audio")
    assert {how for how, _ in captured.fills.values()} - {"ones_like"} == (
        set() if seq2seq or name == "electra" else rows
    )
