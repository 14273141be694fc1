"""Modules trained as a whole, and single rows of embeddings: PEFT's outputs, gradients, files and merged weights."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adaptc
from adaptc import LoraConfig
from adaptc.errors import ConfigError, TargetError
from tests.support.custom_models import Autocast, Net
from tests.support.oracle import assert_differs
from tests.support.site_cases import LORA, WHOLE, ids
from tests.support.site_checks import (
    adapter_parameters,
    assert_close,
    assert_valid,
    changed_by,
    parametrize_checks,
    quiet,
    without_prefix,
)


@parametrize_checks(WHOLE)
def test_site(name, check, tmp_path):
    assert changed_by(check, name, tmp_path) == []


def llama(tied=True):
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def with_random_adapter(model, directory, **config):
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{**LORA, "target_modules": ["q_proj"], **config})).eval()
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.normal_()
    wrapped.save_pretrained(str(directory))
    return wrapped


TOKENS = [
    ([3, 8, 36], True),
    ({"embed_tokens": [3, 8]}, True),
    ({"embed_tokens": [3, 8], "lm_head": [3, 8]}, True),
    ({"embed_tokens": [3, 8], "lm_head": [36]}, True),
    ({"lm_head": [36, 3]}, True),
    ({"lm_head": [36, 3]}, False),
    ([8], False),
]


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize(("tokens", "tied"), TOKENS, ids=str)
def test_rows_of_embeddings_and_heads(tokens, tied, tmp_path):
    wrapped = with_random_adapter(llama(tied), tmp_path, trainable_token_indices=tokens)
    model, x = llama(tied), torch.tensor([[3, 8, 36, 1, 3], [0, 2, 8, 5, 8]])
    program = adaptc.compile(model, tmp_path)
    assert_valid(program)
    expected = wrapped(input_ids=x).logits
    assert_close(program(input_ids=x).logits, expected, 2e-5)
    assert_differs(expected, model(input_ids=x).logits, at_least=0.1)
    merged = adaptc.merge(program)
    assert_close(merged(input_ids=x).logits, expected, 2e-5)
    assert_valid(merged)
    adaptc.save_adapter(program, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(llama(tied), str(tmp_path / "again")).eval()
    assert_close(again(input_ids=x).logits, expected, 2e-5)


@pytest.mark.long
def test_other_rows_and_other_counts_swap(tmp_path):
    program = adaptc.compile(llama(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2, 3]))
    x = torch.tensor([[3, 8, 36, 1]])
    assert_close(program(input_ids=x).logits, llama()(input_ids=x).logits, 1e-5)
    for n, tokens in enumerate(([36], [8, 1, 0, 3, 36], {"embed_tokens": [3, 8]})):
        wrapped = with_random_adapter(llama(), tmp_path / str(n), trainable_token_indices=tokens)
        adaptc.swap(program, tmp_path / str(n))
        assert_valid(program)
        assert_close(program(input_ids=x).logits, wrapped(input_ids=x).logits, 2e-5)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [({"embed": [3, 3]}, "twice"), ({"embed": [29]}, "28"), ({"embed": [-1]}, "-1"), ({"nowhere": [1]}, "embed")],
    ids=str,
)
def test_rows_that_cannot_be(tokens, says):
    config = LoraConfig(target_modules=["down"], trainable_token_indices=tokens)
    with pytest.raises((ConfigError, TargetError), match=says):
        adaptc.compile(Net().eval(), config, example_inputs=ids(5, 29)(3))


def test_rows_alone_in_bfloat16():
    model = Net().bfloat16().eval()
    config = LoraConfig(target_modules=[], trainable_token_indices=[3, 17])
    program = adaptc.compile(model, config, example_inputs=ids(5, 29)(3))
    (delta,) = adapter_parameters(program).values()
    assert delta.dtype == torch.float32
    assert delta.requires_grad
    x = torch.tensor([[3, 17, 5, 3, 0]])
    assert torch.equal(program(x), model(x))
    new = torch.randn(2, 7)
    adaptc.swap(program, {"embed.token_adapter.trainable_tokens_delta": new})
    merged = adaptc.merge(program)
    table = merged.state_dict["embed.weight"]
    assert torch.equal(table[[3, 17]], new.bfloat16())
    rest = [i for i in range(29) if i not in (3, 17)]
    assert torch.equal(table[rest], model.embed.weight[rest])
    assert torch.equal(merged(x), program(x))


def test_running_statistics_are_trained_apart_from_the_model(tmp_path):
    """PEFT trains a copy of the module, statistics and all, and saves what became of them."""
    torch.manual_seed(4)
    model, x = Net().train(), torch.randint(29, (8, 5))
    twin = Net()
    twin.load_state_dict(model.state_dict())
    config = {"target_modules": ["down"], "modules_to_save": ["batch"], "r": 3}
    program = adaptc.compile(model, LoraConfig(**config), example_inputs=torch.randint(29, (4, 5)), training=True)
    wrapped = peft.get_peft_model(twin, peft.LoraConfig(**config)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    module = program.module()
    module.train()
    for _ in range(3):
        assert_close(module(x), wrapped(x), 1e-5)
    found = bare_file(program, tmp_path)
    expected = without_prefix(peft.get_peft_model_state_dict(wrapped))
    statistics = {k for k in expected if k.startswith("batch.")}
    assert len(statistics) == 5
    for key in statistics:
        assert_close(found[key], expected[key], 1e-5)
    assert found["batch.num_batches_tracked"] == 3
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    module.eval()
    assert_close(module(x), wrapped.eval()(x), 1e-5)


def bare_file(program, directory):
    from safetensors.torch import load_file

    return without_prefix(load_file(adaptc.save_adapter(program, directory) / "adapter_model.safetensors"))


class WithUnused(Autocast):
    """A module to save that holds a layer nothing calls."""

    def __init__(self):
        super().__init__()
        self.head = Head()

    def forward(self, x):
        return self.head(super().forward(x))


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = torch.nn.Linear(5, 3), torch.nn.Linear(2, 9)

    def forward(self, x):
        return self.used(x)


def test_what_the_program_does_not_read_is_kept_in_files(tmp_path):
    x = torch.randn(3, 7)
    config = {"target_modules": ["up"], "modules_to_save": ["head"]}
    wrapped = with_random_adapter(WithUnused().eval(), tmp_path / "a", **config)
    program = adaptc.compile(WithUnused().eval(), LoraConfig(**{**LORA, **config}), example_inputs=x)
    adaptc.swap(program, tmp_path / "a")
    expected = without_prefix(peft.get_peft_model_state_dict(wrapped))
    found = bare_file(program, tmp_path / "b")
    assert set(found) == set(expected) > {"head.spare.weight"}
    assert all(torch.equal(found[k], expected[k]) for k in found)
    loaded = adaptc.load(adaptc.save(program, tmp_path / "p.pt2"))
    assert set(bare_file(loaded, tmp_path / "c")) == set(expected)


@pytest.mark.long
@pytest.mark.parametrize("changed", [False, True])
def test_files_with_the_weights_of_adapted_embeddings(changed, tmp_path):
    """PEFT writes them and loads them into the base."""
    with quiet(".*save_embedding_layers.*"):
        wrapped = with_random_adapter(llama(False), tmp_path, target_modules=["lm_head", "embed_tokens"])
    model = llama(False)
    if changed:
        with torch.no_grad():
            model.lm_head.weight.add_(1)
    before = model.lm_head.weight.clone()
    x = torch.tensor([[3, 8, 36, 1]])
    base = model(input_ids=x).logits
    program = adaptc.compile(model, tmp_path)
    assert_close(program(input_ids=x).logits, wrapped(input_ids=x).logits, 1e-5)
    assert_close(
        program.module()(input_ids=x, attention_mask=torch.ones_like(x)).logits, wrapped(input_ids=x).logits, 1e-5
    )
    assert torch.equal(model.lm_head.weight, before)
    assert_close(adaptc.unload(program)(input_ids=x).logits, base, 1e-5)
