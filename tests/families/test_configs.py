"""PEFT's config objects and directories as they come: objects handed over, named adapters, refusals, unknown keys."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest

import adaptc
from adaptc.binding.sources.configs import config_from_peft
from tests.support.oracle import (
    Oracle,
    assert_differs,
    assert_same,
    load_peft,
    quiet,
    randomize,
    run,
    shared_base_program,
)

CPU_OFFLOAD = peft.LoraRuntimeConfig(ephemeral_gpu_offload=True)
#: A value for every field that is refused, as PEFT's own config takes it.
REFUSED: dict[str, Any] = {
    "megatron_config": {"megatron_config": {"tensor_model_parallel_size": 1}},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5, 6]},
    "arrow_config": {"arrow_config": peft.ArrowConfig()},
    "runtime_config": {"runtime_config": CPU_OFFLOAD},
}

PLAIN: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle.wrap_and_save("llama", peft.LoraConfig(**PLAIN), tmp_path_factory.mktemp("adapter"))


def peft_config(**options: Any) -> peft.LoraConfig:
    with quiet("aLoRA is currently only supported for CAUSAL_LM task."):
        return peft.LoraConfig(**{"target_modules": ["q_proj"], **options})


@pytest.mark.parametrize("name", sorted(adaptc.LoraConfig.unsupported_fields))
def test_what_is_not_supported_is_refused_by_name(name: str, oracle: Oracle, tmp_path: Path):
    """As a config of peft's, and in a file."""
    options = REFUSED[name]
    value = options[name]
    plain = (
        value.to_dict()
        if hasattr(value, "to_dict")
        else dataclasses.asdict(value)
        if dataclasses.is_dataclass(value)
        else value
    )
    config = peft_config(**options)
    with pytest.raises(adaptc.ConfigError, match=rf"LoraConfig\.{name}=.* is not supported: "):
        adaptc.compile(shared_base_program("llama"), config)
    if name == "runtime_config":  # PEFT never writes it
        return
    path = Path(shutil.copytree(oracle.path, tmp_path / "adapter"))
    stored = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**stored, name: plain}))
    for call in (
        lambda: adaptc.compile(shared_base_program("llama"), path),
        lambda: adaptc.swap(adaptc.compile(shared_base_program("llama"), oracle.path), path),
    ):
        with pytest.raises(adaptc.ConfigError, match=rf"LoraConfig\.{name}=.* is not supported: "):
            call()


def test_an_initialisation_that_does_not_exist_is_refused_by_name():
    with pytest.raises(adaptc.ConfigError, match=r"init_lora_weights.*nonsense"):
        adaptc.compile(
            shared_base_program("llama"), adaptc.LoraConfig(target_modules=["q_proj"], init_lora_weights="nonsense")
        )


def test_the_fields_and_defaults_are_pefts():
    def fields(config: type) -> dict[str, Any]:
        return {f.name: getattr(config(), f.name) for f in dataclasses.fields(config) if f.name != "peft_type"}

    theirs = fields(peft.LoraConfig)
    theirs["runtime_config"] = None  # an object whose defaults say that nothing is offloaded
    assert fields(adaptc.LoraConfig) == {**theirs, "peft_version": adaptc.LoraConfig().peft_version}


@pytest.mark.parametrize(
    "options",
    [
        {"r": 5, "lora_alpha": 7, "use_rslora": True, "target_modules": {"k_proj", "up_proj"}},
        {"target_modules": r".*\.0\..*(q|o)_proj", "rank_pattern": {"o_proj": 3}, "alpha_pattern": {"q_proj": 20}},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"], "modules_to_save": ["norm"]},
        {"target_modules": ["v_proj"], "task_type": peft.TaskType.CAUSAL_LM, "lora_bias": True},
        {"target_modules": ["q_proj"], "bias": "lora_only", "trainable_token_indices": [3, 8]},
    ],
    ids=lambda o: ", ".join(o),
)
def test_a_config_of_peft_is_taken_as_it_is(options: dict[str, Any], tmp_path: Path):
    """The same object for both, before PEFT has used it; equal values then give equal outputs."""
    config = peft.LoraConfig(init_lora_weights=False, **options)
    program = adaptc.compile(shared_base_program("llama"), config)
    with quiet("Adapter 'default': .* LoRA tensor.s. have invalid shape.*"):  # PEFT's check does not know lora_bias
        oracle = Oracle.wrap_and_save("llama", config, tmp_path / "peft")
    oracle.module_with_peft_values(program)
    assert_same(run(program, oracle.family, 3, 7), oracle(3, 7))
    saved = adaptc.save_adapter(program, tmp_path / "adaptc")
    assert_same(run(load_peft(oracle.family.build(), saved), oracle.family, 3, 7), oracle(3, 7))
    ours, theirs = (json.loads((p / "adapter_config.json").read_text()) for p in (saved, oracle.path))
    for stored in (ours, theirs):
        if not isinstance(stored["target_modules"], str):
            stored["target_modules"] = sorted(stored["target_modules"])
        # What PEFT fills in while it wraps: how to load the base class, and all linear names in place of the word.
        stored.pop("auto_mapping")
    if options["target_modules"] == "all-linear":
        assert ours.pop("target_modules") == "all-linear"
        theirs.pop("target_modules")
    assert ours == theirs


def test_unknown_keys_warn(oracle: Oracle, tmp_path: Path):
    path = Path(shutil.copytree(oracle.path, tmp_path / "adapter"))
    stored = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**stored, "lora_alfa": 3, "invented_later": [1]}))
    with pytest.warns(adaptc.AdaptcWarning, match=r"invented_later.*lora_alfa.*lora_alpha"):
        program = adaptc.compile(shared_base_program("llama"), path)
    assert_same(run(program, oracle.family, 3, 7), oracle(3, 7))
    with pytest.warns(adaptc.AdaptcWarning, match="invented_later"):
        adaptc.swap(program, path)


def test_a_file_of_an_adapter_that_eva_began(oracle: Oracle, tmp_path: Path):
    """EVA chooses A from activations and the ranks with it; the file is plain LoRA, and PEFT loads it as that."""
    path = Path(shutil.copytree(oracle.path, tmp_path / "adapter"))
    stored = json.loads((path / "adapter_config.json").read_text())
    stored |= {"init_lora_weights": "eva", "eva_config": peft.EvaConfig().__dict__}
    (path / "adapter_config.json").write_text(json.dumps(stored))
    with quiet(".*eva.*", ".*EVA.*"):
        theirs = load_peft(oracle.family.build(), path)
    program = adaptc.compile(shared_base_program("llama"), path)
    assert_same(run(program, oracle.family, 3, 7), run(theirs, oracle.family, 3, 7))
    adaptc.swap(program, path)
    again = load_peft(oracle.family.build(), adaptc.save_adapter(program, tmp_path / "saved"))
    assert_same(run(again, oracle.family, 3, 7), oracle(3, 7))


def test_named_adapters_in_one_directory(tmp_path: Path):
    """PEFT keeps every adapter but "default" in a directory of its name."""
    from tests.support.families import FAMILIES

    family = FAMILIES["llama"]
    wrapped = peft.get_peft_model(family.build(), peft.LoraConfig(**PLAIN), adapter_name="fr")
    wrapped.add_adapter("de", peft.LoraConfig(**{**PLAIN, "r": 5, "target_modules": ["q_proj", "down_proj"]}))
    wrapped.base_model.set_adapter(["fr", "de"])
    randomize(wrapped)
    wrapped.save_pretrained(str(tmp_path))
    expected = {}
    for name in ("fr", "de"):
        wrapped.set_adapter(name)
        expected[name] = run(wrapped, family, 3, 7)
    assert_differs(expected["fr"], expected["de"])
    program = adaptc.compile(shared_base_program("llama"), [tmp_path / "fr", tmp_path / "de"])
    assert_same(run(program, family, 3, 7), expected["fr"])
    adaptc.swap(program, tmp_path, adapter_name="de")
    assert_same(run(program, family, 3, 7), expected["de"])
    with pytest.raises(adaptc.CheckpointError, match=r"'de', 'fr'.*/de, or.*adapter_name"):
        adaptc.swap(program, tmp_path)
    shutil.rmtree(tmp_path / "de")
    adaptc.swap(program, tmp_path)  # the only one left
    assert_same(run(program, family, 3, 7), expected["fr"])
    saved = adaptc.save_adapter(program, tmp_path / "ours", adapter_name="fr")
    assert saved == tmp_path / "ours" / "fr"
    assert_same(run(load_peft(family.build(), saved, name="other"), family, 3, 7), expected["fr"])


def test_the_name_of_the_adapter_in_the_program(oracle: Oracle, tmp_path: Path):
    """Any name in the state dict; files never hold it."""
    program = adaptc.compile(shared_base_program("llama"), oracle.path, adapter_name="lora_A")
    assert "model.layers.1.self_attn.v_proj.lora_A.lora_A.weight" in program.state_dict
    assert_same(run(program, oracle.family, 3, 7), oracle(3, 7))
    loaded = load_peft(oracle.family.build(), adaptc.save_adapter(program, tmp_path / "a"))
    assert_same(run(loaded, oracle.family, 3, 7), oracle(3, 7))


def test_a_state_dict_of_peft(oracle: Oracle):
    """With and without the prefix, with PEFT's config for the scale."""
    program = adaptc.compile(shared_base_program("llama"), adaptc.LoraConfig(target_modules="all-linear"))
    tensors = peft.get_peft_model_state_dict(oracle.model)
    config = oracle.model.peft_config["default"]
    adaptc.swap(program, tensors, config=config)
    assert_same(run(program, oracle.family, 3, 7), oracle(3, 7))
    adaptc.swap(
        program, {k.removeprefix("base_model.model."): v for k, v in tensors.items()}, config=config_from_peft(config)
    )
    assert_same(run(program, oracle.family, 3, 7), oracle(3, 7))
