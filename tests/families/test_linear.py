"""LoRA on every linear layer of a dozen architectures, against PEFT: outputs, merges, gradients and files."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS

import adaptc
from tests.support.families import FAMILIES
from tests.support.oracle import (
    TARGETS,
    Oracle,
    assert_differs,
    assert_same,
    quiet,
    run,
    shared_base_program,
    shared_lora_program,
)

pytestmark = pytest.mark.few(5)

NAMES = ["llama", "qwen3", "gemma2", "gpt2", "opt", "gpt_neox", "bert", "deberta_v2", "t5", "vit", "resnet", "mixtral"]
SIZES = [(2, 5), (3, 7), (1, 11)]


@pytest.fixture(scope="module", params=NAMES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    targets = TARGETS.get(request.param, "all-linear")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False)
    return Oracle.wrap_and_save(request.param, config, tmp_path_factory.mktemp(request.param))


@pytest.mark.few(2)
def test_an_adapter_of_peft_loads(oracle: Oracle):
    program = adaptc.compile(shared_base_program(oracle.name), oracle.path)
    for batch, seq in SIZES:
        expected = oracle(batch, seq)
        assert_same(run(program, oracle.family, batch, seq), expected)
        assert_differs(expected, oracle.base_output(batch, seq))


def test_the_same_modules_are_adapted(oracle: Oracle):
    assert {a.key for a in shared_lora_program(oracle.name).adaptation.attachments} == oracle.adapted_modules()


@pytest.mark.few(3)
def test_an_adapter_of_peft_is_swapped_in_and_out(oracle: Oracle):
    program = shared_lora_program(oracle.name)
    before = adaptc.compile(shared_base_program(oracle.name), program.binding.config).binding
    report = adaptc.swap(program, oracle.path)
    assert report.sites == len(oracle.adapted_modules())
    assert_same(run(program, oracle.family, 3, 7), oracle(3, 7))
    adaptc.swap(program, before)  # B is zero
    assert_same(run(program, oracle.family, 3, 7), oracle.base_output(3, 7))


def test_merged_weights(oracle: Oracle):
    oracle.check_merged(adaptc.compile(shared_base_program(oracle.name), oracle.path))


def test_trained_and_saved_for_peft(oracle: Oracle, tmp_path: Path):
    targets = TARGETS.get(oracle.name, "all-linear")
    config = adaptc.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False)
    oracle.check_trained(adaptc.compile(shared_base_program(oracle.name), config), tmp_path / "adapter")


@pytest.mark.long
def test_the_program_without_adapter_is_the_model(oracle: Oracle):
    model = oracle.family.build()
    assert_same(run(shared_base_program(oracle.name), oracle.family, 3, 7), run(model, oracle.family, 3, 7))


@pytest.mark.long
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("mixtral", "resnet")])
def test_default_targets(name: str):
    model = FAMILIES[name].build()
    kind = model.config.model_type
    chosen = {a.key for a in adaptc.compile(shared_base_program(name), adaptc.LoraConfig()).adaptation.attachments}
    if kind not in PEFT_DEFAULTS:
        assert {c.rpartition(".")[2] for c in chosen} == {"q_proj", "v_proj"}
        return
    with quiet("fan_in_fan_out is set to False.*"):
        wrapped = peft.get_peft_model(model, peft.LoraConfig())
    expected = {n for n, m in wrapped.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert chosen == expected
