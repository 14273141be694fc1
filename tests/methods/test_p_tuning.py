"""P-tuning next to PEFT's: what its networks make, their gradients, and training that goes on from a file."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import adaptc
from adaptc import PromptEncoderConfig
from adaptc.errors import CheckpointError, ConfigError
from tests.support.families import FAMILIES
from tests.support.oracle import (
    assert_same,
    assert_same_gradients,
    file_tensors,
    gradients,
    load_peft,
    quiet,
    shared_base_program,
)
from tests.support.prompts import PROMPT_WARNINGS, labels, prompt_oracle, run_quietly, text

OPTIONS = {
    "MLP": {"encoder_hidden_size": 17},
    "LSTM": {"encoder_hidden_size": 11, "encoder_num_layers": 3},
}
KINDS = sorted(OPTIONS)


def options(kind, count=5):
    own = {"num_virtual_tokens": count, "encoder_reparameterization_type": kind, **OPTIONS[kind]}
    return {"task_type": "CAUSAL_LM", **own}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_training(kind, tmp_path):
    """Losses, the gradients of every part of the network, and files that PEFT reads and training goes on from."""
    oracle = prompt_oracle("llama", tmp_path / "peft", "PromptEncoderConfig", **options(kind))
    program = adaptc.compile(FAMILIES["llama"].build(), PromptEncoderConfig(**options(kind)), training=True)
    module = oracle.module_with_peft_values(program).eval()
    inputs = text(3, 11)
    inputs["labels"] = labels(inputs)
    got, want = module(**inputs), oracle.model(**inputs)
    torch.testing.assert_close(got.loss, want.loss)
    assert_same(got, want)
    ours, theirs = gradients(module, got), gradients(oracle.model, want)
    assert len(ours) == {"MLP": 7, "LSTM": 29}[kind]
    assert_same_gradients(ours, theirs)
    saved = adaptc.save_adapter(program, tmp_path / "ours")
    rows = file_tensors(saved)["prompt_embeddings"]
    torch.testing.assert_close(rows, file_tensors(oracle.path)["prompt_embeddings"])
    again = adaptc.compile(FAMILIES["llama"].build(), saved, training=True)
    kept = dict(program.binding.values)
    assert kept.keys() == again.binding.values.keys()
    assert all(torch.equal(t, again.binding.values[n]) for n, t in kept.items())
    assert gradients(again.module().eval(), again.module().eval()(**inputs)).keys() == ours.keys()
    with quiet(*PROMPT_WARNINGS):
        loaded = load_peft(FAMILIES["llama"].build(), saved)
    assert_same(run_quietly(loaded, text(2, 5)), run_quietly(oracle.model, text(2, 5)))
    with pytest.raises(CheckpointError, match="not the network that made them"):
        adaptc.compile(shared_base_program("llama"), oracle.path, training=True)


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_swaps(kind, backend, tmp_path):
    """Between files of PEFT's, of other numbers of tokens, adapters with a network, and the base."""
    program = adaptc.compile(shared_base_program("gpt2"), PromptEncoderConfig(**options(kind, 3)), backend=backend)
    own = adaptc.save_adapter(program, tmp_path / "own")
    expected = run_quietly(program, text(3, 7))
    oracles = [
        prompt_oracle("gpt2", tmp_path / str(n), "PromptEncoderConfig", seed=n, **options(kind, n)) for n in (1, 8)
    ]
    with adaptc.debug.assert_no_recompiles():
        for oracle in oracles:
            adaptc.swap(program, oracle.path)
            for size in ((3, 11), (1, 2)):
                assert_same(run_quietly(program, text(*size)), run_quietly(oracle.model, text(*size)), 1e-5)
            written = file_tensors(adaptc.save_adapter(program, tmp_path / "again"))
            assert written.keys() == {"prompt_embeddings"}
            assert torch.equal(written["prompt_embeddings"], file_tensors(oracle.path)["prompt_embeddings"])
        adaptc.swap(program, own)
        assert_same(run_quietly(program, text(3, 7)), expected)
    if backend == "eager":
        assert adaptc.verify(program, FAMILIES["gpt2"].build()).ok
        program.validate()
        loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
        assert_same(run_quietly(loaded, text(2, 5)), run_quietly(program, text(2, 5)))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_first_values(kind):
    """As torch begins the layers that PEFT's networks are made of."""
    program = adaptc.compile(shared_base_program("llama"), PromptEncoderConfig(**options(kind, 40)))
    with quiet(*PROMPT_WARNINGS):
        theirs = peft.get_peft_model(FAMILIES["llama"].build(), peft.PromptEncoderConfig(**options(kind, 40)))
    for name, want in theirs.prompt_encoder.named_parameters():
        got = program.binding.values[f"prompt_encoder.{name}"].detach()
        assert got.shape == want.shape
        if want.numel() > 100:
            assert 0.8 < float(got.std() / want.detach().std()) < 1.25, name
            if not name.endswith("embedding.weight"):
                assert 0.9 < float(got.abs().max() / want.detach().abs().max()) < 1.1, name


@pytest.mark.long
def test_dropout_of_an_lstm():
    """In training alone."""
    config = PromptEncoderConfig(**options("LSTM"), encoder_dropout=0.4)
    module = adaptc.compile(FAMILIES["llama"].build(), config, training=True).module()
    inputs = text(2, 5)
    inputs["labels"] = labels(inputs)
    assert not torch.equal(module(**inputs).logits, module(**inputs).logits)
    module.eval()
    assert torch.equal(module(**inputs).logits, module(**inputs).logits)
    assert isinstance(module, nn.Module)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"encoder_reparameterization_type": "GRU"}, "not one of MLP, LSTM"),
        ({"encoder_hidden_size": 0}, "encoder_hidden_size"),
        ({"encoder_dropout": 1.5}, "encoder_dropout"),
        ({"encoder_num_layers": 0}, "encoder_num_layers"),
    ],
)
def test_bad_options(more, message):
    with pytest.raises(ConfigError, match=message):
        PromptEncoderConfig(num_virtual_tokens=3, **more)


@pytest.mark.long
def test_files_with_parts_of_a_network(tmp_path):
    program = adaptc.compile(shared_base_program("llama"), PromptEncoderConfig(**options("MLP")))
    tensors = file_tensors(adaptc.save_adapter(program, tmp_path))
    del tensors["prompt_encoder.mlp_head.2.bias"]
    with pytest.raises(CheckpointError, match=r"lacks 'prompt_encoder.mlp_head.2.bias'"):
        adaptc.swap(program, tensors)
