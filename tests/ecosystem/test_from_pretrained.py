"""An adapter with the base that its config names: as PEFT's AutoPeftModelFor... classes load it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import adaptc
from tests.support.chats import tokenizer
from tests.support.families import FAMILIES
from tests.support.oracle import quiet

IDS = torch.tensor([[9, 12, 41, 30, 7], [8, 11, 5, 17, 2]])
#: task -> (family of the base, transformers' and PEFT's class, layers)
TASKS: dict[str, tuple[str, str, str, list[str]]] = {
    "SEQ_CLS": ("bert", "AutoModelForSequenceClassification", "AutoPeftModelForSequenceClassification", ["query"]),
    "TOKEN_CLS": ("bert", "AutoModelForTokenClassification", "AutoPeftModelForTokenClassification", ["value"]),
    "QUESTION_ANS": ("bert", "AutoModelForQuestionAnswering", "AutoPeftModelForQuestionAnswering", ["query"]),
    "FEATURE_EXTRACTION": ("bert", "AutoModel", "AutoPeftModelForFeatureExtraction", ["query", "dense"]),
    "CAUSAL_LM": ("llama", "AutoModelForCausalLM", "AutoPeftModelForCausalLM", ["q_proj", "down_proj"]),
    "SEQ_2_SEQ_LM": ("t5", "AutoModelForSeq2SeqLM", "AutoPeftModelForSeq2SeqLM", ["q", "wo"]),
}


def written(folder: Path, task: str | None, labels: int = 5, **options: Any) -> Path:
    """A base in ``folder``/base, and PEFT's adapter of it in ``folder``/adapter, whose head has ``labels`` labels."""
    family, kind, _, layers = TASKS[task or "CAUSAL_LM"]
    torch.manual_seed(0)
    built: Any = FAMILIES[family].build()
    # Without its head, but with a pooler, which some heads read.
    (type(built)(built.config) if family != "bert" else transformers.BertModel(built.config)).save_pretrained(
        folder / "base"
    )
    more: dict[str, Any] = {"num_labels": labels} if task in ("SEQ_CLS", "TOKEN_CLS") else {}
    torch.manual_seed(3)
    with quiet():
        base = getattr(transformers, kind).from_pretrained(folder / "base", **more)
        options = {"init_lora_weights": False, "target_modules": layers} | options
        model = peft.get_peft_model(base, peft.LoraConfig(r=3, task_type=task, **options))
        model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def inputs(task: str | None) -> dict[str, torch.Tensor]:
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS[:, :3]} if task == "SEQ_2_SEQ_LM" else {})


def first(output: Any) -> torch.Tensor:
    return next(output[n] for n in ("logits", "start_logits", "last_hidden_state") if n in output)


@pytest.mark.parametrize("task", list(TASKS))
def test_outputs_are_those_of_pefts_auto_classes(task: str, tmp_path: Path) -> None:
    path, more = written(tmp_path, task), ({"num_labels": 5} if task in ("SEQ_CLS", "TOKEN_CLS") else {})
    with quiet():
        theirs = getattr(peft, TASKS[task][2]).from_pretrained(path, **more).eval()
        prog = adaptc.from_pretrained(path)
    with torch.no_grad():
        expected = theirs(**inputs(task))
    found = prog(**inputs(task))
    torch.testing.assert_close(first(found), first(expected), rtol=1e-5, atol=1e-5)
    if more:
        assert first(found).shape[-1] == 5


@pytest.mark.long
def test_a_base_whose_own_head_has_other_labels(tmp_path: Path) -> None:
    path = written(tmp_path, "SEQ_CLS")
    with quiet():
        other = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
        expected = adaptc.from_pretrained(path)(input_ids=IDS).logits
        other.save_pretrained(tmp_path / "base")
        found = adaptc.from_pretrained(path)(input_ids=IDS).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.long
def test_without_a_task_the_class_is_the_one_that_was_adapted(tmp_path: Path) -> None:
    path = written(tmp_path, None)
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"
    expected = adaptc.from_pretrained(path)(input_ids=IDS).logits
    for mapping in (None, {"base_model_class": "Net", "parent_library": "mine"}):
        (path / "adapter_config.json").write_text(json.dumps(config | {"auto_mapping": mapping}))
        if mapping is None:
            torch.testing.assert_close(adaptc.from_pretrained(path)(input_ids=IDS).logits, expected)
        else:
            with pytest.raises(adaptc.ConfigError, match="'Net' of 'mine', which is no class of transformers"):
                adaptc.from_pretrained(path)


@pytest.mark.long
def test_it_trains_generates_and_serves(tmp_path: Path) -> None:
    path = written(tmp_path, "CAUSAL_LM")
    with quiet():
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(path).eval()
    student = adaptc.from_pretrained(path, training=True)
    loss = student(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(loss, theirs(input_ids=IDS, labels=IDS).loss, rtol=1e-5, atol=1e-5)
    gen = adaptc.from_pretrained(path, compiler=adaptc.compile_for_generation, max_length=20)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(gen.generate(IDS, **options), theirs.generate(input_ids=IDS, **options))
    assert adaptc.from_pretrained(path, dtype="bfloat16").binding.config.r == 3


@pytest.mark.long
def test_embeddings_are_as_many_as_the_adapter_or_its_tokenizer_has(tmp_path: Path) -> None:
    path = written(tmp_path, "CAUSAL_LM")
    words = tokenizer()
    words.add_tokens(["more", "and more"])
    words.save_pretrained(path)
    with quiet():
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(path)
        with pytest.warns(adaptc.AdaptcWarning, match="has 2 tokens more than the base.* random values"):
            prog = adaptc.from_pretrained(path)
    size = theirs.get_input_embeddings().num_embeddings
    assert size == len(words)
    logits = prog(input_ids=IDS).logits
    assert logits.shape[-1] == size
    known = FAMILIES["llama"].build().config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(logits[..., :known], theirs(input_ids=IDS).logits[..., :known], rtol=1e-5, atol=1e-5)
    # The trained embeddings are in the adapter's file; the tokenizer is not asked.
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(known + 7)
    config = peft.LoraConfig(
        r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of embeddings that are saved
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "larger")
    assert (
        load_file(tmp_path / "larger" / "adapter_model.safetensors")["base_model.model.lm_head.weight"].shape[0]
        == known + 7
    )
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    found = adaptc.from_pretrained(tmp_path / "larger", base=tmp_path / "base")(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_values_that_nothing_holds_are_told(tmp_path: Path) -> None:
    path = written(tmp_path, "CAUSAL_LM")
    transformers.AutoModel.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "headless")
    with pytest.warns(adaptc.AdaptcWarning, match=r"hold lm_head.weight of LlamaForCausalLM: these have random"):
        adaptc.from_pretrained(path, base=tmp_path / "headless")


def test_what_cannot_be_loaded_says_what_to_do(tmp_path: Path) -> None:
    path = written(tmp_path, "CAUSAL_LM")
    config = json.loads((path / "adapter_config.json").read_text())
    with pytest.raises(
        adaptc.CheckpointError, match=r"cannot load the base .*absent.* download it first, or give base="
    ):
        adaptc.from_pretrained(path, base=tmp_path / "absent")
    with pytest.raises(adaptc.ConfigError, match="dtype='floaty' is no dtype of torch"):
        adaptc.from_pretrained(path, dtype="floaty")
    with pytest.raises(adaptc.CheckpointError, match="nobody/has-this"):
        adaptc.from_pretrained(path, base="nobody/has-this")
    (path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(adaptc.ConfigError, match="has no base_model_name_or_path: give base="):
        adaptc.from_pretrained(path)
    found = adaptc.from_pretrained(path, base=tmp_path / "base")
    assert found.binding.config.task_type == "CAUSAL_LM"


def test_a_damaged_tokenizer_and_an_adapter_beside_the_base_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "CAUSAL_LM")
    tokenizer().save_pretrained(path)
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(adaptc.CheckpointError, match=r"cannot load the tokenizer in .*adapter .*take its files out"):
        adaptc.from_pretrained(path)
    for file in path.glob("tokenizer*"):
        file.unlink()
    adaptc.from_pretrained(path)
    (tmp_path / "base" / "adapter_config.json").write_bytes((path / "adapter_config.json").read_bytes())
    with pytest.raises(adaptc.CheckpointError, match="has an adapter in its own directory"):
        adaptc.from_pretrained(path)
