"""Rows of embeddings as a method of its own: PEFT's outputs, gradients, files and merged weights; tied heads follow."""

from __future__ import annotations

import peft
import pytest
import torch

import adaptc
from adaptc import LoraConfig, TrainableTokensConfig
from adaptc.errors import ConfigError, TargetError
from tests.support.custom_models import FunctionalHead, Net
from tests.support.families import FAMILIES
from tests.support.oracle import Oracle, assert_differs, assert_same, file_tensors, run
from tests.support.site_checks import assert_close, assert_valid

TOKENS = [5, 9, 20, 60]


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["llama", "gemma", "t5"])
def test_families(name, tmp_path):
    """Heads that are tied or not, embeddings that scale (gemma), one that lends its weight to three (t5)."""
    oracle = Oracle.wrap_and_save(name, peft.TrainableTokensConfig(token_indices=TOKENS), tmp_path / "peft")
    assert_differs(oracle(3, 7), oracle.base_output(3, 7))
    program = adaptc.compile(FAMILIES[name].build(), TrainableTokensConfig(token_indices=TOKENS))
    assert_valid(program)
    assert program.binding.config.target_modules == oracle.model.peft_config["default"].target_modules
    assert_same(run(program, oracle.family, 3, 7), oracle.base_output(3, 7))
    oracle.check_trained(program, tmp_path / "ours")
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    assert_same(run(loaded, oracle.family, 3, 7), oracle(3, 7))


@pytest.mark.long
@pytest.mark.parametrize("name", ["bert"])
def test_heads_keep_their_bias(name, tmp_path):
    """PEFT forgets the bias of a tied head in forward, and has it again once merged."""
    oracle = Oracle.wrap_and_save(name, peft.TrainableTokensConfig(token_indices=TOKENS), tmp_path)
    program = adaptc.compile(FAMILIES[name].build(), tmp_path)
    merged = oracle.merge_copy()
    assert_same(run(program, oracle.family, 3, 7), run(merged, oracle.family, 3, 7))
    assert_differs(oracle(3, 7), run(merged, oracle.family, 3, 7))


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("gemma", r".*embed_tokens"),
        ("gemma", ["lm_head"]),
        ("gpt2", ["wpe"]),
        ("t5", ["encoder.embed_tokens"]),
        ("t5", ["embed_tokens"]),
    ],
    ids=str,
)
def test_other_modules(name, targets, tmp_path):
    """The input embedding alone is followed by what is tied to it."""
    config = {"token_indices": list(range(0, 61, 3)), "target_modules": targets}
    oracle = Oracle.wrap_and_save(name, peft.TrainableTokensConfig(**config), tmp_path / "peft")
    assert_differs(oracle(3, 7), oracle.base_output(3, 7))
    program = adaptc.compile(FAMILIES[name].build(), TrainableTokensConfig(**config))
    assert_same(run(program, oracle.family, 3, 7), oracle.base_output(3, 7))
    adaptc.swap(program, tmp_path / "peft")
    assert_valid(program)
    assert_same(run(program, oracle.family, 3, 7), oracle(3, 7))
    assert_same(run(adaptc.merge(program), oracle.family, 3, 7), oracle(3, 7))
    ours = file_tensors(adaptc.save_adapter(program, tmp_path / "ours"))
    assert ours.keys() == file_tensors(oracle.path).keys()


@pytest.mark.long
@pytest.mark.parametrize(("name", "targets"), [("gemma", ["lm_head", "embed_tokens"]), ("t5", ["shared", "lm_head"])])
def test_embeddings_named_with_what_is_tied_to_them(name, targets, tmp_path):
    """PEFT fails here. The tied layer has the embedding's rows, whoever is named first."""
    oracle = Oracle.wrap_and_save(name, peft.TrainableTokensConfig(token_indices=TOKENS), tmp_path)
    config = TrainableTokensConfig(token_indices=TOKENS, target_modules=targets)
    program = adaptc.compile(FAMILIES[name].build(), config)
    assert sum(p.requires_grad for p in program.module().parameters()) == 1
    adaptc.swap(program, tmp_path)
    assert_same(run(program, oracle.family, 3, 7), oracle(3, 7))


@pytest.mark.long
def test_other_tokens_swap(tmp_path):
    program = adaptc.compile(FAMILIES["gemma"].build(), TrainableTokensConfig(token_indices=[7, 8, 30]))
    for n, tokens in enumerate(([60], [8, 9, 5, 20, 33, 7], [20, 30])):
        oracle = Oracle.wrap_and_save(
            "gemma", peft.TrainableTokensConfig(token_indices=tokens), tmp_path / str(n), seed=n
        )
        adaptc.swap(program, oracle.path)
        assert_valid(program)
        assert_same(run(program, oracle.family, 3, 7), oracle(3, 7))
        assert program.binding.config.token_indices == tokens


@pytest.mark.long
def test_next_to_the_rows_of_a_lora(tmp_path):
    """One program for both: the keys differ, so each adapter finds its own."""
    lora = peft.LoraConfig(r=4, target_modules=["q"], trainable_token_indices=[5, 9])
    first = Oracle.wrap_and_save("t5", lora, tmp_path / "lora")
    second = Oracle.wrap_and_save("t5", peft.TrainableTokensConfig(token_indices=[20, 9, 4]), tmp_path / "tokens")
    program = adaptc.compile(FAMILIES["t5"].build(), [first.path, second.path])
    for oracle in (first, second, first):
        adaptc.swap(program, oracle.path)
        assert_valid(program)
        assert_same(run(program, oracle.family, 3, 7), oracle(3, 7))
        ours = file_tensors(adaptc.save_adapter(program, tmp_path / "ours"))
        assert ours.keys() == file_tensors(oracle.path).keys()


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_first_values(dtype):
    config = {"token_indices": TOKENS, "init_weights": False}
    torch.manual_seed(6)
    theirs = peft.get_peft_model(FAMILIES["gemma"].build().to(dtype), peft.TrainableTokensConfig(**config))
    model = FAMILIES["gemma"].build().to(dtype)
    torch.manual_seed(6)
    program = adaptc.compile(model, TrainableTokensConfig(**config))
    (ours,) = [p for p in program.module().parameters() if p.requires_grad]
    (want,) = [p for p in theirs.parameters() if p.requires_grad]
    assert ours.dtype == want.dtype == torch.float32
    assert torch.equal(ours, want)


@pytest.mark.long
def test_tied_names_must_agree(tmp_path):
    oracle = Oracle.wrap_and_save("gemma", peft.TrainableTokensConfig(token_indices=[5, 9]), tmp_path)
    program = adaptc.compile(FAMILIES["gemma"].build(), tmp_path)
    tensors = {k.removeprefix("base_model.model."): v for k, v in file_tensors(tmp_path).items()}
    one = {k: v for k, v in tensors.items() if "embed" in k}
    adaptc.swap(program, {k: v + 1 for k, v in one.items()})
    before = run(program, oracle.family)
    with pytest.raises(adaptc.CheckpointError, match=r"lm_head.*embed_tokens"):
        adaptc.swap(program, {k: v + ("embed" in k) for k, v in tensors.items()})
    assert_same(run(program, oracle.family), before)
    adaptc.swap(program, tensors)
    assert_same(run(program, oracle.family), oracle())


def test_a_bare_program_with_one_embedding():
    model, x = Net().eval(), torch.tensor([[3, 8, 28, 1, 3], [0, 2, 8, 5, 8]])
    program = torch.export.export(model, (x,))
    adapted = adaptc.compile(program, TrainableTokensConfig(token_indices=[3, 28]))
    assert adapted.binding.config.target_modules == ["embed"]
    assert_close(adapted(x), model(x), 1e-6)
    new = torch.randn(2, 7)
    adaptc.swap(adapted, {"embed.trainable_tokens_delta": new})
    with torch.no_grad():
        model.embed.weight[[3, 28]] = new
    assert_close(adapted(x), model(x), 1e-6)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "token_indices is empty"),
        ({"token_indices": [3, 3]}, "twice"),
        ({"token_indices": [29]}, "28"),
        ({"token_indices": [1], "target_modules": ["norm"]}, "not adaptable"),
        ({"token_indices": [1], "target_modules": ["embd"]}, "embed"),
        ({"token_indices": [1], "init_weights": "zero"}, "init_weights"),
        ({"token_indices": [1], "target_parameters": ["embed.weight"]}, "target_parameters"),
    ],
    ids=str,
)
def test_refusals(config, says):
    with pytest.raises((ConfigError, TargetError), match=says):
        adaptc.compile(Net().eval(), TrainableTokensConfig(**config), example_inputs=torch.zeros(2, 5).long())


@pytest.mark.long
def test_rows_beside_a_lora_on_other_layers_are_saved_for_peft(tmp_path):
    """Without target_modules the default layers are adapted; where none is to be, what is saved says so."""
    program = adaptc.compile(FAMILIES["gemma"].build(), LoraConfig(target_modules=[], trainable_token_indices=[5, 9]))
    assert program.binding.config.target_modules == "dummy-target-modules"
    with torch.no_grad():
        for p in program.module().parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    saved = adaptc.save_adapter(program, tmp_path)
    theirs = peft.PeftModel.from_pretrained(FAMILIES["gemma"].build(), str(saved)).eval()
    assert_same(run(program, FAMILIES["gemma"]), run(theirs, FAMILIES["gemma"]))
    again = adaptc.compile(FAMILIES["gemma"].build(), saved)
    assert_same(run(again, FAMILIES["gemma"]), run(theirs, FAMILIES["gemma"]))


def test_a_functional_head_reads_the_base_beside_the_method_on_its_own(tmp_path):
    """Of ``trainable_token_indices`` it reads the trained rows: tests/layers/test_linear.py."""
    torch.manual_seed(0)
    model, twin = FunctionalHead().eval(), FunctionalHead().eval()
    twin.load_state_dict(model.state_dict())
    ids = torch.tensor([[3, 1, 28, 7]])
    wrapped = peft.get_peft_model(
        twin, peft.TrainableTokensConfig(target_modules=["embed"], token_indices=[3, 28], init_weights=False)
    ).eval()
    wrapped.save_pretrained(str(tmp_path))
    expected = wrapped(ids).detach()
    program = adaptc.compile(model, tmp_path, example_inputs=ids.repeat(2, 1))
    torch.testing.assert_close(program(ids), expected)
    torch.testing.assert_close(adaptc.merge(program)(ids), expected)
