"""Embeddings and the heads tied to them, on transformers models, against PEFT: adapted, scaled, resized, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file

import adaptc
from tests.support.families import FAMILIES
from tests.support.oracle import (
    Oracle,
    assert_differs,
    assert_same,
    file_tensors,
    load_peft,
    quiet,
    run,
    shared_base_program,
)

pytestmark = pytest.mark.few(3)

#: gemma2 scales its embedding and ties its head to it, opt projects it, t5 shares it between two stacks and the head.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "gemma2, scaled by the rank's root": ("gemma2", {"target_modules": ["embed_tokens"], "use_rslora": True}),
    "llama": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "gpt2": ("gpt2", {"target_modules": ["wte", "wpe", "c_attn"]}),
    "opt": ("opt", {"target_modules": ["embed_tokens", "project_in"]}),
    "t5": ("t5", {"target_modules": ["embed_tokens", "relative_attention_bias", "q"]}),
    "bert": ("bert", {"target_modules": "bert.embeddings.*_embeddings"}),
}
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "gemma2, tied": ("gemma2", {"target_modules": ["lm_head", "q_proj"]}),
    "gpt2, tied": ("gpt2", {"target_modules": ["lm_head"]}),
    "gemma2, tied, and its embedding": ("gemma2", {"target_modules": ["lm_head", "embed_tokens"]}),
    "llama, and its embedding": ("llama", {"target_modules": ["lm_head", "embed_tokens"]}),
}
ALL = {**{f"embedding: {k}": v for k, v in CASES.items()}, **{f"head: {k}": v for k, v in HEADS.items()}}


def config_of(kind: type, options: dict[str, Any]) -> Any:
    return kind(r=3, lora_alpha=5, init_lora_weights=False, **options)


@pytest.fixture(scope="module", params=ALL)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    name, options = ALL[request.param]
    made = Oracle.wrap_and_save(name, config_of(peft.LoraConfig, options), tmp_path_factory.mktemp("adapter"))
    made.options = options  # type: ignore[attr-defined]
    return made


@pytest.mark.long
def test_loaded(oracle: Oracle):
    """PEFT writes the base weights of adapted embeddings to the file, too; they are the base's own here."""
    program = adaptc.compile(shared_base_program(oracle.name), oracle.path)
    assert program.binding.changed_base == {}
    for batch, seq in ((2, 5), (3, 7)):
        assert_same(run(program, oracle.family, batch, seq), oracle(batch, seq))
    assert_differs(oracle(), oracle.base_output())


@pytest.mark.long
def test_merged(oracle: Oracle):
    """A tied weight that one of its modules is adapted on is untied, as PEFT does."""
    oracle.check_merged(adaptc.compile(shared_base_program(oracle.name), oracle.path))


@pytest.mark.few(2)
def test_trained_and_saved_for_peft(oracle: Oracle, tmp_path: Path):
    program = adaptc.compile(shared_base_program(oracle.name), config_of(adaptc.LoraConfig, oracle.options))
    oracle.check_trained(program, tmp_path / "adapter")


def with_other_base(oracle: Oracle, directory: Path) -> Path:
    """The adapter's directory with the base weight of the embedding changed, as a resized and trained one leaves it."""
    oracle.model.peft_config["default"].save_pretrained(str(directory))
    tensors = file_tensors(oracle.path)
    key = next(k for k in tensors if k.endswith("base_layer.weight"))
    tensors[key] = tensors[key] + 0.1 * torch.randn(tensors[key].shape, generator=torch.Generator().manual_seed(3))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_base_weights_in_the_file_are_part_of_the_adapter(name: str, tmp_path: Path):
    """PEFT loads them into the base. Here they come and go with the binding, also under the name of a tied head."""
    config = peft.LoraConfig(r=3, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    oracle = Oracle.wrap_and_save(name, config, tmp_path / "adapter")
    other = with_other_base(oracle, tmp_path / "other")
    family = oracle.family
    expected = load_peft(family.build(), other)
    assert_differs(run(expected, family, 3, 7), oracle(3, 7))
    program = adaptc.compile(shared_base_program(name), oracle.path)
    adaptc.swap(program, other)
    assert_same(run(program, family, 3, 7), run(expected, family, 3, 7))
    loaded = adaptc.load(adaptc.save(program, tmp_path / "p.pt2"))
    assert_same(run(loaded, family, 3, 7), run(expected, family, 3, 7))
    assert_same(run(adaptc.unload(program), family, 3, 7), run(family.build(), family, 3, 7))
    for i, holder in enumerate((program, loaded)):
        again = load_peft(family.build(), adaptc.save_adapter(holder, tmp_path / f"saved {i}"))
        assert_same(run(again, family, 3, 7), run(expected, family, 3, 7))
    adaptc.swap(program, oracle.path)
    assert_same(run(program, family, 3, 7), oracle(3, 7))


def test_base_weights_of_another_vocabulary_are_refused(tmp_path: Path):
    config = peft.LoraConfig(r=3, target_modules=["embed_tokens"], init_lora_weights=False)
    oracle = Oracle.wrap_and_save("llama", config, tmp_path / "adapter")
    program = adaptc.compile(shared_base_program("llama"), oracle.path)
    path = with_other_base(oracle, tmp_path / "other")
    tensors = file_tensors(path)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors[key] = torch.cat([tensors[key], tensors[key][:2]])
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(
        adaptc.CheckpointError, match=r"embed_tokens.base_layer.weight.*\(63, 24\).*\(61, 24\).*resized"
    ):
        adaptc.swap(program, path)
    assert_same(run(program, oracle.family), oracle())


@pytest.mark.long
def test_an_adapter_of_a_resized_model(tmp_path: Path):
    """The vocabulary grew before training: PEFT's file holds the embedding and the head, resized and not adapted."""
    model, trained = FAMILIES["llama"].build(), FAMILIES["llama"].build()
    for m in (model, trained):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            m.resize_token_embeddings(67, mean_resizing=False)
    with torch.no_grad():
        trained.get_input_embeddings().weight[61:] += 1.0
        trained.get_output_embeddings().weight[61:] -= 0.5
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    oracle = Oracle.wrap_and_save("llama", config, tmp_path / "adapter", model=trained)
    oracle.model.save_pretrained(str(tmp_path / "resized"), save_embedding_layers=True)
    assert "base_model.model.lm_head.weight" in file_tensors(tmp_path / "resized")
    ids = torch.tensor([[5, 66, 61, 7], [62, 8, 65, 64]])
    program = adaptc.compile(model, tmp_path / "resized")
    with torch.no_grad():
        assert_same(program(input_ids=ids), oracle.model(input_ids=ids))
        assert_same(adaptc.merge(program)(input_ids=ids), oracle.merge_copy()(input_ids=ids))


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["gemma2", "llama", "gpt2"])
def test_trained_tokens(name: str, tmp_path: Path):
    """Rows of the embedding; where the head is tied to it the same rows change there, too."""
    entry = "wte" if name == "gpt2" else "embed_tokens"
    targets = "c_attn" if name == "gpt2" else "q_proj"
    options = {"target_modules": [targets], "trainable_token_indices": {entry: [7, 3, 60]}}
    oracle = Oracle.wrap_and_save(name, config_of(peft.LoraConfig, options), tmp_path / "adapter")
    program = adaptc.compile(shared_base_program(name), oracle.path)
    assert_same(run(program, oracle.family, 3, 7), oracle(3, 7))
    assert_differs(oracle(3, 7), oracle.base_output(3, 7))
    with quiet(".*[Tt]ied.*"):
        theirs = oracle.merge_copy()
    assert_same(run(adaptc.merge(program), oracle.family, 3, 7), run(theirs, oracle.family, 3, 7))
    oracle.check_trained(
        adaptc.compile(shared_base_program(name), config_of(adaptc.LoraConfig, options)), tmp_path / "saved"
    )


@pytest.mark.long
def test_a_module_the_program_never_calls_is_no_target():
    """t5 reads the shared embedding through its stacks; PEFT adapts the module that nobody calls, without effect."""
    with pytest.raises(adaptc.TargetError, match="'shared'"):
        adaptc.compile(shared_base_program("t5"), adaptc.LoraConfig(target_modules=["shared"]))


@pytest.mark.long
def test_copies_that_pefts_wrappers_leave_in_a_file(tmp_path: Path) -> None:
    """Of resized embeddings that are trained PEFT writes each module three times; one of them is what was trained."""
    model: Any = FAMILIES["llama"].build()
    model.name_or_path = ""
    model.resize_token_embeddings(model.config.vocab_size + 5, mean_resizing=False)
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    with quiet():
        theirs: Any = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, value in theirs.named_parameters():
                if ".modules_to_save." in name:
                    value.add_(0.5 * torch.randn_like(value))
        theirs.save_pretrained(tmp_path, save_embedding_layers=True)
        expected = theirs(input_ids=torch.tensor([[3, 8, 60, 2]])).logits
        base = theirs.unload()
    tensors = file_tensors(tmp_path)
    copies = [key for key in tensors if ".original_module." in key or ".modules_to_save." in key]
    assert len(copies) == 4
    found = adaptc.compile(base, tmp_path)(input_ids=torch.tensor([[3, 8, 60, 2]])).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    other = next(key for key in copies if "lm_head.modules_to_save" in key)
    save_file({**tensors, other: tensors[other] + 1}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(adaptc.AdaptcError, match=r"lm_head\.modules_to_save\.weight"):
        adaptc.compile(base, tmp_path)
