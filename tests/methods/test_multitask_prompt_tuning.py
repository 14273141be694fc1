"""Multitask prompt tuning next to PEFT's: a task for each row of a batch, first values of tasks learned before."""

from __future__ import annotations

import peft
import pytest
import torch

import adaptc
from adaptc import MultitaskPromptTuningConfig
from adaptc.errors import AdaptcError, ConfigError
from tests.support.families import FAMILIES
from tests.support.oracle import (
    assert_differs,
    assert_same,
    assert_same_gradients,
    file_tensors,
    gradients,
    load_peft,
    quiet,
    shared_base_program,
)
from tests.support.prompts import PROMPT_WARNINGS, labels, prompt_oracle, run_quietly, text

NAME = "MultitaskPromptTuningConfig"
OPTIONS = {"task_type": "CAUSAL_LM", "num_tasks": 3, "num_ranks": 2}


def inputs(batch, length, padding="right"):
    """A task for each row, the last one first."""
    return {**text(batch, length, padding), "task_ids": torch.tensor([(7 * i + 2) % 3 for i in range(batch)])}


@pytest.mark.long
def test_training(tmp_path):
    oracle = prompt_oracle("llama", tmp_path / "peft", NAME, num_virtual_tokens=5, **OPTIONS)
    config = MultitaskPromptTuningConfig(num_virtual_tokens=5, **OPTIONS)
    program = adaptc.compile(FAMILIES["llama"].build(), config, training=True)
    module = oracle.module_with_peft_values(program).eval()
    given = inputs(4, 11)
    given["labels"] = labels(given)
    got, want = module(**given), oracle.model(**given)
    torch.testing.assert_close(got.loss, want.loss)
    assert_same(got, want)
    ours, theirs = gradients(module, got), gradients(oracle.model, want)
    assert len(ours) == 3
    assert_same_gradients(ours, theirs)
    with pytest.raises(AdaptcError, match="task_ids has 5, and the adapter has tasks from 0 to 2"):
        module(**{**given, "task_ids": torch.tensor([0, 5, 1, 2])})
    saved = adaptc.save_adapter(program, tmp_path / "ours")
    mine, peers = file_tensors(saved), file_tensors(oracle.path)
    assert mine.keys() == peers.keys()
    assert all(torch.equal(t, peers[n]) for n, t in mine.items())
    with quiet(*PROMPT_WARNINGS):
        loaded = load_peft(FAMILIES["llama"].build(), saved)
    assert_same(run_quietly(loaded, inputs(2, 5)), run_quietly(oracle.model, inputs(2, 5)))


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_swaps(backend, tmp_path):
    program = adaptc.compile(
        shared_base_program("gpt2"), MultitaskPromptTuningConfig(num_virtual_tokens=3, **OPTIONS), backend=backend
    )
    run_quietly(program, inputs(2, 5))
    with adaptc.debug.assert_no_recompiles():
        for n in (1, 8):
            oracle = prompt_oracle("gpt2", tmp_path / str(n), NAME, seed=n, num_virtual_tokens=n, **OPTIONS)
            adaptc.swap(program, oracle.path)
            for size in ((4, 11), (1, 3)):
                assert_same(run_quietly(program, inputs(*size)), run_quietly(oracle.model, inputs(*size)), 1e-5)
    other = {**inputs(4, 5), "task_ids": torch.tensor([0, 0, 1, 2])}
    assert_differs(run_quietly(program, inputs(4, 5)), run_quietly(program, other))
    for bad in (3, -1):
        with pytest.raises(AdaptcError, match=f"task_ids has {bad}, and the adapter has tasks from 0 to 2"):
            program(**{**inputs(2, 5), "task_ids": torch.tensor([0, bad])})
    with pytest.raises(AdaptcError, match="missing input 'task_ids'"):
        program(**text(2, 5))


@pytest.mark.long
def test_saved_programs_and_the_base(tmp_path):
    oracle = prompt_oracle("llama", tmp_path / "peft", NAME, num_virtual_tokens=5, **OPTIONS)
    program = adaptc.compile(shared_base_program("llama"), oracle.path)
    program.validate()
    assert adaptc.verify(program).ok
    loaded = adaptc.load(adaptc.save(program, tmp_path / "ours.pt2"))
    assert_same(run_quietly(loaded, inputs(4, 5)), run_quietly(oracle.model, inputs(4, 5)))
    torch.export.save(program, tmp_path / "torch.pt2")
    with torch.no_grad():
        again = torch.export.load(tmp_path / "torch.pt2").module()(**inputs(4, 5))
    assert_same(again, run_quietly(oracle.model, inputs(4, 5)))
    plain = adaptc.unload(loaded)
    plain.validate()
    assert_same(run_quietly(plain, text(2, 5)), run_quietly(FAMILIES["llama"].build(), text(2, 5)))
    assert_same(run_quietly(program.bind(None), text(2, 5)), run_quietly(FAMILIES["llama"].build(), text(2, 5)))


@pytest.mark.long
@pytest.mark.parametrize("how", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_first_values_of_a_source(how, tmp_path):
    source = prompt_oracle("llama", tmp_path / "source", NAME, num_virtual_tokens=5, **OPTIONS)
    config = {
        **OPTIONS,
        "num_virtual_tokens": 5,
        "num_tasks": 3 if how == "ONLY_SOURCE_SHARED" else 1,
        "prompt_tuning_init": how,
        "prompt_tuning_init_state_dict_path": str(source.path / "adapter_model.safetensors"),
        "prompt_tuning_init_task": 2,
    }
    with quiet(*PROMPT_WARNINGS):
        theirs = peft.get_peft_model(FAMILIES["llama"].build(), peft.MultitaskPromptTuningConfig(**config))
    ours = adaptc.compile(shared_base_program("llama"), MultitaskPromptTuningConfig(**config)).binding.values
    compared = ["embedding.weight"]
    compared += [] if how == "ONLY_SOURCE_SHARED" else ["prefix_task_cols", "prefix_task_rows"]
    for name in compared:
        want = theirs.prompt_encoder["default"].get_parameter(name)
        assert torch.equal(ours[f"prompt_encoder.default.{name}"], want)
    if how != "ONLY_SOURCE_SHARED":
        with pytest.raises(ConfigError, match="num_tasks 1 where"):
            adaptc.compile(shared_base_program("llama"), MultitaskPromptTuningConfig(**{**config, "num_tasks": 2}))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prompt_tuning_init": "EXACT_SOURCE_TASK"}, "needs prompt_tuning_init_state_dict_path"),
        ({"num_tasks": 0}, "num_tasks"),
        ({"num_ranks": 0}, "num_ranks"),
    ],
)
def test_bad_options(more, message):
    with pytest.raises(ConfigError, match=message):
        MultitaskPromptTuningConfig(num_virtual_tokens=3, **more)


def test_bad_sources(tmp_path):
    config = MultitaskPromptTuningConfig(
        num_virtual_tokens=5,
        prompt_tuning_init="ONLY_SOURCE_SHARED",
        prompt_tuning_init_state_dict_path=str(tmp_path / "none.safetensors"),
    )
    with pytest.raises(ConfigError, match="cannot be read as a file of tensors"):
        adaptc.compile(shared_base_program("llama"), config)
