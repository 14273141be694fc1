"""Task heads and other modules trained whole, on transformers models, against PEFT: chosen, trained, saved, merged."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import adaptc
from tests.support.families import FAMILIES
from tests.support.oracle import (
    Oracle,
    assert_differs,
    assert_same,
    file_tensors,
    load_peft,
    run,
    shared_base_program,
    with_head,
)

pytestmark = pytest.mark.few(3)


@dataclass(frozen=True)
class Task:
    """A model with a head; ``head`` are the keys its file must hold besides the adapter's."""

    family: str
    model_class: str | None
    config: dict[str, Any] = field(hash=False)
    head: tuple[str, ...] = ()

    def model(self) -> nn.Module:
        import transformers

        if self.model_class is None:
            return FAMILIES[self.family].build()
        return with_head(
            getattr(transformers, self.model_class), self.family, num_labels=2 if "Question" in self.model_class else 3
        )


PAIR = ("classifier.bias", "classifier.weight")
TASKS = {
    "bert sequence": Task(
        "bert", "BertForSequenceClassification", {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}, PAIR
    ),
    "bert token": Task(
        "bert", "BertForTokenClassification", {"task_type": "TOKEN_CLS", "target_modules": ["query", "dense"]}, PAIR
    ),
    "bert question": Task(
        "bert",
        "BertForQuestionAnswering",
        {"task_type": "QUESTION_ANS", "target_modules": ["query"]},
        ("qa_outputs.bias", "qa_outputs.weight"),
    ),
    "llama sequence": Task(
        "llama",
        "LlamaForSequenceClassification",
        {"task_type": "SEQ_CLS", "target_modules": "all-linear"},
        ("score.weight",),
    ),
    "deberta sequence": Task(
        "deberta_v2", None, {"task_type": "SEQ_CLS", "target_modules": ["query_proj", "value_proj"]}, PAIR
    ),
    # A head of two layers, all of it trained.
    "roberta sequence": Task(
        "roberta",
        None,
        {"task_type": "SEQ_CLS", "target_modules": "all-linear"},
        tuple(f"classifier.{m}.{p}" for m in ("dense", "out_proj") for p in ("bias", "weight")),
    ),
}
#: modules_to_save without a task: an untied head, tied ones, an embedding, norms, and norms with running statistics.
SAVED = {
    "llama head": Task("llama", None, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "gemma2 head": Task("gemma2", None, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "gemma2 embedding": Task("gemma2", None, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    # Its bias has two names, and the program reads it under one of them.
    "bert head": Task("bert", None, {"target_modules": ["query"], "modules_to_save": ["cls"]}),
    "t5 head": Task("t5", None, {"target_modules": ["q", "v"], "modules_to_save": ["lm_head"]}),
    "llama norms": Task("llama", None, {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "norm"]}),
    "resnet": Task(
        "resnet", None, {"target_modules": ["convolution"], "modules_to_save": ["classifier", "normalization"]}
    ),
    "vit": Task("vit", None, {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
}
CASES = {**TASKS, **SAVED}


@cache
def bare(name: str) -> adaptc.AdaptedProgram:
    """The task's program without an adapter; captured once."""
    task = CASES[name]
    if task.model_class is None and task.family not in ("deberta_v2", "roberta"):
        return shared_base_program(task.family)
    return adaptc.unload(adaptc.compile(task.model(), adaptc.LoraConfig(target_modules=task.config["target_modules"])))


@pytest.fixture(scope="module", params=CASES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    task = CASES[request.param]
    config = peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **task.config)
    made = Oracle.wrap_and_save(task.family, config, tmp_path_factory.mktemp("adapter"), model=task.model())
    made.case = request.param  # type: ignore[attr-defined]
    return made


@pytest.mark.long
def test_loaded(oracle: Oracle):
    program = adaptc.compile(bare(oracle.case), oracle.path)  # type: ignore[attr-defined]
    for batch, seq in ((2, 5), (3, 7)):
        assert_same(run(program, oracle.family, batch, seq), oracle(batch, seq))
    assert_differs(oracle(), oracle.base_output())


@pytest.mark.few(2)
def test_merged(oracle: Oracle):
    oracle.check_merged(adaptc.compile(bare(oracle.case), oracle.path))  # type: ignore[attr-defined]


def test_trained_and_saved_for_peft(oracle: Oracle, tmp_path: Path):
    task = CASES[oracle.case]  # type: ignore[attr-defined]
    config = adaptc.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **task.config)
    program = adaptc.compile(bare(oracle.case), config)  # type: ignore[attr-defined]
    oracle.check_trained(program, tmp_path / "adapter", task.model())
    whole = {k for k in file_tensors(tmp_path / "adapter") if "lora_" not in k}
    if task.head:
        assert whole == {f"base_model.model.{k}" for k in task.head}
    assert whole


@pytest.mark.long
def test_the_head_starts_at_the_base_and_stays_out_of_it():
    """Before any step the program is the model, and a step on the head changes neither the model nor the base."""
    task = TASKS["bert sequence"]
    model = task.model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    program = adaptc.compile(model, adaptc.LoraConfig(r=3, **task.config))
    expected = run(model, FAMILIES["bert"])
    assert_same(run(program, FAMILIES["bert"]), expected)
    module = program.module()
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "classifier" in name and p.requires_grad:
                p.add_(1.0)
    assert_differs(run(program, FAMILIES["bert"]), expected)
    assert_same(run(adaptc.unload(program), FAMILIES["bert"]), expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.long
def test_all_linear_leaves_the_head_of_every_task_alone():
    """PEFT knows this of sequence classification only and cannot build this model."""
    config = adaptc.LoraConfig(task_type="TOKEN_CLS", target_modules="all-linear")
    program = adaptc.compile(bare("bert token"), config)
    methods = {a.fqn: a.method.name for a in program.adaptation.attachments}
    assert methods["classifier.weight"] == methods["classifier.bias"] == "whole"
    assert set(methods.values()) == {"whole", "lora"}
    assert len(methods) == 2 + 2 * 6


@pytest.mark.long
def test_an_entry_that_ends_no_module_is_named():
    with pytest.raises(adaptc.TargetError, match=r"modules_to_save.*'clasifier'.*classifier"):
        adaptc.compile(bare("vit"), adaptc.LoraConfig(target_modules="all-linear", modules_to_save=["clasifier"]))


@pytest.mark.long
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases(bias: str, tmp_path: Path):
    config = {
        "r": 3,
        "lora_alpha": 5,
        "init_lora_weights": False,
        "target_modules": ["query_proj", "dense"],
        "bias": bias,
    }
    oracle = Oracle.wrap_and_save("deberta_v2", peft.LoraConfig(**config), tmp_path / "peft")
    program = adaptc.compile(bare("deberta sequence"), oracle.path)
    assert_same(run(program, oracle.family, 3, 7), oracle(3, 7))
    oracle.check_merged(program)
    oracle.check_trained(adaptc.compile(bare("deberta sequence"), adaptc.LoraConfig(**config)), tmp_path / "adaptc")


@pytest.mark.long
def test_a_trained_bias_with_two_names(tmp_path: Path):
    """PEFT writes it under both; either will do, but not two values."""
    config = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, "target_modules": ["query"], "bias": "all"}
    oracle = Oracle.wrap_and_save("bert", peft.LoraConfig(**config), tmp_path / "peft")
    tensors = file_tensors(oracle.path)
    one, two = (f"base_model.model.cls.predictions.{n}" for n in ("bias", "decoder.bias"))
    assert torch.equal(tensors[one], tensors[two])
    program = adaptc.compile(shared_base_program("bert"), oracle.path)
    assert_same(run(program, oracle.family, 3, 7), oracle(3, 7))
    loaded = load_peft(FAMILIES["bert"].build(), adaptc.save_adapter(program, tmp_path / "adaptc"))
    assert_same(run(loaded, oracle.family, 3, 7), oracle(3, 7))
    save_file({**tensors, one: tensors[one] + 1}, oracle.path / "adapter_model.safetensors")
    with pytest.raises(adaptc.CheckpointError, match=r"cls\.predictions\.bias.*are one tensor.*differ"):
        adaptc.swap(program, oracle.path)
    assert_same(run(program, oracle.family, 3, 7), oracle(3, 7))
